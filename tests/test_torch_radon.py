"""The projector: reference values, identities, backends against each other, borders."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch_radon import Radon, RadonFanbeam, backend_cpu, backend_torch
from torch_radon.filtering import FILTERS

GOLDEN = {name: np.load(Path(__file__).parent / "golden" / f"{name}.npz") for name in ("fanbeam", "parallel", "more")}
BACKENDS = pytest.mark.parametrize("backend", [backend_cpu, backend_torch], ids=["cpu", "torch"])
TURN = 2 * np.pi


def relative(a, b):
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def golden(file, key):
    return torch.from_numpy(GOLDEN[file][key])


def cvg(views, **options):
    return RadonFanbeam(256, TURN * np.arange(views) / views, 1075, 1075, 672, 2.0, **options)


def quiet(kind, *arguments, **options):
    """An operator whose detector may be too small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(*arguments, **options)


def parallel(det_count, det_spacing=1.0, **options):
    return quiet(Radon, 128, GOLDEN["parallel"]["angles"], det_count, det_spacing, **options)


def fan(det_count, **options):
    return quiet(RadonFanbeam, 128, GOLDEN["parallel"]["fan_angles"], 160, 300, det_count, 1.7, **options)


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fbp(backend, radon, image):
    """FBP of the projection of (H, W) by a backend, (H, W)."""
    views = len(radon.angles)
    return backend.fbp(radon.geometry, image[None], torch.full((views,), math.pi / 2 / views), "ramp")[0]


# Reference values

@BACKENDS
def test_fan_beam_reference(backend):
    x0, radon = golden("fanbeam", "x0"), cvg(18)
    assert relative(backend.forward(radon.geometry, x0[None])[0], golden("fanbeam", "sino18")) <= 2e-5
    assert relative(radon.filter_sinogram(golden("fanbeam", "sino18")), golden("fanbeam", "filtered18")) <= 2e-5
    back = backend.backproject(radon.geometry, golden("fanbeam", "filtered18")[None])[0]
    assert relative(back, golden("fanbeam", "D18")) <= 2e-5
    for views in (18, 36, 54, 72, 288) if backend is backend_cpu else (18, 54):
        assert relative(fbp(backend, cvg(views), x0), golden("fanbeam", f"D{views}")) <= 2e-5, views
    assert relative(fbp(backend, cvg(72, weights="fdk"), x0), golden("more", "fdk_D72")) <= 2e-5


def test_full_view_reference():
    assert relative(cvg(720).degrade(golden("fanbeam", "slice_mu")), golden("fanbeam", "x0")) <= 2e-5
    assert relative(cvg(720, weights="fdk").degrade(golden("fanbeam", "x0")), golden("more", "fdk_D720")) <= 2e-5


@BACKENDS
@pytest.mark.parametrize(("radon", "file", "key"), [
    (parallel(190), "parallel", "parallel_sino"),
    (parallel(100, 1.3), "parallel", "parallel_sino_100x1.3"),
    (fan(150), "parallel", "fan_sino_S160_D300_nd150_du1.7"),
    (parallel(100, clip_to_circle=True), "more", "circle_parallel_sino_nd100_du1"),
    (fan(100, clip_to_circle=True), "more", "circle_fan_sino_S160_D300_nd100_du1.7"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_projection_reference(backend, radon, file, key):
    assert relative(backend.forward(radon.geometry, golden("parallel", "image")[None])[0], golden(file, key)) <= 2e-5


@BACKENDS
def test_backprojection_reference(backend):
    sinogram = golden("parallel", "fan_sino_S160_D300_nd150_du1.7")
    back = backend.backproject(fan(150).geometry, sinogram[None])[0]
    assert relative(back, golden("parallel", "fan_bp_S160_D300_nd150_du1.7")) <= 2e-5
    image = golden("parallel", "image")
    assert relative(fbp(backend, parallel(190), image), golden("parallel", "parallel_fbp")) <= 2e-5
    sinogram = backend.forward(parallel(100).geometry, image[None])
    back = backend.backproject(parallel(100, clip_to_circle=True).geometry, sinogram)[0]
    assert relative(back, golden("more", "circle_parallel_bp_nd100_du1")) <= 2e-5


@pytest.mark.parametrize("name", ["ram-lak", "shepp-logan", "cosine", "hamming", "hann"])
def test_filter_reference(name):
    sinogram, expected = golden("parallel", "parallel_sino"), golden("more", f"filter_{name}")
    assert relative(parallel(190).filter_sinogram(sinogram, name), expected) <= 2e-5
    assert relative(parallel(190).filter_sinogram(sinogram.double(), name), expected) <= 2e-5


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("weights", ["published", "fdk"])
def test_degrade_is_its_three_steps_for_every_filter(name, weights):
    radon = RadonFanbeam(48, TURN * np.arange(20) / 20, 200, 200, 130, 2.0, weights=weights)
    x = noise(2, 48, 48)
    steps = radon.backprojection(radon.filter_sinogram(radon.forward(x), name))
    assert relative(radon.degrade(x, filter_name=name), steps) <= 2e-5


# What must hold whatever the numbers

GEOMETRIES = {
    "fan": RadonFanbeam(64, TURN * np.arange(36) / 36, 269, 269, 168, 2.0),
    "fan-fdk-offset": RadonFanbeam((40, 56), np.linspace(0.1, 4, 17), 120, 90, 90, 1.7, det_offset=0.3, weights="fdk"),
    "parallel": Radon(65, TURN * np.arange(24) / 48, 93),
    "circle": quiet(Radon, 64, np.linspace(0, 3, 19), 50, 1.1, clip_to_circle=True),
}


@BACKENDS
@pytest.mark.parametrize("radon", GEOMETRIES.values(), ids=GEOMETRIES)
def test_transposes_are_exact(backend, radon):
    g = radon.geometry
    x = noise(3, g.height, g.width) - 0.5
    p = noise(3, len(g.angles), g.det_count, seed=1) - 0.5
    for kernel, a, b in (("forward", x, p), ("backproject", p, x)):
        there, back = getattr(backend, kernel)(g, a), getattr(backend, f"{kernel}_transpose")(g, b)
        error = (there.double() * b).sum() - (a.double() * back).sum()
        assert abs(error) <= 1e-5 * there.double().norm() * b.double().norm(), kernel


@pytest.mark.parametrize("radon", [RadonFanbeam(8, [0.0, 0.7, 2.9], 20, 20, 9, 3.0, weights="fdk"),
                                   Radon((7, 9), [0.3, 1.6], 12)], ids=["fan", "parallel"])
def test_gradients_in_float64(radon):
    g = radon.geometry
    x = noise(2, g.height, g.width, dtype=torch.float64).requires_grad_()
    p = noise(2, len(g.angles), g.det_count, dtype=torch.float64).requires_grad_()
    for function, argument in ((radon.forward, x), (radon.transpose, p), (radon.backprojection, p),
                               (lambda q: radon.filter_sinogram(q, "hann"), p)):
        assert torch.autograd.gradcheck(function, argument)
    assert torch.autograd.gradgradcheck(lambda v: radon.forward(v) ** 2, x)


def test_gradients_in_float32_are_the_transposes():
    radon = GEOMETRIES["fan"]
    x, p = noise(2, 64, 64).requires_grad_(), noise(2, 36, 168, seed=1)
    (radon.forward(x) * p).sum().backward()
    assert torch.equal(x.grad, radon.transpose(p))


@pytest.mark.parametrize("radon", GEOMETRIES.values(), ids=GEOMETRIES)
def test_linear(radon):
    a, b = noise(2, *radon._image_shape), noise(2, *radon._image_shape, seed=1)
    p, q = noise(2, *radon._sinogram_shape), noise(2, *radon._sinogram_shape, seed=1)
    for function, u, v in ((radon.forward, a, b), (radon.backprojection, p, q), (radon.transpose, p, q),
                           (radon.filter_sinogram, p, q), (radon.degrade, a, b)):
        assert relative(function(2 * u - 3 * v), 2 * function(u) - 3 * function(v)) <= 1e-5
        assert not function(torch.zeros_like(u)).any()


@BACKENDS
@pytest.mark.parametrize(("radon", "views"), [(GEOMETRIES["fan"], 36), (Radon(64, TURN * np.arange(24) / 24, 96), 24)],
                         ids=["fan", "parallel"])
def test_quarter_turns_and_mirrors(backend, radon, views):
    """Turning the image rolls the views; mirroring it reverses views and bins."""
    x = noise(1, 64, 64)
    # Rays along an axis are a whole number of pixels long: ceil(L) there hangs on the last bit of the angle.
    away = [a for a in range(views) if radon.geometry.fan or a % (views // 4)]
    p = backend.forward(radon.geometry, x)
    turned = backend.forward(radon.geometry, torch.rot90(x, 1, (-2, -1)))
    assert relative(turned.roll(-(views // 4), -2)[:, away], p[:, away]) <= 2e-5
    mirrored = backend.forward(radon.geometry, x.flip(-1))
    assert relative(mirrored.flip(-2).roll(1, -2).flip(-1)[:, away], p[:, away]) <= 2e-5


def test_leading_dimensions_dtypes_and_layout():
    radon = GEOMETRIES["fan"]
    x = noise(2, 3, 64, 64)
    p = radon.forward(x)
    assert p.shape == (2, 3, 36, 168) and radon.backprojection(p).shape == x.shape
    assert radon.forward(x[0, 0]).shape == (36, 168) and radon.degrade(x[0, 0]).shape == (64, 64)
    assert relative(radon.forward(x[1, 2]), p[1, 2]) <= 2e-6
    strided = x.transpose(0, 1).transpose(-2, -1)
    assert not strided.is_contiguous()
    assert torch.equal(radon.forward(strided), radon.forward(strided.contiguous()))
    assert relative(radon.forward(x.double()), p) <= 2e-5 and radon.forward(x.double()).dtype == torch.float64
    half = radon.forward(x.half())
    assert half.dtype == torch.float16 and relative(half, p) <= 1e-3
    assert relative(radon.degrade(x.half()), radon.degrade(x)) <= 2e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(radon.degrade(x), radon.degrade(x)) and relative(radon.forward(x), p) <= 1e-6
        assert radon.filter_sinogram(p).dtype == torch.float32


def test_angles_may_be_a_list_an_array_or_a_tensor():
    angles = np.linspace(0, 3, 11)
    x, operators = noise(32, 32), [Radon(32, a) for a in (angles, angles.tolist(), torch.from_numpy(angles))]
    for radon in operators:
        assert torch.equal(radon.forward(x), operators[0].forward(x))
        assert torch.equal(radon.angles, -torch.from_numpy(angles).float()), "upstream keeps the negated angles"


@pytest.mark.parametrize("radon", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_batch_of_eight_is_eight_singles(radon):
    x, p = noise(8, *radon._image_shape), noise(8, *radon._sinogram_shape)
    for function, batch in ((radon.forward, x), (radon.backprojection, p), (radon.transpose, p), (radon.degrade, x)):
        assert torch.equal(function(batch), torch.stack([function(sample) for sample in batch]))


def test_detector_offset_moves_the_bins():
    angles, x = np.linspace(0, 3, 9), noise(2, 64, 64)
    wide = Radon(64, angles, 110)
    shifted = Radon(64, angles, 100, det_offset=3.0)  # its first bin is bin 8 of the wide one
    assert relative(shifted.forward(x), wide.forward(x)[..., 8:108]) <= 2e-5
    p = noise(2, 9, 100)
    assert relative(shifted.backprojection(p), wide.backprojection(torch.nn.functional.pad(p, (8, 2)))) <= 2e-5


def test_view_weights_select_and_scale_views():
    angles, x = TURN * np.arange(12) / 12, noise(2, 48, 48)
    both = RadonFanbeam(48, angles, 200, 200, 130, 2.0)
    some = RadonFanbeam(48, angles[::3], 200, 200, 130, 2.0)
    weights = np.where(np.arange(12) % 3 == 0, 3 * np.pi / 24, 0)
    assert relative(both.degrade(x, weights), some.degrade(x)) <= 2e-5


@st.composite
def scans(draw):
    """A random operator and a batch size."""
    height = draw(st.integers(9, 40))
    width = height if draw(st.booleans()) else draw(st.integers(9, 40))
    views = draw(st.integers(1, 14))
    if draw(st.booleans()):
        angles = draw(st.sampled_from([0.0, 0.3, np.pi / views])) + TURN * np.arange(views) / views
    else:
        angles = np.array(draw(st.lists(st.floats(-7, 7), min_size=views, max_size=views)))
    options = {"clip_to_circle": draw(st.booleans()), "det_offset": draw(st.sampled_from([0.0, 0.0, 1.3, -4.0]))}
    detector = draw(st.integers(3, 70)), draw(st.floats(0.4, 2.5))
    if draw(st.booleans()):
        radon = quiet(Radon, (height, width), angles, *detector, **options)
    else:
        near, far = math.hypot(height, width) / 2 * draw(st.floats(1.05, 6)), draw(st.floats(0, 100))
        options["weights"] = draw(st.sampled_from(["published", "fdk"]))
        radon = quiet(RadonFanbeam, (height, width), angles, near, far, *detector, **options)
    # Where a ray is a whole number of pixels long, ceil(L) hangs on the last bit: along an axis, or across the circle.
    along = (np.abs((angles + np.pi / 4) % (np.pi / 2) - np.pi / 4) < 1e-3).any()
    central = np.abs(radon.geometry.bins).min() < 1e-3
    assume(not (along and (central or not radon.geometry.fan)) and not (central and radon.clip_to_circle))
    return radon, draw(st.integers(1, 9))


@settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(scans())
def test_backends_agree_on_random_geometries(scan):
    radon, batch = scan
    g = radon.geometry
    x, p = noise(batch, g.height, g.width), noise(batch, len(g.angles), g.det_count, seed=1)
    weights = torch.ones(len(g.angles))
    for kernel, *arguments in (("forward", x), ("forward_transpose", p), ("backproject", p),
                               ("backproject_transpose", x), ("fbp", x, weights, "hann")):
        fast, plain = (getattr(b, kernel)(g, *arguments).double() for b in (backend_cpu, backend_torch))
        assert (fast - plain).norm() <= 2e-5 * plain.norm(), kernel


# Borders

def test_upstream_defaults():
    assert (Radon(32, [0.0]).det_count, Radon(32, [0.0]).det_spacing) == (32, 1.0)
    radon = RadonFanbeam(32, [0.0], 100)
    assert (radon.det_count, radon.det_distance, radon.det_spacing) == (32, 100, 2.0)
    radon = RadonFanbeam(32, [0.0], 100, 50)
    assert (radon.det_distance, radon.det_spacing) == (50, 1.5)
    assert RadonFanbeam(32, [0.0], 100, 0, 48, 1.0).det_distance == 0
    with pytest.warns(UserWarning, match="det_spacing 1.5 is replaced by 2.0"):
        assert RadonFanbeam(32, [0.0], 100, det_spacing=1.5).det_spacing == 2.0


def test_a_detector_too_small_is_named():
    with pytest.warns(UserWarning, match=r"det_count 100 .* sees only 50.0 pixels .* further out .* 182 bins see all"):
        Radon(128, [0.0], 100)
    with pytest.warns(UserWarning, match="corners"):
        Radon(128, [0.0], 150)
    with pytest.warns(UserWarning, match="sees only 61.0 pixels"):
        Radon(128, [0.0], 182, det_offset=30.0)
    with pytest.warns(UserWarning, match="further out"):
        RadonFanbeam(128, [0.0], 160, 300, 150, 1.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cvg(18)
        Radon(128, [0.0])
        Radon(128, [0.0], 182)
        RadonFanbeam(256, [0.0], 1075)
        Radon(128, [0.0], 100, clip_to_circle=True)


@pytest.mark.parametrize(("build", "sentence"), [
    (lambda: Radon(32, []), r"angles has shape \(0,\); expected a list of at least one"),
    (lambda: Radon(32, 0.5), r"angles has shape \(\)"),
    (lambda: Radon(32, [0.0, float("nan")]), "angles holds NaN or infinity"),
    (lambda: Radon(0, [0.0]), "resolution is 0"),
    (lambda: Radon((8, 8, 8), [0.0]), r"resolution is \(8, 8, 8\)"),
    (lambda: Radon(32, [0.0], 0), "det_count is 0"),
    (lambda: Radon(32, [0.0], 32.5), "det_count is 32.5"),
    (lambda: Radon(32, [0.0], 32, 0.0), "det_spacing is 0.0"),
    (lambda: Radon(32, [0.0], det_offset=float("inf")), "det_offset is inf"),
    (lambda: RadonFanbeam(32, [0.0], -1), "source_distance is -1"),
    (lambda: RadonFanbeam(32, [0.0], 100, float("nan")), "det_distance is nan"),
    (lambda: RadonFanbeam(32, [0.0], 100, 100, 32, 0.0), "det_spacing is 0.0"),
    (lambda: RadonFanbeam(32, [0.0], 100, weights="true"), "weights is 'true'; expected 'published' or 'fdk'"),
])
def test_bad_scans_get_a_sentence(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize(("call", "error", "sentence"), [
    (lambda r: r.forward(torch.zeros(3, 32, 31)), ValueError, r"has shape \(3, 32, 31\); expected \(..., 32, 32\)"),
    (lambda r: r.forward(torch.zeros(32)), ValueError, r"image has shape \(32,\)"),
    (lambda r: r.forward(torch.zeros(0, 32, 32)), ValueError, "not empty"),
    (lambda r: r.backprojection(torch.zeros(5, 4, 31)), ValueError, r"sinogram has .* expected \(..., 4, 32\)"),
    (lambda r: r.transpose(torch.zeros(32, 4)), ValueError, "sinogram has shape"),
    (lambda r: r.filter_sinogram(torch.zeros(32)), ValueError, r"shape \(32,\); expected \(..., views, bins\)"),
    (lambda r: r.degrade(torch.zeros(16, 16)), ValueError, "image has shape"),
    (lambda r: r.forward(np.zeros((32, 32), np.float32)), TypeError, "image is a ndarray; expected a torch tensor"),
    (lambda r: r.forward(torch.zeros(32, 32, dtype=torch.int32)), TypeError, "image has dtype torch.int32"),
    (lambda r: r.backprojection(torch.zeros(4, 32, dtype=torch.complex64)), TypeError, "sinogram has dtype"),
    (lambda r: r.filter_sinogram(torch.zeros(4, 32), "sharp"), ValueError, "filter_name is 'sharp'; expected one of"),
    (lambda r: r.degrade(torch.zeros(32, 32), filter_name="sharp"), ValueError, "filter_name is 'sharp'"),
    (lambda r: r.degrade(torch.zeros(32, 32), [1.0, 2.0]), ValueError, r"view_weights has shape \(2,\)"),
    (lambda r: r.degrade(torch.zeros(32, 32), torch.ones(8, device="meta")), ValueError, "one device"),
])
def test_bad_tensors_get_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(Radon(32, np.arange(4.0)))
