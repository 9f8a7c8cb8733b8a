"""Photon noise: moments, floor, units, reproducibility, borders."""

import numpy as np
import pytest
import torch
from torch_radon import Radon, add_noise, set_seed, transmission_noise


def moments(y, signal, density):
    """Mean and variance of the counts behind a noisy sinogram."""
    counts = signal * torch.exp(-y.double() * density)
    return counts.mean().item(), counts.var().item()


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_counts_have_poisson_moments(approximate, density):
    set_seed(1)
    mean, variance = moments(add_noise(torch.full((400, 500), 2.0), 1e4, density, approximate), 1e4, density)
    expected = 1e4 * np.exp(-2 * density)
    assert mean == pytest.approx(expected, rel=1e-3)
    assert variance == pytest.approx(expected, rel=0.02)


def test_poisson_counts_are_whole_and_normal_ones_are_not():
    for approximate in (False, True):
        counts = 100 * torch.exp(-add_noise(torch.ones(1000), 100.0, approximate=approximate).double())
        assert bool(((counts - counts.round()).abs() < 1e-3).all()) is not approximate


def test_no_photon_counts_as_one():
    y = add_noise(torch.full((3, 10), 50.0), 1e3)
    torch.testing.assert_close(y, torch.full((3, 10), float(np.log(1e3))))


def test_add_noise_is_upstreams():
    """A method of the projector too; in place; `set_seed` repeats it."""
    radon = Radon(16, [0.0, 1.0])
    radon.set_seed(5)
    x = torch.rand(2, 2, 16)
    first = x.clone()
    assert radon.add_noise(first, 1e3) is first
    second = add_noise(x.clone(), 1e3)
    set_seed(5)
    assert torch.equal(add_noise(x.clone(), 1e3), first) and not torch.equal(second, first)
    np.random.seed(7)
    set_seed()
    third = add_noise(x.clone(), 1e3)
    np.random.seed(7)
    set_seed(-1)
    assert torch.equal(add_noise(x.clone(), 1e3), third)


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
    (lambda x: add_noise(x, 0), ValueError, "signal is 0; expected a positive number"),
    (lambda x: add_noise(x, 10, float("nan")), ValueError, "density_normalization is nan"),
    (lambda x: add_noise(x.numpy(), 10), TypeError, "sinogram is a ndarray; expected a torch tensor"),
    (lambda x: transmission_noise(x.int(), 10, 1.0), TypeError, "sinogram is a torch.int32"),
    (lambda x: transmission_noise(x, -5, 1.0), ValueError, "I0 is -5"),
    (lambda x: transmission_noise(x, 10, 0.0), ValueError, "pixel_cm is 0.0"),
    (lambda x: transmission_noise(x, 10, 1.0, -1.0), ValueError, "electronic_sigma is -1.0"),
])
def test_bad_input_gets_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.ones(3, 4))
