"""Code as upstream's users and tests write it, against the equations: projection, filter, backprojection, derivatives.

Random images; many angle sets, spacings, distances, detector counts, clipping, batch sizes and precisions.
"""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from equations import backproject, check, filtered, random_images, relative
from torch_radon import Radon, RadonBackprojection, RadonFanbeam, RadonForward

pytestmark = pytest.mark.filterwarnings("ignore:det_count:UserWarning")  # detectors smaller than the image are meant

ANGLES = {
    "half": np.linspace(0, np.pi, 20, endpoint=False),
    "full": np.linspace(0, 2 * np.pi, 24, endpoint=False),
    "limited": np.linspace(-0.5, 1.1, 13),
    "random": np.random.default_rng(1).uniform(-4, 9, 11),
    "one": np.array([0.7]),
}


@pytest.mark.parametrize(("n", "kind"), list(product((128, 151), ANGLES)))
def test_parallel_angles(n, kind):
    check(Radon(n, ANGLES[kind]), n, ANGLES[kind], 2)


@pytest.mark.parametrize(("n", "spacing", "count", "clip"),
                         [(128, 1.0, 182, False), (128, 2.0, 64, False), (128, 0.7, 300, False), (151, 1.3, 151, True),
                          (128, 1.0, 128, True), (151, 0.5, 100, True), (64, 1.0, 128, True)])
def test_parallel_detectors(n, spacing, count, clip):
    angles = ANGLES["full"] + 0.1
    check(Radon(n, angles, count, spacing, clip), n, angles, 3)


@pytest.mark.parametrize(("n", "kind"), list(product((128, 151), ANGLES)))
def test_fan_beam_angles(n, kind):
    angles = ANGLES[kind]
    radon = RadonFanbeam(n, angles, 2.0 * n, 1.5 * n)
    assert radon.det_spacing == pytest.approx(1.75)
    check(radon, n, angles, 2, (2.0 * n, 1.5 * n))


@pytest.mark.parametrize(("n", "source", "far", "spacing", "count", "clip"),
                         [(128, 128, 128, 2.0, 182, False), (128, 500, 10, 1.0, 128, False),
                          (151, 151, 300, 3.3, 200, False), (128, 1075, 1075, 2.0, 336, False),
                          (128, 200, 0, 1.0, 190, False), (151, 300, 200, 1.0, 100, False),
                          (128, 256, 256, 2.0, 128, True), (151, 400, 100, 1.5, 120, True)])
def test_fan_beam_detectors(n, source, far, spacing, count, clip):
    angles = ANGLES["full"]
    check(RadonFanbeam(n, angles, source, far, count, spacing, clip), n, angles, 3, (source, far))


def test_fan_beam_default_distance():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        radon = RadonFanbeam(128, ANGLES["half"], source_distance=400)
    check(radon, 128, ANGLES["half"], 1, (400, 400))


@pytest.mark.parametrize("batch", [1, 4, 5, 9, 16])
def test_batch_sizes(batch):
    angles = ANGLES["limited"]
    check(Radon(64, torch.FloatTensor(angles), det_count=96), 64, angles, batch)
    check(RadonFanbeam(64, angles, 150, 150, det_spacing=1.8), 64, angles, batch, (150, 150))


@pytest.mark.parametrize(("n", "batch"), [(128, 8), (151, 3)])
def test_half_precision(n, batch):
    angles = ANGLES["random"]
    check(Radon(n, angles), n, angles, batch, half=True)
    check(RadonFanbeam(n, angles, 300, 300), n, angles, batch, (300, 300), half=True)


def test_channels_and_gradient_as_in_upstreams_examples():
    angles = np.linspace(0, np.pi, 30, endpoint=False)
    radon, x = Radon(64, angles), random_images(6, 64).view(3, 2, 64, 64).requires_grad_()
    sinogram = radon.forward(x)
    reconstruction = radon.backward(radon.filter_sinogram(sinogram))
    assert sinogram.size() == (3, 2, 30, 64) and reconstruction.size() == x.size()
    torch.nn.functional.mse_loss(reconstruction, x.detach()).backward()
    assert x.grad.size() == x.size() and x.grad.norm() > 0


# The scan changes

def test_angles_take_effect_when_assigned_or_changed_in_place():
    """The attribute holds the negated angles, as upstream's does."""
    radon = Radon(64, ANGLES["half"])
    radon.angles = radon.angles + 0.1
    check(radon, 64, -radon.angles.numpy(), 2)
    radon.angles += 0.1
    check(radon, 64, -radon.angles.numpy(), 2)
    radon.angles[3] = -2.0
    check(radon, 64, -radon.angles.numpy(), 2)
    assert radon.geometry.angles == radon.rays_cfg.angles == tuple((-radon.angles).tolist())
    radon.angles = [0.3, -0.4]
    check(radon, 64, np.array([-0.3, 0.4]), 2)
    x = random_images(1, 64)
    assert relative(radon.degrade(x), radon.backprojection(radon.filter_sinogram(radon.forward(x))).numpy()) <= 2e-5
    with pytest.raises(ValueError, match="angles holds NaN"):
        radon.angles = torch.tensor([float("nan")])


def test_angles_of_a_parameter_and_in_inference_mode():
    angles = torch.nn.Parameter(torch.linspace(0, 3, 7))
    radon = RadonFanbeam(32, angles, 80, 80)
    radon.angles = angles
    with torch.no_grad():
        angles += 0.2
    check(radon, 32, -angles.detach().numpy(), 1, (80, 80))
    with torch.inference_mode():
        radon = RadonFanbeam(32, [0.1, 0.2], 80, 80)
        radon.angles = torch.tensor([0.5])
        check(radon, 32, [-0.5], 1, (80, 80))
        radon.angles += 0.25
        check(radon, 32, [-0.75], 1, (80, 80))


def test_backward_is_the_overridden_backprojection():
    class Normalised(Radon):
        def backprojection(self, sinogram):
            return super().backprojection(sinogram) / 10

    radon, sinogram = Normalised(64, ANGLES["half"]), torch.rand(1, 20, 64)
    expected = backproject(sinogram.double().numpy(), 64, ANGLES["half"], 1.0) / 10
    assert relative(radon.backward(sinogram), expected) <= 2e-5


@pytest.mark.parametrize(("n", "source", "far", "spacing", "count", "clip"), [
    (64, 20, 50, 1.5, 120, False),    # some pixels behind the source
    (33, 10, 40, 1.0, 90, False),     # pixels at the source
    (33, 0.5, 40, 1.0, 90, False),    # half of the image
    (40, 27.9, 0, 1.0, 60, False),    # only its corners
    (64, 45, 45, 2.0, 64, True)])
def test_a_source_inside_the_image_computes(n, source, far, spacing, count, clip):
    angles = np.array([0, 0.3, np.pi / 2, 2.2, np.pi, 4.0])
    with pytest.warns(UserWarning, match="inside the image, whose corner lies"):
        radon = RadonFanbeam(n, angles, source, far, count, spacing, clip)
    check(radon, n, angles, 2, (source, far))
    check(radon, n, angles, 1, (source, far), half=True)
    x, p = random_images(2, n), torch.rand(2, 6, count)
    error = (radon.forward(x).double() * p).sum() - (x.double() * radon.transpose(p)).sum()
    assert abs(error) <= 1e-5 * p.norm() * radon.forward(x).norm()
    assert relative(radon.degrade(x), radon.backprojection(radon.filter_sinogram(radon.forward(x))).numpy()) <= 2e-5


def test_lengths_in_mm_passed_as_pixels_compute():
    with pytest.warns(UserWarning, match="source_distance is 500 pixels, .* 724.1 .* divide mm by the pixel size"):
        radon = RadonFanbeam(1024, np.linspace(0, 6, 2), source_distance=500, det_distance=1000, det_spacing=0.2)
    assert radon.det_count == 1024


# The filter

@pytest.mark.parametrize(("views", "bins"), [(15, 64), (60, 80), (1, 1), (60, 33)])
def test_filter_takes_any_sinogram(views, bins):
    radon, sinogram = Radon(64, np.linspace(0, np.pi, 60, endpoint=False)), torch.rand(2, views, bins)
    assert relative(radon.filter_sinogram(sinogram), filtered(sinogram.double().numpy())) <= 2e-5


@pytest.mark.parametrize("name", ["ramp", "Ram-Lak", "Shepp-Logan", "COSINE", "Hamming", "Hann"])
def test_fourier_filters_are_what_the_filter_multiplies_by(name):
    """A row is padded with zeros to max(64, 2^ceil(log2(2 bins))); names are taken in any case."""
    radon, sinogram = Radon(48, np.linspace(0, np.pi, 30, endpoint=False)), torch.rand(2, 30, 48)
    response = radon.fourier_filters.get(128, name, "cpu")
    assert response.shape == (1, 1, 128, 1) and response.dtype == torch.float32
    spectrum = np.fft.fft(sinogram.double().numpy(), 128) * response.double().numpy()[..., 0]
    expected = np.fft.ifft(spectrum).real[..., :48] * np.pi / 60
    found = radon.filter_sinogram(sinogram, name)
    assert relative(found, expected) <= 2e-5
    assert torch.equal(found, radon.filter_sinogram(sinogram, name.lower()))
    if name in ("ramp", "Ram-Lak"):
        assert relative(found, filtered(sinogram.double().numpy())) <= 2e-5
    with pytest.raises(ValueError, match="filter_name is 'Sharp'; expected one of ramp"):
        radon.fourier_filters.get(128, "Sharp", "cpu")


# Derivatives

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode_derivatives_are_the_maps_themselves(dtype):
    radon = RadonFanbeam(32, ANGLES["limited"], 80, 80)
    x, v, p = random_images(2, 32).to(dtype), random_images(2, 32).to(dtype) + 1, torch.rand(2, 13, 32, dtype=dtype)
    for function, at, tangent in ((radon.forward, x, v), (radon.backprojection, p, p + 1), (radon.transpose, p, p + 1),
                                  (lambda q: radon.filter_sinogram(q, "hann"), p, p + 1)):
        value, derivative = torch.func.jvp(function, (at,), (tangent,))
        assert torch.equal(value, function(at)) and torch.equal(derivative, function(tangent))
    assert torch.func.jvp(radon.forward, (x.half(),), (v.half(),))[1].dtype == torch.float16


def test_torch_func_of_the_projector():
    radon, x = Radon(12, [0.1, 1.0, 2.0]), random_images(1, 12)[0].double()
    columns = torch.func.jacfwd(radon.forward)(x).reshape(36, 144)
    rows = torch.func.jacrev(radon.forward)(x).reshape(36, 144)
    unit = torch.eye(144, dtype=torch.float64).view(144, 12, 12)
    torch.testing.assert_close(columns, radon.forward(unit).flatten(1).T)
    torch.testing.assert_close(rows, columns)
    gradient = torch.func.grad(lambda z: radon.forward(z).square().sum() / 2)(x)
    torch.testing.assert_close(gradient, radon.transpose(radon.forward(x)))
    batch = random_images(3, 12).double()
    assert torch.equal(torch.func.vmap(radon.forward)(batch), radon.forward(batch))
    assert torch.autograd.gradcheck(radon.forward, x.clone().requires_grad_(), check_forward_ad=True,
                                    check_batched_grad=True, check_batched_forward_grad=True)


def test_upstreams_autograd_functions():
    radon, x = RadonFanbeam(32, ANGLES["limited"], 80, 80), random_images(2, 32).requires_grad_()
    sinogram = RadonForward.apply(x, radon.angles, radon.tex_cache, radon.rays_cfg)
    assert torch.equal(sinogram, radon.forward(x))
    (gradient,) = torch.autograd.grad(sinogram.square().sum() / 2, x)
    assert torch.equal(gradient, radon.transpose(sinogram.detach()))
    other = RadonFanbeam(32, ANGLES["one"], 80, 80)
    back = RadonBackprojection.apply(sinogram[:, :1], other.angles, radon.tex_cache, radon.rays_cfg)
    assert torch.equal(back, other.backprojection(sinogram[:, :1]))
    with pytest.raises(ValueError, match=r"the sinogram has shape \(2, 13, 32\); expected \(..., 1, 32\)"):
        RadonBackprojection.apply(sinogram, other.angles, None, radon.rays_cfg)


def test_compiled_code_sees_assigned_angles_and_forward_mode():
    radon, x = Radon(16, [0.1, 1.0, 2.0]), random_images(1, 16)
    compiled = torch.compile(lambda z: radon.backward(radon.forward(z)), fullgraph=True, backend="aot_eager")
    before = compiled(x)
    assert torch.equal(before, radon.backward(radon.forward(x)))
    radon.angles = radon.angles + 0.5
    after = compiled(x)
    assert torch.equal(after, radon.backward(radon.forward(x))) and not torch.equal(before, after)
    tangent = torch.compile(lambda z, v: torch.func.jvp(radon.forward, (z,), (v,))[1], backend="aot_eager")
    assert torch.equal(tangent(x, x + 1), radon.forward(x + 1))
