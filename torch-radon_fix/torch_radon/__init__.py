"""A drop-in for torch-radon v1: the same API and numbers, on today's PyTorch, on CPU and GPU, without a compiler."""

from . import solvers
from .noise import add_noise, set_seed, transmission_noise
from .operators import Radon, RadonFanbeam

__version__ = "1.0.0"
__all__ = ["Radon", "RadonFanbeam", "add_noise", "set_seed", "solvers", "transmission_noise"]
