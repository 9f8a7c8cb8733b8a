"""Photon noise on sinograms: torch-radon's `add_noise`, and `transmission_noise` in physical units."""

import math

import numpy as np
import torch

LARGEST_SIGNAL = 40.0  # exp(40) photons: beyond any detector, and what a count passed for its logarithm exceeds


class NoiseGenerator:
    """The random numbers of one projector: a generator a device, made when first needed, all from one seed."""

    def __init__(self, seed: int = -1):
        self.set_seed(seed)

    def set_seed(self, seed: int = -1):
        """Start anew from `seed`; a negative one takes NumPy's (np.random.seed)."""
        self.seed = int(seed) if seed >= 0 else int(np.random.get_state()[1][0])
        self._generators = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def __getstate__(self):
        """The seed alone: a copy in another process starts anew from it."""
        return {"seed": self.seed, "_generators": {}}


def check_sinogram(sinogram, **positive):
    """Raises TypeError unless the sinogram is a floating-point tensor, ValueError unless the numbers are positive."""
    if not isinstance(sinogram, torch.Tensor) or not sinogram.is_floating_point():
        kind = sinogram.dtype if isinstance(sinogram, torch.Tensor) else type(sinogram).__name__
        raise TypeError(f"the sinogram is a {kind}; expected a torch tensor of floating-point numbers")
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; expected a positive number")


def check_signal(signal: float):
    """Raises ValueError unless `signal` can be the logarithm of a photon count."""
    if not (math.isfinite(signal) and signal <= LARGEST_SIGNAL):
        raise ValueError(f"signal is {signal!r}; expected the natural logarithm of the photons a ray, at most "
                         f"{LARGEST_SIGNAL:g} (math.log(1e5) is 11.5)")


def _normal(like: torch.Tensor, generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)


@torch.no_grad()
def add_noise(x: torch.Tensor, signal: float, density_normalization: float, approximate: bool,
              generator: torch.Generator) -> torch.Tensor:
    """Overwrite the sinogram x, any shape, with what a noisy scan would measure of it, and return it. No gradient.

    N ~ Poisson(exp(signal - x/density_normalization)), x' = max(signal - log(max(N, 1)), 0) density_normalization:
    `signal` is the natural logarithm of the photons a ray. approximate=True draws N from the normal distribution of
    that mean and variance. Source: torch-radon v1.
    """
    check_sinogram(x, density_normalization=density_normalization)
    check_signal(signal)
    expected = torch.exp(signal - x.to(torch.promote_types(x.dtype, torch.float32)) / density_normalization)
    if approximate:
        counts = expected + expected.sqrt() * _normal(expected, generator)
    else:
        counts = torch.poisson(expected, generator)
    return x.copy_((signal - torch.log(counts.clamp_min(1))).clamp_min(0) * density_normalization)


@torch.no_grad()
def transmission_noise(sinogram: torch.Tensor, I0: float, pixel_cm: float, electronic_sigma: float = 0.0,
                       generator: torch.Generator | None = None) -> torch.Tensor:
    """A noisy copy of a sinogram in 1/cm x pixels, any shape, as a scanner with I0 photons a ray would measure it.

    Counts are Poisson(I0 exp(-p pixel_cm)) plus a normal of standard deviation electronic_sigma (counts), floored at
    1; the result is -log(counts/I0)/pixel_cm. generator: of the sinogram's device, PyTorch's own if None. No gradient.
    """
    check_sinogram(sinogram, I0=I0, pixel_cm=pixel_cm)
    if not (math.isfinite(electronic_sigma) and electronic_sigma >= 0):
        raise ValueError(f"electronic_sigma is {electronic_sigma!r}; expected counts, zero or more")
    if generator is not None and generator.device.type != sinogram.device.type:
        raise ValueError(f"generator lives on {generator.device} but the sinogram on {sinogram.device}; "
                         "expected one device (torch.Generator(sinogram.device))")
    counts = torch.poisson(I0 * torch.exp(-sinogram.float() * pixel_cm), generator)
    if electronic_sigma > 0:
        counts += electronic_sigma * _normal(counts, generator)
    return (-torch.log(counts.clamp_min(1) / I0) / pixel_cm).to(sinogram.dtype)
