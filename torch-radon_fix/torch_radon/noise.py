"""Photon noise on sinograms: torch-radon's `add_noise` and `set_seed`, and `transmission_noise` in physical units."""

import math

import numpy as np
import torch

_generators: dict[torch.device, torch.Generator] = {}
_seed = -1


def set_seed(seed: int = -1):
    """Start `add_noise`'s random numbers anew from `seed`; a negative one takes NumPy's (np.random.seed)."""
    global _seed
    _seed = int(seed)
    _generators.clear()


def _generator(device: torch.device) -> torch.Generator:
    if device not in _generators:
        seed = _seed if _seed >= 0 else int(np.random.get_state()[1][0])
        _generators[device] = torch.Generator(device).manual_seed(seed)
    return _generators[device]


def _checked(sinogram, **positive):
    if not isinstance(sinogram, torch.Tensor) or not sinogram.is_floating_point():
        kind = sinogram.dtype if isinstance(sinogram, torch.Tensor) else type(sinogram).__name__
        raise TypeError(f"the sinogram is a {kind}; expected a torch tensor of floating-point numbers")
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; expected a positive number")


def _normal(like: torch.Tensor, generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)


@torch.no_grad()
def add_noise(x: torch.Tensor, signal: float, density_normalization: float = 1.0, approximate: bool = False):
    """Overwrite the sinogram x with what `signal` photons a ray would measure of it, and return it.

    x = -log(max(N, 1)/signal)/density_normalization with N ~ Poisson(signal exp(-x density_normalization));
    approximate=True draws N from the normal distribution of that mean and variance. Any shape; no gradient.
    `set_seed` makes it reproducible.
    """
    _checked(x, signal=signal, density_normalization=density_normalization)
    expected = signal * torch.exp(-x.float() * density_normalization)
    generator = _generator(x.device)
    if approximate:
        counts = expected + expected.sqrt() * _normal(expected, generator)
    else:
        counts = torch.poisson(expected, generator)
    return x.copy_(-torch.log(counts.clamp_min(1) / signal) / density_normalization)


@torch.no_grad()
def transmission_noise(sinogram: torch.Tensor, I0: float, pixel_cm: float, electronic_sigma: float = 0.0,
                       generator: torch.Generator | None = None) -> torch.Tensor:
    """A noisy copy of a sinogram in 1/cm x pixels, any shape, as a scanner with I0 photons a ray would measure it.

    Counts are Poisson(I0 exp(-p pixel_cm)) plus a normal of standard deviation electronic_sigma (counts), floored at
    1; the result is -log(counts/I0)/pixel_cm. generator: of the sinogram's device, PyTorch's own if None. No gradient.
    """
    _checked(sinogram, I0=I0, pixel_cm=pixel_cm)
    if not (math.isfinite(electronic_sigma) and electronic_sigma >= 0):
        raise ValueError(f"electronic_sigma is {electronic_sigma!r}; expected counts, zero or more")
    if generator is not None and generator.device.type != sinogram.device.type:
        raise ValueError(f"generator lives on {generator.device} but the sinogram on {sinogram.device}; "
                         "expected one device (torch.Generator(sinogram.device))")
    counts = torch.poisson(I0 * torch.exp(-sinogram.float() * pixel_cm), generator)
    if electronic_sigma > 0:
        counts += electronic_sigma * _normal(counts, generator)
    return (-torch.log(counts.clamp_min(1) / I0) / pixel_cm).to(sinogram.dtype)
