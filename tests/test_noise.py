"""Photon noise in physical units: moments, floor, reproducibility, borders."""

import numpy as np
import pytest
import torch
from torch_radon import transmission_noise


def moments(y, I0, pixel_cm):
    """Mean and variance of the counts behind a noisy sinogram."""
    counts = I0 * torch.exp(-y.double() * pixel_cm)
    return counts.mean().item(), counts.var().item()


def test_transmission_noise_is_in_physical_units():
    p, pixel_cm, I0 = 20.0, 0.14, 1e5  # 20 pixels of 1/cm are a line integral of 2.8
    generator = torch.Generator().manual_seed(3)
    clean = torch.full((300, 500), p)
    y = transmission_noise(clean, I0, pixel_cm, generator=generator)
    assert y.mean().item() == pytest.approx(p, rel=1e-4)
    assert y.std().item() == pytest.approx((I0 * np.exp(-p * pixel_cm)) ** -0.5 / pixel_cm, rel=0.01)
    mean, variance = moments(transmission_noise(clean, I0, pixel_cm, 50.0, generator), I0, pixel_cm)
    assert mean == pytest.approx(I0 * np.exp(-p * pixel_cm), rel=1e-3)
    assert variance == pytest.approx(I0 * np.exp(-p * pixel_cm) + 50**2, rel=0.02)
    assert (clean == p).all(), "the sinogram given is left alone"


def test_transmission_noise_is_reproducible_by_generator():
    p = torch.rand(2, 3, 8, dtype=torch.float64)
    first, second, third = (transmission_noise(p, 1e4, 0.1, 5.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third) and first.dtype == torch.float64
    dark = transmission_noise(torch.full((4,), 1e3), 1e4, 1.0, electronic_sigma=10.0)
    assert (dark <= np.log(1e4) + 1e-5).all() and torch.isfinite(dark).all()


@pytest.mark.parametrize(("call", "error", "sentence"), [
    (lambda x: transmission_noise(x.int(), 10, 1.0), TypeError, "sinogram is a torch.int32"),
    (lambda x: transmission_noise(x, -5, 1.0), ValueError, "I0 is -5"),
    (lambda x: transmission_noise(x, 10, 0.0), ValueError, "pixel_cm is 0.0"),
    (lambda x: transmission_noise(x, 10, 1.0, -1.0), ValueError, "electronic_sigma is -1.0"),
])
def test_bad_input_gets_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.ones(3, 4))
