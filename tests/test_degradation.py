"""One contract for D, whatever the scanner; the merged level shift and the official protocol."""

import math

import numpy as np
import pytest
import torch

from models.degradation import Degradation, _difference
from models.scanner import PublishedScanner, make_scanner

FAN = {"angles": {"start": 5, "step": 10, "count": 36}, "detector_count": 180, "detector_pitch_mm": 3.0,
       "field_of_view_mm": 200, "size": 64, "source_distance_mm": 600, "detector_distance_mm": 500,
       "detector_offset_mm": 0.75}
PARALLEL = {"beam": "parallel", "angles": {"start": 0, "step": 5, "count": 36}, "detector_count": 110,
            "detector_pitch_mm": 3.0, "field_of_view_mm": 200, "size": 64, "direction": "cw"}
UNEVEN = FAN | {"angles": [10 * i + 3 * (i % 3) for i in range(36)]}  # gaps of 13 and 4 degrees
SCANNERS = {"published": PublishedScanner(), "turned": PublishedScanner(0.3), "fan": make_scanner(FAN),
            "parallel": make_scanner(PARALLEL), "uneven": make_scanner(UNEVEN)}

every_scanner = pytest.mark.parametrize("scanner", SCANNERS.values(), ids=SCANNERS)


@pytest.fixture(scope="module")
def image():
    x = torch.nn.functional.interpolate(torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(1)), size=64)
    return x * 0.3


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@every_scanner
@pytest.mark.parametrize("n", [36, 20])
def test_d_is_fbp_of_the_projection(scanner, n, image):
    degrade = Degradation(scanner)
    y = degrade.project(image, n)
    assert y.shape[:3] == (3, 1, n) and scanner.size_of(y.shape[-1]) == 64
    assert len(scanner.theta(n)) == n and degrade.operator(64, n).forward(image).equal(y)
    assert degrade.fbp(y, 64).shape == image.shape
    assert relative(degrade(image, n), degrade.fbp(y, 64)) <= 2e-5


@every_scanner
def test_the_fbp_of_many_views_is_the_image(scanner, image):
    """So projector, views and weights are those of one rotation."""
    yy, xx = np.mgrid[0:64, 0:64] - 31.5
    disc = torch.from_numpy(np.hypot(xx, yy) < 24)
    smooth = torch.nn.functional.avg_pool2d(image * disc, 9, 1, 4)
    assert relative(Degradation(scanner)(smooth, 720), smooth) < 0.02


@every_scanner
@pytest.mark.parametrize(("n_t", "n_s"), [(36, 54), (18, 36), (36, 288), (20, 72), (54, 126)])
def test_the_merged_shift_is_the_two_degradations(scanner, n_t, n_s, image):
    degrade, x_t = Degradation(scanner), torch.rand_like(image)
    expected = x_t - degrade(image, n_t) + degrade(image, n_s)
    assert relative(degrade.shift(x_t, image, [n_t] * 3, [n_s] * 3), expected) <= 2e-5


@every_scanner
@pytest.mark.parametrize("n", [36, 20])
def test_the_operator_and_its_transpose_are_adjoint(scanner, n):
    operator, generator = Degradation(scanner).operator(64, n), torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 64, 64, generator=generator, dtype=torch.float64)
    y = torch.rand(operator.forward(x).shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((operator.forward(x) * y).sum(), (x * operator.transpose(y)).sum(), rtol=1e-10, atol=0)


@every_scanner
def test_a_batch_gives_what_its_slices_give_alone(scanner, image):
    degrade = Degradation(scanner)
    y = degrade.project(image, 36)
    alone = [image[i:i + 1] for i in range(3)]
    assert y.equal(torch.cat([degrade.project(x, 36) for x in alone]))
    assert degrade.fbp(y, 64).equal(torch.cat([degrade.fbp(y[i:i + 1], 64) for i in range(3)]))
    assert degrade(image, 36).equal(torch.cat([degrade(x, 36) for x in alone]))
    assert degrade.full(image).equal(torch.cat([degrade.full(x) for x in alone]))


@every_scanner
def test_view_counts_of_their_own_for_each_slice(scanner, image):
    degrade, counts = Degradation(scanner), [18, 72, 18]
    alone = [image[i:i + 1] for i in range(3)]
    assert degrade(image, counts).equal(torch.cat([degrade(x, n) for x, n in zip(alone, counts, strict=True)]))
    for one, x, n in zip(degrade.project(image, counts), alone, counts, strict=True):
        assert one.equal(degrade.project(x, n)[0])
    shifted = degrade.shift(image, image, [18, 72, 36], [36, 72, 54])
    assert shifted[0].equal(degrade.shift(alone[0], alone[0], [18], [36])[0])
    assert torch.equal(shifted[1], image[1]), "a shift to the same level changes nothing"


@every_scanner
def test_ground_truths_have_720_views_from_angle_0(scanner, image):
    origin = scanner.from_zero()
    assert Degradation(scanner).full(image).equal(Degradation(origin)(image, 720))
    assert origin.from_zero() == origin


@pytest.mark.parametrize("size", [16, 22, 32, 40, 100, 128, 256, 512])
def test_the_bins_of_the_published_scanner_tell_the_size(size):
    bins = PublishedScanner().projector(size, (0.0,)).det_count
    assert bins % 2 == 0 and bins == math.ceil(672 * size / 256 / 2) * 2 and PublishedScanner().size_of(bins) == size


def test_uneven_views_are_weighted_by_their_share_of_the_rotation(image):
    """Here their own 36 and twice as many; any other number is equally spaced and all weigh the same."""
    scanner, degrade = SCANNERS["uneven"], Degradation(SCANNERS["uneven"])
    np.testing.assert_allclose(scanner.shares(36), [0.85, 1.3, 0.85] * 12, rtol=1e-6)
    assert set(scanner.shares(20)) == {1.0} and len(set(scanner.shares(72))) > 1
    operator, y = degrade.operator(64, 36), degrade.project(image, 36)
    weighted, equal = (operator.backprojection(operator.filter_sinogram(z))
                       for z in (y * torch.tensor([0.85, 1.3, 0.85] * 12)[:, None], y))
    assert relative(degrade(image, 36), weighted) <= 2e-5 and relative(degrade(image, 36), equal) > 1e-2


def test_merged_views():
    scanner = PublishedScanner()
    assert len(_difference(scanner, 36, 54)[0]) == 72
    assert len(_difference(scanner, 234, 288)[0]) == 504
    assert math.isclose(sum(_difference(scanner, 36, 54)[1]), 0, abs_tol=1e-9)


def test_official_protocol_degrades_the_full_view_reconstruction(image):
    plain, official = Degradation(), Degradation(official=True)
    assert relative(official(image, 36), plain(plain.full(image), 36)) <= 1e-6
    assert relative(official(image, 36), plain(image, 36)) > 1e-2, "the two protocols do differ"
    for n in (36, [18, 36, 72]):  # a measurement is projected once
        assert all(a.equal(b) for a, b in zip(official.project(image, n), plain.project(image, n), strict=True))
    shifted = plain.shift(image, plain.full(image), [18] * 3, [36] * 3)
    assert relative(official.shift(image, image, [18] * 3, [36] * 3), shifted) <= 1e-6


def test_quarter_turns_commute_with_d_where_the_views_allow(image):
    turned = torch.rot90(image, 1, (-2, -1))
    assert relative(Degradation()(turned, 36), torch.rot90(Degradation()(image, 36), 1, (-2, -1))) <= 2e-5
    assert relative(Degradation()(turned, 18), torch.rot90(Degradation()(image, 18), 1, (-2, -1))) > 1e-2
