"""A drop-in for torch-radon v1: the same API and numbers, on today's PyTorch, on CPU and GPU, without a compiler."""

from . import solvers, v2
from . import v2 as volumes
from .differentiable_functions import RadonBackprojection, RadonForward
from .filtering import FourierFilters
from .noise import transmission_noise
from .operators import BaseRadon, Radon, RadonFanbeam
from .readings import ReadingsLookup, compute_lookup_table
from .stack import Stack
from .utils import normalize_shape
from .v2 import ConeBeam, FanBeam, ParallelBeam, Volume2D, Volume3D

__version__ = "1.2.0"
__all__ = ["BaseRadon", "ConeBeam", "FanBeam", "FourierFilters", "ParallelBeam", "Radon", "RadonBackprojection",
           "RadonFanbeam", "RadonForward", "ReadingsLookup", "Stack", "Volume2D", "Volume3D", "compute_lookup_table",
           "normalize_shape", "solvers", "transmission_noise", "v2", "volumes"]
