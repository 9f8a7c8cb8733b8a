"""`Radon` and `RadonFanbeam`: upstream's v1 classes, their borders, gradients and choice of backend."""

import functools
import logging
import math
import warnings

import numpy as np
import torch

from . import backend_torch
from .filtering import FILTERS, detector_weight
from .geometry import Geometry
from .noise import add_noise, set_seed

log = logging.getLogger("torch_radon")

TRANSPOSE = {"forward": "forward_transpose", "forward_transpose": "forward",
             "backproject": "backproject_transpose", "backproject_transpose": "backproject"}


@functools.cache
def _cpu_backend():
    try:
        from . import backend_cpu
    except ImportError as error:
        log.warning("torch_radon: the fast CPU backend is off (%s); plain PyTorch serves instead", error)
        return backend_torch
    return backend_cpu


def backend_for(tensor: torch.Tensor):
    """The module whose kernels serve this tensor: Numba for float32 on the CPU, plain PyTorch for everything else.

    A CUDA backend (one module with the functions of `backend_cpu`) is chosen here.
    """
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        return _cpu_backend()
    return backend_torch


class _Linear(torch.autograd.Function):
    """One of the four linear maps; its gradient is the true transpose, itself differentiable."""

    @staticmethod
    def forward(ctx, x, geometry, kernel):
        ctx.geometry, ctx.kernel = geometry, kernel
        return getattr(backend_for(x), kernel)(geometry, x)

    @staticmethod
    def backward(ctx, gradient):
        return _Linear.apply(gradient.contiguous(), ctx.geometry, TRANSPOSE[ctx.kernel]), None, None


def _checked(x, trailing: tuple[int, int], what: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{what} is a {type(x).__name__}; expected a torch tensor (torch.from_numpy makes one)")
    if x.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TypeError(f"{what} has dtype {x.dtype}; expected float16, float32 or float64 (call .float() on it)")
    if tuple(x.shape[-2:]) != trailing or x.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(x.shape)}; expected (..., {trailing[0]}, {trailing[1]}), not empty")
    return x


def _linear(kernel: str, x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Apply a kernel over the last two dimensions; half precision is computed in float32."""
    work = x.float() if x.dtype == torch.float16 else x
    with torch.autocast(x.device.type, enabled=False):
        y = _Linear.apply(work.reshape(-1, *x.shape[-2:]).contiguous(), geometry, kernel)
    return y.reshape(*x.shape[:-2], *y.shape[-2:]).to(x.dtype)


class _Projector:
    """What `Radon` and `RadonFanbeam` share: the maps between images (..., H, W) and sinograms (..., views, bins)."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.angles = -torch.tensor(geometry.angles, dtype=torch.float32)  # negated, as upstream keeps them
        self.resolution = geometry.height if geometry.height == geometry.width else (geometry.height, geometry.width)
        self.det_count = geometry.det_count
        self.det_spacing = geometry.det_spacing
        self.clip_to_circle = geometry.clip_to_circle

    @property
    def _image_shape(self):
        return self.geometry.height, self.geometry.width

    @property
    def _sinogram_shape(self):
        return len(self.geometry.angles), self.det_count

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """Projection of images (..., H, W) -> (..., views, bins). README, "Equations"."""
        return _linear("forward", _checked(imgs, self._image_shape, "the image"), self.geometry)

    def backprojection(self, sinogram: torch.Tensor) -> torch.Tensor:
        """Backprojection of (..., views, bins) -> (..., H, W): interpolated, not the transpose of `forward`."""
        return _linear("backproject", _checked(sinogram, self._sinogram_shape, "the sinogram"), self.geometry)

    backward = backprojection
    add_noise, set_seed = staticmethod(add_noise), staticmethod(set_seed)  # where upstream has them

    def transpose(self, sinogram: torch.Tensor) -> torch.Tensor:
        """The exact transpose of `forward`: (..., views, bins) -> (..., H, W). For least squares."""
        return _linear("forward_transpose", _checked(sinogram, self._sinogram_shape, "the sinogram"), self.geometry)

    def filter_sinogram(self, sinogram: torch.Tensor, filter_name: str = "ramp") -> torch.Tensor:
        """Filter every row of (..., views, bins) and weight it by pi/(2 views). Raises ValueError for unknown names.

        With weights="fdk" the rows are multiplied by the fan beam's cosine weight first.
        """
        _checked(sinogram, self._sinogram_shape, "the sinogram")
        if filter_name not in FILTERS:
            raise ValueError(f"filter_name is {filter_name!r}; expected one of {', '.join(FILTERS)}")
        work = sinogram.float() if sinogram.dtype == torch.float16 else sinogram
        with torch.autocast(sinogram.device.type, enabled=False):
            weight = torch.from_numpy(detector_weight(self.geometry)).to(work)
            filtered = backend_torch.apply_filter(work * weight, filter_name) * (math.pi / 2 / len(self.angles))
        return filtered.to(sinogram.dtype)

    def degrade(self, imgs: torch.Tensor, view_weights=None, filter_name: str = "ramp") -> torch.Tensor:
        """backprojection(filter(forward(imgs))) in one call, (..., H, W) -> (..., H, W), without a gradient.

        view_weights: the factor of each view, pi/(2 views) for all if None. float16 is computed in float32.
        """
        _checked(imgs, self._image_shape, "the image")
        work = imgs.detach().float() if imgs.dtype == torch.float16 else imgs.detach()
        if view_weights is None:
            view_weights = np.full(len(self.geometry.angles), math.pi / 2 / len(self.geometry.angles))
        weights = torch.as_tensor(view_weights).to(work)
        if weights.shape != self._sinogram_shape[:1]:
            raise ValueError(f"view_weights has shape {tuple(weights.shape)}; expected one a view: "
                             f"({len(self.angles)},)")
        with torch.no_grad(), torch.autocast(imgs.device.type, enabled=False):
            y = backend_for(work).fbp(self.geometry, work.reshape(-1, *self._image_shape).contiguous(), weights,
                                      filter_name)
        return y.reshape(imgs.shape).to(imgs.dtype)


def _angles(angles) -> tuple[float, ...]:
    if isinstance(angles, torch.Tensor):
        angles = angles.detach().cpu().numpy()
    angles = np.asarray(angles, np.float64).astype(np.float32)
    if angles.ndim != 1 or angles.size == 0:
        raise ValueError(f"angles has shape {angles.shape}; expected a list of at least one angle in radians")
    if not np.isfinite(angles).all():
        raise ValueError("angles holds NaN or infinity; expected finite radians")
    return tuple(angles.tolist())


def _size(resolution) -> tuple[int, int]:
    size = (resolution, resolution) if np.ndim(resolution) == 0 else tuple(resolution)
    if len(size) != 2 or any(int(s) != s or s < 1 for s in size):
        raise ValueError(f"resolution is {resolution!r}; expected pixels, an integer or (height, width)")
    return int(size[0]), int(size[1])


def _bins(det_count, height: int, width: int) -> int:
    if int(det_count) != det_count or det_count == 0:
        raise ValueError(f"det_count is {det_count!r}; expected a positive integer (negative: the resolution)")
    return int(det_count) if det_count > 0 else max(height, width)


def _finite(**values):
    for name, value in values.items():
        if not np.isfinite(value):
            raise ValueError(f"{name} is {value!r}; expected a finite number of pixels")


def _warn_if_truncated(geometry: Geometry, corners: bool):
    """Warn where rays through the image miss the detector; those through its corners alone only if `corners`."""
    if geometry.clip_to_circle:
        return
    inner, outer = min(geometry.height, geometry.width) / 2, math.hypot(geometry.height, geometry.width) / 2
    edge = geometry.det_count * geometry.det_spacing / 2 - abs(geometry.det_offset)
    seen, cell, reach = edge, geometry.det_spacing, outer
    if geometry.fan:
        near, span = geometry.source_distance, geometry.source_distance + geometry.det_distance
        seen, cell = near * edge / math.hypot(span, edge), cell * near / span
        reach = span * outer / math.sqrt(near**2 - outer**2)
    whole = math.ceil(2 * (reach + abs(geometry.det_offset)) / geometry.det_spacing)
    if seen + cell < inner or (corners and seen + cell < outer):
        part = "the corners of the image are" if seen + cell >= inner else "all of the image further out is"
        warnings.warn(f"det_count {geometry.det_count} with det_spacing {geometry.det_spacing:g} sees only {seen:.1f} "
                      f"pixels from the centre in every view: {part} truncated; {whole} bins see all of it",
                      stacklevel=3)


def _positive(**values):
    for name, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; expected a positive number")


class Radon(_Projector):
    """Parallel-beam projector of `resolution` x `resolution` pixels (or (height, width)).

    angles: radians, list, array or tensor; det_count: bins, the resolution if negative; det_spacing: pixels;
    clip_to_circle: project only the disc of diameter det_count; det_offset: pixels, a shift of the detector.
    """

    def __init__(self, resolution, angles, det_count=-1, det_spacing=1.0, clip_to_circle=False, *, det_offset=0.0):
        height, width = _size(resolution)
        _positive(det_spacing=det_spacing)
        _finite(det_offset=det_offset)
        super().__init__(Geometry(height, width, _angles(angles), _bins(det_count, height, width), float(det_spacing),
                                  det_offset=float(det_offset), clip_to_circle=bool(clip_to_circle)))
        _warn_if_truncated(self.geometry, corners=det_count > 0)


class RadonFanbeam(_Projector):
    """Fan-beam projector with a flat detector; lengths in pixels, measured from the rotation centre.

    Defaults are upstream's: det_count = resolution; det_distance = source_distance, which also makes det_spacing 2
    whatever was passed (a warning says so); det_spacing alone not given = (S + D)/S. `weights="fdk"` are the true
    fan-beam weights, `"published"` torch-radon's. Raises ValueError where the source lies inside the image.
    """

    def __init__(self, resolution, angles, source_distance, det_distance=-1, det_count=-1, det_spacing=-1,
                 clip_to_circle=False, *, det_offset=0.0, weights="published"):
        height, width = _size(resolution)
        _positive(source_distance=source_distance)
        _finite(det_distance=det_distance, det_spacing=det_spacing, det_offset=det_offset)
        if weights not in ("published", "fdk"):
            raise ValueError(f"weights is {weights!r}; expected 'published' or 'fdk'")
        if source_distance <= math.hypot(height, width) / 2:
            raise ValueError(f"source_distance is {source_distance} pixels, inside the image, whose corner lies "
                             f"{math.hypot(height, width) / 2:.1f} from the centre; expected more")
        if det_distance < 0:
            det_distance = source_distance
            if det_spacing > 0 and det_spacing != 2.0:
                warnings.warn(f"det_spacing {det_spacing} is replaced by 2.0 because det_distance is not given "
                              "(torch-radon's rule); pass det_distance to keep it", stacklevel=2)
            det_spacing = 2.0
        elif det_spacing < 0:
            det_spacing = (source_distance + det_distance) / source_distance
        _positive(det_spacing=det_spacing)
        super().__init__(Geometry(height, width, _angles(angles), _bins(det_count, height, width), float(det_spacing),
                                  float(source_distance), float(det_distance), float(det_offset),
                                  bool(clip_to_circle), weights))
        self.source_distance = self.geometry.source_distance
        self.det_distance = self.geometry.det_distance
        _warn_if_truncated(self.geometry, corners=det_count > 0)
