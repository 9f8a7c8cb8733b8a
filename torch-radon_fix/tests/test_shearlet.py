"""The shearlet transform: its arithmetic with a small frame of the test's own, and with alpha-transform where it is."""

import os
import sys
import types

import numpy as np
import pytest
import torch
from equations import random_images
from torch_radon import Radon
from torch_radon.shearlet import ShearletTransform


class TwoBands:
    """A Parseval frame with alpha-transform's interface: frequency 0 in the middle, its axis y pointing up."""

    def __init__(self, width, height, alphas, real, parseval, verbose):
        y, x = np.meshgrid(np.arange(height) - height // 2, np.arange(width) - width // 2, indexing="ij")
        low, side = np.exp(-(x**2 + y**2) / 50), 0.5 + np.arctan(x * y / 20) / np.pi
        self.spectrograms = list(np.sqrt(np.stack([low, (1 - low) * side, (1 - low) * (1 - side)]))[:, ::-1])
        self.indices = [-1, (0, 0, "h"), (1, 0, "v")]


@pytest.fixture
def two_bands(monkeypatch):
    monkeypatch.setitem(sys.modules, "alpha_transform", types.SimpleNamespace(AlphaShearletTransform=TwoBands))


def test_an_import_that_is_never_used_stops_no_program(monkeypatch):
    monkeypatch.setitem(sys.modules, "alpha_transform", None)
    monkeypatch.delitem(sys.modules, "torch_radon.shearlet")
    from torch_radon.shearlet import ShearletTransform  # as public programs begin

    with pytest.raises(ImportError, match=r'cannot be imported .* pip install "torch-radon\[shearlet\]"'):
        ShearletTransform(16, 16, [0.5])
    assert Radon(16, [0.0]).forward(random_images(1, 16)).shape == (1, 1, 16)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 32), (32, 45), (31, 33)])
def test_coefficients_and_reconstruction(two_bands, height, width):
    transform = ShearletTransform(width, height, [0.5] * 2)
    assert transform.scales.tolist() == [0, 0, 1] and transform.scales.dtype == torch.float32
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    coefficients = transform.forward(x)
    assert coefficients.shape == (2, 3, 3, height, width)
    spectra = np.stack(TwoBands(width, height, None, True, True, False).spectrograms)[:, ::-1]  # y down
    plain = np.fft.ifft2(np.fft.ifftshift(np.fft.fftshift(np.fft.fft2(x.double().numpy()), (-2, -1))[:, :, None]
                                          * spectra, (-2, -1)))
    if height % 2 and width % 2:  # else the highest frequencies are shared between both signs
        assert np.abs(coefficients.numpy() - plain.real).max() <= 2e-6
    assert (transform.backward(coefficients) - x).norm() <= 1e-6 * x.norm()
    c = torch.rand_like(coefficients)
    assert (c * coefficients).sum().item() == pytest.approx((transform.backward(c) * x).sum().item(), rel=1e-4)


def test_dtypes_gradient_and_border(two_bands):
    transform, x = ShearletTransform(16, 16, [0.5]), random_images(2, 16)
    assert (transform.backward(transform.forward(x.double())) - x.double()).abs().max() <= 1e-14
    half = transform.forward(x.half())
    assert half.dtype == torch.float16 and (transform.backward(half) - x).abs().max() <= 2e-3
    assert transform.forward(x[0]).shape == (3, 16, 16)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(transform.forward(x).square().sum() / 2, x)
    torch.testing.assert_close(gradient, x.detach())
    with pytest.raises(ValueError, match=r"the shape is \(2, 16, 15\); expected \(..., 16, 16\)"):
        transform.forward(x[..., :15])


def test_filters_are_kept_in_the_cache(two_bands, tmp_path, monkeypatch):
    first = ShearletTransform(20, 16, [0.5], cache=tmp_path / "kept")
    monkeypatch.setitem(sys.modules, "alpha_transform", None)
    second = ShearletTransform(20, 16, [0.5], cache=str(tmp_path / "kept"))
    assert torch.equal(first.shearlets, second.shearlets) and torch.equal(first.scales, second.scales)
    assert len(os.listdir(tmp_path / "kept")) == 1
    with pytest.raises(ImportError):
        ShearletTransform(20, 16, [1.0], cache=tmp_path / "kept")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (81, 65)])
def test_alpha_transform(height, width):
    alpha = pytest.importorskip("alpha_transform", reason="the extra torch-radon[shearlet] is not installed")
    transform, x = ShearletTransform(width, height, [0.5] * 2), torch.rand(2, height, width)
    coefficients = transform.forward(x)
    assert (transform.backward(coefficients) - x).norm() <= 1e-4 * x.norm()
    system = alpha.AlphaShearletTransform(width, height, [0.5] * 2, real=True, parseval=True, verbose=False)
    expected = np.array(system.transform(x[0].double().numpy(), do_norm=False)).real
    assert np.abs(coefficients[0].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    assert len(transform.scales) == coefficients.shape[1] == len(system.indices)
