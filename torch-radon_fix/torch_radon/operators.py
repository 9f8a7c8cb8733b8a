"""`Radon` and `RadonFanbeam`: upstream's v1 classes, their borders, gradients and choice of backend."""

import functools
import logging
import math
import warnings
from dataclasses import replace

import numpy as np
import torch

from . import backend_torch, noise, readings
from .filtering import FourierFilters, filter_named
from .geometry import Geometry, Stacked

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


def backend_for(tensor: torch.Tensor, geometry: Geometry | Stacked):
    """The module whose kernels serve this tensor: Numba for float32 on the CPU, Triton for float32 and float16 on CUDA,
    plain PyTorch for everything else and where pixels lie behind the source, which the fast kernels do not expect.
    """
    if geometry.source_inside:
        return backend_torch
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        return _cpu_backend()
    if tensor.device.type == "cuda" and tensor.dtype in (torch.float32, torch.float16):
        return _cuda_backend()
    return backend_torch


# Operators that torch.compile takes as they are get no objects, so a geometry is known to them by its key.
GEOMETRIES: dict[str, Geometry | Stacked] = {}


def _register(geometry: Geometry | Stacked) -> str:
    GEOMETRIES[geometry.key] = geometry
    return geometry.key


def _on_backend(x: torch.Tensor, geometry: Geometry | Stacked, kernel: str, *arguments) -> torch.Tensor:
    """A kernel of (B, ..., ...): contiguous, in float32 where the backend cannot store float16, whatever autocast says.

    A stack of scans is one call of the CUDA backend; the others go scan by scan.
    """
    if x.dtype == torch.float16 and backend_for(x, geometry) is backend_torch:
        x = x.float()
    x, backend = x.contiguous(), backend_for(x, geometry)
    if not hasattr(backend, kernel):  # the CPU's filter
        backend = backend_torch
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _on_backend(x, geometry, kernel, *arguments)
    if isinstance(geometry, Geometry) or hasattr(backend, "TAKES_STACKS"):
        return getattr(backend, kernel)(geometry, x, *arguments)
    return backend_torch.by_scan(getattr(backend, kernel), geometry, x, *arguments)


def _compute(x: torch.Tensor, geometry: str, kernel: str, filter_name: str) -> torch.Tensor:
    g = GEOMETRIES[geometry]
    if filter_name:
        return _on_backend(x, g, "filter_rows", filter_name, kernel == "filter_transpose")
    return _on_backend(x, g, kernel)


@torch.library.custom_op("torch_radon::linear", mutates_args=())
def _apply(x: torch.Tensor, geometry: str, kernel: str, filter_name: str) -> torch.Tensor:
    """One of the linear maps of (B, ..., ...); float64 for float64, else float32."""
    return _compute(x, geometry, kernel, filter_name)


@_apply.register_fake
def _(x, geometry, kernel, filter_name):
    g = GEOMETRIES[geometry]
    to_image, scan = kernel in ("forward_transpose", "backproject"), g.scans[0]
    shape = (scan.height, scan.width) if to_image else (g.n_angles, scan.det_count)
    return x.new_empty((x.shape[0], *shape), dtype=x.dtype if x.dtype == torch.float64 else torch.float32)


def _remember(ctx, inputs, output):
    x, ctx.geometry, ctx.kernel, ctx.filter_name = inputs
    ctx.dtype = x.dtype


def _transposed(ctx, gradient):
    """The gradient of a linear map is its true transpose, itself differentiable."""
    gradient = _apply(gradient, ctx.geometry, TRANSPOSE[ctx.kernel], ctx.filter_name)
    return gradient.to(ctx.dtype), None, None, None


_apply.register_autograd(_transposed, setup_context=_remember)


class _Map(torch.autograd.Function):
    """`_apply` with what custom operators lack: forward-mode derivatives and torch.func."""

    @staticmethod
    def forward(x, geometry, kernel, filter_name):
        return _apply(x, geometry, kernel, filter_name)

    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx, gradient):
        gradient = _Map.apply(gradient, ctx.geometry, TRANSPOSE[ctx.kernel], ctx.filter_name)
        return gradient.to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        """The map is linear: its derivative is itself."""
        return _Map.apply(tangent, ctx.geometry, ctx.kernel, ctx.filter_name)

    @staticmethod
    def vmap(info, in_dims, x, geometry, kernel, filter_name):
        x = x.movedim(in_dims[0], 1)  # behind the batch, whose order a stack of scans needs
        y = _Map.apply(x.flatten(0, 1), geometry, kernel, filter_name)
        return y.unflatten(0, x.shape[:2]), 1


_map = torch.compiler.disable(_Map.apply)  # traced, it would lose its forward-mode derivative


def _compute_fbp(x: torch.Tensor, view_weights: torch.Tensor | None, geometry: str, filter_name: str) -> torch.Tensor:
    return _on_backend(x, GEOMETRIES[geometry], "fbp", view_weights, filter_name)


@torch.library.custom_op("torch_radon::fbp", mutates_args=())
def _fbp(x: torch.Tensor, view_weights: torch.Tensor | None, geometry: str, filter_name: str) -> torch.Tensor:
    """backprojection(filter(forward(x))) of (B, H, W); precision as in `_apply`, no gradient."""
    return _compute_fbp(x, view_weights, geometry, filter_name)


@_fbp.register_fake
def _(x, view_weights, geometry, filter_name):
    return x.new_empty(x.shape, dtype=x.dtype if x.dtype == torch.float64 else torch.float32)


def _values_only(x: torch.Tensor) -> bool:
    """Whether nothing but values is asked of a call: no gradient, no tracing, no transform. Then kernels are called as
    they are; PyTorch's way through operators takes longer than a small projection.
    """
    return (not torch.compiler.is_compiling() and type(x) is torch.Tensor
            and not (x.requires_grad and torch.is_grad_enabled()) and torch._C._len_torch_dispatch_stack() == 0
            and not torch._C._are_functorch_transforms_active() and torch.autograd.forward_ad._current_level < 0
            and not torch.jit.is_tracing())


@torch.compiler.assume_constant_result  # compiled code is guarded by the level that this reads
def _forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _checked(x, trailing: tuple[int | str, int | str], what: str) -> torch.Tensor:
    """x, whose last dimensions must be `trailing`; a name there stands for any size."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{what} is a {type(x).__name__}; expected a torch tensor (torch.from_numpy makes one)")
    if x.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TypeError(f"{what} has dtype {x.dtype}; expected float16, float32 or float64 (call .float() on it)")
    sizes = x.shape[-2:]
    if len(sizes) < 2 or x.numel() == 0 or any(size != n for size, n in zip(sizes, trailing, strict=True)
                                               if not isinstance(n, str)):
        raise ValueError(f"{what} has shape {tuple(x.shape)}; expected (..., {trailing[0]}, {trailing[1]}), not empty")
    return x


def _batch(x: torch.Tensor) -> torch.Tensor:
    """(..., m, n) as (B, m, n)."""
    return x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, m, n) with the leading dimensions and the precision of x."""
    y = y if x.ndim == 3 else y.reshape(*x.shape[:-2], *y.shape[-2:])
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _linear(kernel: str, x: torch.Tensor, key: str, filter_name: str = "") -> torch.Tensor:
    """Apply a kernel over the last two dimensions; half precision is computed in float32."""
    if _values_only(x):
        return _like(_compute(_batch(x), key, kernel, filter_name), x)
    function = _apply if torch.compiler.is_compiling() and not _forward_mode() else _map
    return _like(function(_batch(x), key, kernel, filter_name), x)


def _degrade(x: torch.Tensor, view_weights: torch.Tensor | None, key: str, filter_name: str) -> torch.Tensor:
    """FBP of the projection over the last two dimensions, without a gradient."""
    if _values_only(x):
        return _like(_compute_fbp(_batch(x), view_weights, key, filter_name), x)
    with torch.no_grad():
        return _like(_fbp(_batch(x.detach()), view_weights, key, filter_name), x)


def _view_weights(view_weights, imgs: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """On the images' device, in the precision of the calculation; ValueError where they are not of this shape."""
    if view_weights is None:
        return None
    weights = torch.as_tensor(view_weights, dtype=torch.float64 if imgs.dtype == torch.float64 else torch.float32)
    if isinstance(view_weights, torch.Tensor) and view_weights.device != imgs.device:
        raise ValueError(f"view_weights is on {view_weights.device} and the image on {imgs.device}; expected one "
                         "device")
    if weights.shape != shape:
        raise ValueError(f"view_weights has shape {tuple(weights.shape)}; expected one a view: {shape}")
    return weights.detach().to(imgs.device).contiguous()


def apply_linear(kernel: str, x: torch.Tensor, geometry: Geometry, negated_angles: torch.Tensor) -> torch.Tensor:
    """"forward" of images or "backproject" of sinograms under these angles, in the sign of an operator's `angles`."""
    geometry = replace(geometry, angles=_angles(-negated_angles))
    size = geometry.height, geometry.width
    trailing, what = (size, "the image") if kernel == "forward" else (
        (geometry.n_angles, geometry.det_count), "the sinogram")
    return _linear(kernel, _checked(x, trailing, what), _register(geometry))


class BaseRadon:
    """What `Radon` and `RadonFanbeam` share: the maps between images (..., H, W) and sinograms (..., views, bins).

    angles: radians; rays_cfg: a `Geometry`, whose own angles are replaced. Every call reads `angles`, which are the
    negated ones, as upstream keeps them: assigning to them, or changing them in place, changes the scan.
    """

    tex_cache = None  # upstream's cache of CUDA textures; there are none here
    fourier_filters = FourierFilters()

    def __init__(self, angles, rays_cfg: Geometry):
        angles = _angles(angles)
        with torch.inference_mode(False):
            negated = torch.from_numpy(-np.array(angles, np.float32))  # of values even among fake tensors
        self._keep(replace(rays_cfg, angles=angles), negated)
        self.resolution = (rays_cfg.height if rays_cfg.height == rays_cfg.width
                           else (rays_cfg.height, rays_cfg.width))
        self.det_count = rays_cfg.det_count
        self.det_spacing = rays_cfg.det_spacing
        self.clip_to_circle = rays_cfg.clip_to_circle
        self.noise_generator = noise.NoiseGenerator()

    def __setstate__(self, state):
        self.__dict__.update(state)
        _register(self._geometry)  # another process has a table of its own

    @property
    def angles(self) -> torch.Tensor:
        """The angles, negated, (views,) float32."""
        return self._angles

    @angles.setter
    def angles(self, negated):
        negated = torch.as_tensor(negated, dtype=torch.float32).detach()
        if negated.is_inference():  # counts no changes in place
            with torch.inference_mode(False):
                negated = negated.clone()
        self._keep(replace(self._geometry, angles=_angles(-negated)), negated)

    def _keep(self, geometry: Geometry, negated: torch.Tensor):
        self._geometry, self._angles, self._version = geometry, negated, negated._version
        self._registered = _register(geometry)

    @property
    def geometry(self) -> Geometry:
        """What is measured, under the angles as they are now."""
        if not torch.compiler.is_compiling() and self._version != self._angles._version:
            self.angles = self._angles
        return self._geometry

    rays_cfg = geometry

    @property
    def _key(self) -> str:
        _ = self.geometry  # registers the angles as they are now
        return self._registered

    @property
    def _image_shape(self):
        return self._geometry.height, self._geometry.width

    @property
    def _sinogram_shape(self):
        return self.geometry.n_angles, self._geometry.det_count

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """Projection of images (..., H, W) -> (..., views, bins). README, "Equations"."""
        return _linear("forward", _checked(imgs, self._image_shape, "the image"), self._key)

    def backprojection(self, sinogram: torch.Tensor) -> torch.Tensor:
        """Backprojection of (..., views, bins) -> (..., H, W): interpolated, not the transpose of `forward`."""
        return _linear("backproject", _checked(sinogram, self._sinogram_shape, "the sinogram"), self._key)

    def backward(self, sinogram: torch.Tensor) -> torch.Tensor:
        """`backprojection`."""
        return self.backprojection(sinogram)

    def transpose(self, sinogram: torch.Tensor) -> torch.Tensor:
        """The exact transpose of `forward`: (..., views, bins) -> (..., H, W). For least squares."""
        return _linear("forward_transpose", _checked(sinogram, self._sinogram_shape, "the sinogram"), self._key)

    def filter_sinogram(self, sinogram: torch.Tensor, filter_name: str = "ramp") -> torch.Tensor:
        """Filter every row of (..., views, bins) and weight it by pi/(2 views), however many views and bins there are.

        The name is taken in any case; an unknown one raises ValueError. With weights="fdk" the rows are multiplied by
        the fan beam's cosine weight first.
        """
        _checked(sinogram, ("views", "bins"), "the sinogram")
        views, bins = sinogram.shape[-2:]
        key = self._key
        if (views, bins) != self._sinogram_shape:
            key = _register(replace(self.geometry, angles=(0.0,) * views, det_count=bins))
        return _linear("filter", sinogram, key, filter_named(filter_name))

    def degrade(self, imgs: torch.Tensor, view_weights=None, filter_name: str = "ramp") -> torch.Tensor:
        """backprojection(filter(forward(imgs))) in one call, (..., H, W) -> (..., H, W), without a gradient.

        view_weights: the factor of each view, pi/(2 views) for all if None. float16 is computed in float32.
        """
        _checked(imgs, self._image_shape, "the image")
        weights = _view_weights(view_weights, imgs, self._sinogram_shape[:1])
        return _degrade(imgs, weights, self._key, filter_named(filter_name))

    def set_seed(self, seed: int = -1):
        """Start the random numbers of this operator anew; a negative seed takes NumPy's (np.random.seed)."""
        self.noise_generator.set_seed(seed)

    def add_noise(self, x: torch.Tensor, signal: float, density_normalization: float = 1.0, approximate: bool = False):
        """Photon noise on the sinogram x, in place, and x. `signal`: the natural logarithm of the photons a ray."""
        return noise.add_noise(x, signal, density_normalization, approximate, self.noise_generator.on(x.device))

    def emulate_readings(self, x: torch.Tensor, signal: float, density_normalization: float = 1.0) -> torch.Tensor:
        """Photon counts of the sinogram x, int32: Poisson(exp(signal - x/density_normalization))."""
        return readings.emulate_readings(x, signal, density_normalization, self.noise_generator)

    def emulate_readings_new(self, x: torch.Tensor, signal: float, normal_std: float, k: int, bins: int):
        """Readings 0 .. bins - 1 of the sinogram x, int32: counts and electronic noise, in steps of k."""
        return readings.emulate_readings_new(x, signal, normal_std, k, bins, self.noise_generator)

    def readings_lookup(self, sensor_readings: torch.Tensor, lookup_table: torch.Tensor) -> torch.Tensor:
        """lookup_table[reading], table (bins,)."""
        return readings.readings_lookup(sensor_readings, lookup_table)


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
    if geometry.clip_to_circle or geometry.source_inside:
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


class Radon(BaseRadon):
    """Parallel-beam projector of `resolution` x `resolution` pixels (or (height, width)).

    angles: radians, list, array or tensor; det_count: bins, the resolution if negative; det_spacing: pixels;
    clip_to_circle: project only the disc of diameter det_count; det_offset: pixels, a shift of the detector.
    """

    def __init__(self, resolution, angles, det_count=-1, det_spacing=1.0, clip_to_circle=False, *, det_offset=0.0):
        height, width = _size(resolution)
        _positive(det_spacing=det_spacing)
        _finite(det_offset=det_offset)
        super().__init__(angles, Geometry(height, width, (), _bins(det_count, height, width), float(det_spacing),
                                          det_offset=float(det_offset), clip_to_circle=bool(clip_to_circle)))
        _warn_if_truncated(self.geometry, corners=det_count > 0)


class RadonFanbeam(BaseRadon):
    """Fan-beam projector with a flat detector; lengths in pixels, measured from the rotation centre.

    Defaults are upstream's: det_count = resolution; det_distance = source_distance, which also makes det_spacing 2
    whatever was passed (a warning says so); det_spacing alone not given = (S + D)/S. `weights="fdk"` are the true
    fan-beam weights, `"published"` torch-radon's. A source inside the image gets a warning: its rays go on behind it.
    """

    def __init__(self, resolution, angles, source_distance, det_distance=-1, det_count=-1, det_spacing=-1,
                 clip_to_circle=False, *, det_offset=0.0, weights="published"):
        height, width = _size(resolution)
        _positive(source_distance=source_distance)
        _finite(det_distance=det_distance, det_spacing=det_spacing, det_offset=det_offset)
        if weights not in ("published", "fdk"):
            raise ValueError(f"weights is {weights!r}; expected 'published' or 'fdk'")
        if det_distance < 0:
            det_distance = source_distance
            if det_spacing > 0 and det_spacing != 2.0:
                warnings.warn(f"det_spacing {det_spacing} is replaced by 2.0 because det_distance is not given "
                              "(torch-radon's rule); pass det_distance to keep it", stacklevel=2)
            det_spacing = 2.0
        elif det_spacing < 0:
            det_spacing = (source_distance + det_distance) / source_distance
        _positive(det_spacing=det_spacing)
        super().__init__(angles, Geometry(height, width, (), _bins(det_count, height, width), float(det_spacing),
                                          float(source_distance), float(det_distance), float(det_offset),
                                          bool(clip_to_circle), weights))
        self.source_distance = self.geometry.source_distance
        self.det_distance = self.geometry.det_distance
        if self.geometry.source_inside:
            warnings.warn(f"source_distance is {source_distance} pixels, inside the image, whose corner lies "
                          f"{math.hypot(height, width) / 2:.1f} from the centre: rays go on behind the source, and the "
                          "slow backend serves. Lengths are in pixels: divide mm by the pixel size", stacklevel=2)
        _warn_if_truncated(self.geometry, corners=det_count > 0)
