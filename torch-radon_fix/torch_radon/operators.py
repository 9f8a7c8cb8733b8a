"""`Radon` and `RadonFanbeam`: upstream's v1 classes, their borders, gradients and choice of backend."""

import functools
import hashlib
import logging
import math
import warnings

import numpy as np
import torch

from . import backend_torch
from .filtering import FILTERS
from .geometry import Geometry
from .noise import add_noise, set_seed

log = logging.getLogger("torch_radon")

TRANSPOSE = {"forward": "forward_transpose", "forward_transpose": "forward",
             "backproject": "backproject_transpose", "backproject_transpose": "backproject",
             "filter": "filter_transpose", "filter_transpose": "filter"}


@functools.cache
def _cpu_backend():
    try:
        from . import backend_cpu
    except ImportError as error:
        log.warning("torch_radon: the fast CPU backend is off (%s); plain PyTorch serves instead", error)
        return backend_torch
    return backend_cpu


@functools.cache
def _cuda_backend():
    try:
        from . import backend_cuda
    except ImportError as error:
        log.warning("torch_radon: the fast CUDA backend is off (%s); plain PyTorch serves instead", error)
        return backend_torch
    return backend_cuda


def backend_for(tensor: torch.Tensor):
    """The module whose kernels serve this tensor: Numba for float32 on the CPU, Triton for float32 and float16 on CUDA,
    plain PyTorch for everything else.
    """
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        return _cpu_backend()
    if tensor.device.type == "cuda" and tensor.dtype in (torch.float32, torch.float16):
        return _cuda_backend()
    return backend_torch


# Operators that torch.compile takes as they are get no objects, so a geometry is known to them by its digest: the same
# in every process, because compiled graphs are cached on disk.
GEOMETRIES: dict[str, Geometry] = {}


def _register(geometry: Geometry) -> str:
    key = hashlib.sha256(repr(geometry).encode()).hexdigest()[:24]
    GEOMETRIES[key] = geometry
    return key


def _prepared(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and float32 where the backend cannot store float16."""
    half = x.dtype == torch.float16 and backend_for(x) is backend_torch
    return (x.float() if half else x).contiguous()


def _filter(geometry: Geometry, sinogram: torch.Tensor, name: str, transposed: bool) -> torch.Tensor:
    p = sinogram.float() if sinogram.dtype == torch.float16 else sinogram
    weight = backend_torch.bin_weights(geometry, p.dtype, p.device)
    scale = math.pi / 2 / len(geometry.angles)
    if transposed:  # the convolution is its own transpose
        return backend_torch.apply_filter(p, name) * (scale * weight)
    return backend_torch.apply_filter(p * weight, name) * scale


@torch.library.custom_op("torch_radon::linear", mutates_args=())
def _apply(x: torch.Tensor, geometry: str, kernel: str, filter_name: str) -> torch.Tensor:
    """One of the linear maps of (B, ..., ...); float64 for float64, else float32, whatever autocast says."""
    x, g = _prepared(x), GEOMETRIES[geometry]
    with torch.autocast(x.device.type, enabled=False):
        if filter_name:
            return _filter(g, x, filter_name, kernel == "filter_transpose")
        return getattr(backend_for(x), kernel)(g, x)


@_apply.register_fake
def _(x, geometry, kernel, filter_name):
    g = GEOMETRIES[geometry]
    to_image = kernel in ("forward_transpose", "backproject")
    shape = (g.height, g.width) if to_image else (len(g.angles), g.det_count)
    return x.new_empty((x.shape[0], *shape), dtype=x.dtype if x.dtype == torch.float64 else torch.float32)


def _remember(ctx, inputs, output):
    x, ctx.geometry, ctx.kernel, ctx.filter_name = inputs
    ctx.dtype = x.dtype


def _transposed(ctx, gradient):
    """The gradient of a linear map is its true transpose, itself differentiable."""
    gradient = _apply(gradient, ctx.geometry, TRANSPOSE[ctx.kernel], ctx.filter_name)
    return gradient.to(ctx.dtype), None, None, None


_apply.register_autograd(_transposed, setup_context=_remember)


@torch.library.custom_op("torch_radon::fbp", mutates_args=())
def _fbp(x: torch.Tensor, view_weights: torch.Tensor, geometry: str, filter_name: str) -> torch.Tensor:
    """backprojection(filter(forward(x))) of (B, H, W); precision as in `_apply`, no gradient."""
    x = _prepared(x)
    with torch.autocast(x.device.type, enabled=False):
        return backend_for(x).fbp(GEOMETRIES[geometry], x, view_weights, filter_name)


@_fbp.register_fake
def _(x, view_weights, geometry, filter_name):
    return x.new_empty(x.shape, dtype=view_weights.dtype)


def _checked(x, trailing: tuple[int, int], what: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{what} is a {type(x).__name__}; expected a torch tensor (torch.from_numpy makes one)")
    if x.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TypeError(f"{what} has dtype {x.dtype}; expected float16, float32 or float64 (call .float() on it)")
    if tuple(x.shape[-2:]) != trailing or x.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(x.shape)}; expected (..., {trailing[0]}, {trailing[1]}), not empty")
    return x


def _linear(kernel: str, x: torch.Tensor, key: str, filter_name: str = "") -> torch.Tensor:
    """Apply a kernel over the last two dimensions; half precision is computed in float32."""
    y = _apply(x.reshape(-1, *x.shape[-2:]), key, kernel, filter_name)
    return y.reshape(*x.shape[:-2], *y.shape[-2:]).to(x.dtype)


class _Projector:
    """What `Radon` and `RadonFanbeam` share: the maps between images (..., H, W) and sinograms (..., views, bins)."""

    def __init__(self, geometry: Geometry):
        self.geometry, self._key = geometry, _register(geometry)
        self.angles = -torch.tensor(geometry.angles, dtype=torch.float32)  # negated, as upstream keeps them
        self.resolution = geometry.height if geometry.height == geometry.width else (geometry.height, geometry.width)
        self.det_count = geometry.det_count
        self.det_spacing = geometry.det_spacing
        self.clip_to_circle = geometry.clip_to_circle

    def __setstate__(self, state):
        self.__dict__.update(state)
        _register(self.geometry)  # another process has a table of its own

    @property
    def _image_shape(self):
        return self.geometry.height, self.geometry.width

    @property
    def _sinogram_shape(self):
        return len(self.geometry.angles), self.det_count

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """Projection of images (..., H, W) -> (..., views, bins). README, "Equations"."""
        return _linear("forward", _checked(imgs, self._image_shape, "the image"), self._key)

    def backprojection(self, sinogram: torch.Tensor) -> torch.Tensor:
        """Backprojection of (..., views, bins) -> (..., H, W): interpolated, not the transpose of `forward`."""
        return _linear("backproject", _checked(sinogram, self._sinogram_shape, "the sinogram"), self._key)

    backward = backprojection
    add_noise, set_seed = staticmethod(add_noise), staticmethod(set_seed)  # where upstream has them

    def transpose(self, sinogram: torch.Tensor) -> torch.Tensor:
        """The exact transpose of `forward`: (..., views, bins) -> (..., H, W). For least squares."""
        return _linear("forward_transpose", _checked(sinogram, self._sinogram_shape, "the sinogram"), self._key)

    def filter_sinogram(self, sinogram: torch.Tensor, filter_name: str = "ramp") -> torch.Tensor:
        """Filter every row of (..., views, bins) and weight it by pi/(2 views). Raises ValueError for unknown names.

        With weights="fdk" the rows are multiplied by the fan beam's cosine weight first.
        """
        _checked(sinogram, self._sinogram_shape, "the sinogram")
        if filter_name not in FILTERS:
            raise ValueError(f"filter_name is {filter_name!r}; expected one of {', '.join(FILTERS)}")
        return _linear("filter", sinogram, self._key, filter_name)

    def degrade(self, imgs: torch.Tensor, view_weights=None, filter_name: str = "ramp") -> torch.Tensor:
        """backprojection(filter(forward(imgs))) in one call, (..., H, W) -> (..., H, W), without a gradient.

        view_weights: the factor of each view, pi/(2 views) for all if None. float16 is computed in float32.
        """
        _checked(imgs, self._image_shape, "the image")
        if filter_name not in FILTERS:
            raise ValueError(f"filter_name is {filter_name!r}; expected one of {', '.join(FILTERS)}")
        views, dtype = len(self.geometry.angles), torch.float64 if imgs.dtype == torch.float64 else torch.float32
        if view_weights is None:
            weights = torch.full((views,), math.pi / 2 / views, dtype=dtype, device=imgs.device)
        else:
            weights = torch.as_tensor(view_weights, dtype=dtype)
            if isinstance(view_weights, torch.Tensor) and view_weights.device != imgs.device:
                raise ValueError(f"view_weights is on {view_weights.device} and the image on {imgs.device}; expected "
                                 "one device")
            weights = weights.to(imgs.device)
        if weights.shape != self._sinogram_shape[:1]:
            raise ValueError(f"view_weights has shape {tuple(weights.shape)}; expected one a view: ({views},)")
        with torch.no_grad():
            y = _fbp(imgs.detach().reshape(-1, *self._image_shape), weights, self._key, filter_name)
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
