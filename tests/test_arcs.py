"""Short scans, detectors off the axis, uneven views, limited angles and the centre of rotation, on analytic data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_scanner import FAN, PARALLEL, fbp, line_integrals, phantom, psnr
from torch_radon.solvers import cgne

from models.centre import find_centre
from models.consistency import relative_residual
from models.degradation import Degradation
from models.reconstructor import Reconstructor
from models.scanner import PublishedScanner, make_scanner, merged_bins, scanner_warnings, to_pixels
from utils.errors import InputError

HTC = ROOT.parent / "shared/data/htc/tb_549.npz"
SHORT = {"angles": {"start": 20, "step": 0.75, "count": 296}}                # 222 degrees; 215 are needed
HALF = {"angles": {"start": 0, "step": 1, "count": 360}, "detector_count": 300, "detector_offset_mm": 150}
HALF_PARALLEL = PARALLEL | {"angles": {"start": 0, "step": 1, "count": 360}, "detector_count": 300,
                            "detector_offset_mm": 80}
SCANS = {
    "short": FAN | SHORT, "short, cw": FAN | SHORT | {"direction": "cw", "detector_offset_mm": 4},
    "short, curved, flipped": FAN | SHORT | {"detector_shape": "curved", "flip_detector": True, "angle_offset": 33},
    "half fan": FAN | HALF, "other half, cw": FAN | HALF | {"direction": "cw", "detector_offset_mm": -150},
    "half fan, curved": FAN | HALF | {"detector_shape": "curved"},
    "half fan, flipped": FAN | HALF | {"flip_detector": True},
    "half acquisition": HALF_PARALLEL, "other half, parallel": HALF_PARALLEL | {"detector_offset_mm": -80},
    "two arcs": FAN | {"angles": [*range(75, 170), *range(190, 420)]},
    "short, some views twice": FAN | {"angles": [20 + 0.75 * i for i in (*range(296), *range(100, 150))]},
}


def unweighted(scanner, lines, size):
    """FBP in which every ray counts the same."""
    operator = scanner.projector(size, scanner.theta(len(scanner.angles)))
    return operator.backprojection(operator.filter_sinogram(to_pixels(scanner, lines, size)[None, None]))[0, 0]


@pytest.mark.parametrize("name", SCANS)
def test_fbp_of_what_was_measured_is_the_phantom(name):
    scanner, want = make_scanner(SCANS[name]), phantom(128)
    lines = line_integrals(scanner)
    assert scanner_warnings(scanner) == []
    assert psnr(fbp(scanner, lines, 128), want) > max(34, psnr(unweighted(scanner, lines, 128), want) + 4)
    r = Reconstructor(scanner=scanner)
    assert torch.equal(r.run("fbp-fdk", r.sinograms(lines))[0], r.run("fbp", r.sinograms(lines))[0])
    for flip, turned in (("left-right", want[:, ::-1]), ("up-down", want[::-1])):
        assert psnr(fbp(replace(scanner, flip_image=flip), lines, 128), turned) > 34


@pytest.mark.parametrize("name", ["short, cw", "short, curved, flipped", "half fan, flipped", "half acquisition"])
def test_weights_of_a_line_s_two_rays_add_up_to_two(name):
    """The conjugate is found as geometry has it: where the line meets the source's circle again."""
    scanner = make_scanner(SCANS[name])
    rng, S = np.random.default_rng(0), scanner.source_distance_mm
    R, seen = S + scanner.detector_distance_mm, 0
    for angle, u in zip(rng.uniform(0, 360, 200), rng.uniform(-300, 300, 200), strict=True):
        other = angle + 180  # of a parallel beam
        if scanner.beam == "fan":
            theta = np.radians(scanner.turn * angle)
            source = S * np.array([np.sin(theta), np.cos(theta)])
            way = u * np.array([np.cos(theta), -np.sin(theta)]) - R / S * source
            again = source - 2 * (source @ way) / (way @ way) * way
            other = scanner.turn * np.degrees(np.arctan2(*again))
        one, two = (scanner.coverage(np.array([a]), np.array([b]))[:, 0, 0] for a, b in ((angle, u), (other, -u)))
        np.testing.assert_allclose(one, two[::-1], atol=1e-9)
        if one.sum() > 0:
            assert 2 * one[0] / one.sum() + 2 * two[0] / two.sum() == pytest.approx(2)
            seen += 1
    assert seen > 100


@pytest.mark.parametrize("fields", [FAN, FAN | {"detector_offset_mm": 6.3}, PARALLEL,
                                    FAN | {"detector_count": 200}, FAN | {"detector_count": 200,
                                                                         "detector_offset_mm": 0.375}], ids=str)
def test_whole_rotations_take_the_same_way_as_ever(fields):
    """To the bit, a whole detector or a centred one that is too short; also where a quarter was measured twice."""
    x = torch.from_numpy(phantom(64)).float()[None, None]
    scanner = make_scanner(fields)
    n, degrade = len(scanner.angles), Degradation(scanner)
    operator = scanner.projector(64, scanner.theta(n))
    assert scanner.padded == scanner and degrade.operator(64, n) is operator
    assert torch.equal(degrade(x, n), operator.degrade(x, torch.full((n,), np.pi / 2 / n)))
    twice = replace(scanner, angles=scanner.angles + scanner.angles[: n // 4])
    assert set(twice.shares(len(twice.angles)).tolist()) == {1.25, 0.625}
    assert PublishedScanner().shares(36) is None and PublishedScanner().padded == PublishedScanner()


@pytest.mark.parametrize("name", ["short", "half fan, flipped", "half fan, curved", "half acquisition"])
def test_chains_of_scans_that_are_not_whole(name):
    """D = FBP P at every level, alone, mixed and as a difference; denser levels are even rotations of a whole one."""
    x = torch.from_numpy(phantom(32)).float()[None, None].repeat(2, 1, 1, 1) * torch.tensor([1, 0.5]).view(2, 1, 1, 1)
    scanner = make_scanner(SCANS[name] | {"size": 32}).thinned(40)[0]
    degrade = Degradation(scanner)
    for n in (40, 80, 100):
        torch.testing.assert_close(degrade(x, n), degrade.fbp(degrade.project(x, n), 32), atol=1e-5, rtol=0)
    both = degrade(x, [40, 80])
    torch.testing.assert_close(both, torch.cat([degrade(x[:1], 40), degrade(x[1:], 80)]), atol=1e-5, rtol=0)
    shifted = degrade.shift(degrade(x, 40), x, [40, 40], [80, 100])
    torch.testing.assert_close(shifted, torch.cat([degrade(x[:1], 80), degrade(x[1:], 100)]), atol=2e-5, rtol=0)
    finer = scanner.resampled(80)
    np.testing.assert_allclose(np.diff(finer.angles), finer.arc / 80)
    np.testing.assert_array_equal(finer.shares(80), 1)
    assert finer.angles[0] == scanner.angles[0] and finer.padding == (0, 0)
    reference = make_scanner((PARALLEL if name == "half acquisition" else FAN) | {"size": 32})
    at = np.arange(32) - 15.5
    inside = torch.from_numpy(np.hypot(at, at[:, None]) < 15)  # beyond the field of view the detector is not whole
    torch.testing.assert_close(degrade(x, 360) * inside, Degradation(reference)(x, 360) * inside, atol=0.003, rtol=0)


def test_the_operator_has_the_measured_bins_and_its_transpose():
    scanner = make_scanner(SCANS["half fan"])
    operator = Degradation(scanner).operator(32, 360)
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 1, 32, 32, generator=rng), torch.rand(1, 1, 360, 300, generator=rng)
    torch.testing.assert_close((operator.forward(x) * y).sum(), (x * operator.transpose(y)).sum(), rtol=1e-4, atol=0)


def test_limited_angles_are_reconstructed_and_said():
    scanner = make_scanner(FAN | {"angles": {"start": 0, "step": 1.5, "count": 100}})
    said, = scanner_warnings(scanner)
    assert "views cover 150 degrees, and 215 in one piece are needed" in said
    lines, r = line_integrals(scanner), Reconstructor.from_checkpoint("tiny", scanner=scanner)
    y, want = r.sinograms(lines), phantom(128)
    assert psnr(r.run("spdps", y)[0][0, 0], want) > psnr(r.run("fbp", y)[0][0, 0], want) + 5
    small, = scanner_warnings(make_scanner(FAN | {"detector_count": 200}))
    assert "sees the inner 43% of its field of view alone" in small
    half, = scanner_warnings(make_scanner(HALF_PARALLEL | {"angles": {"start": 0, "step": 1, "count": 180}}))
    assert "360 are needed" in half


def test_random_views_are_no_short_scan():
    rng = np.random.default_rng(0)
    scanner = make_scanner(FAN | {"angles": np.sort(rng.choice(240, 90, replace=False) * 1.5).tolist()})
    lines, want = line_integrals(scanner), phantom(128)
    assert scanner_warnings(scanner) == []
    assert psnr(fbp(scanner, lines, 128), want) > psnr(unweighted(scanner, lines, 128), want) + 1
    order = rng.permutation(90)
    mixed = replace(scanner, angles=tuple(scanner.angles[i] for i in order))
    few, chosen = mixed.thinned(45)
    assert sorted(few.angles) == list(scanner.angles[::2]) and [mixed.angles[i] for i in chosen] == list(few.angles)


@pytest.mark.parametrize("fields, wrong", [
    (FAN | {"detector_offset_mm": 6.3, "direction": "cw"}, -9), (FAN | SHORT | {"flip_detector": True}, 12.5),
    (HALF_PARALLEL, 4)], ids=str)
def test_the_centre_is_found_to_a_bin(fields, wrong):
    scanner = replace(make_scanner(fields), size=48)
    lines = line_integrals(scanner)
    given = replace(scanner, detector_offset_mm=scanner.detector_offset_mm + wrong)
    found, after, before = find_centre(given, lines)
    assert abs(found.detector_offset_mm - scanner.detector_offset_mm) < scanner.detector_pitch_mm
    assert replace(found, detector_offset_mm=given.detector_offset_mm) == given
    assert after < 0.02 and 1.5 * after < before
    y = to_pixels(scanner, np.stack([lines, 0 * lines]), 48)[:, None]
    residual = relative_residual(Degradation(scanner), y, 48)
    assert residual[0] < 0.02 and residual[1] == 0


def test_a_centre_out_of_reach_is_said():
    scanner = replace(make_scanner(FAN | {"angles": {"start": 0, "step": 9, "count": 40}}), size=32)
    lines = line_integrals(scanner)
    with pytest.raises(InputError, match="the end of what was searched"):
        find_centre(replace(scanner, detector_offset_mm=150), lines)


@pytest.mark.parametrize("flip", [False, True])
def test_bins_finer_than_pixels_are_merged(flip):
    scanner = make_scanner(FAN | {"angles": {"start": 0, "step": 8, "count": 45}, "flip_detector": flip,
                                  "detector_count": 1501, "detector_pitch_mm": 0.5, "detector_offset_mm": 3})
    lines, want = line_integrals(scanner), phantom(64)
    coarse, merged = merged_bins(scanner, lines, 64)  # pixels of 5.6 mm, bins of 0.27 mm on the axis
    assert coarse.detector_count == 75 and merged.shape == (45, 75)
    np.testing.assert_allclose(merged[3, 7], lines[3, 140:160].mean(), rtol=1e-5)
    assert psnr(fbp(coarse, merged, 64), want) > psnr(fbp(scanner, lines, 64), want) + 1
    residual = relative_residual(Degradation(coarse), to_pixels(coarse, merged, 64)[None, None], 64)
    shifted = replace(coarse, detector_offset_mm=coarse.detector_offset_mm + 5)
    assert residual < 0.8 * relative_residual(Degradation(shifted), to_pixels(coarse, merged, 64)[None, None], 64)
    same, as_they_were = merged_bins(coarse, merged, 64)
    assert same is coarse and as_they_were is merged


@pytest.mark.skipif(not HTC.is_file(), reason="the measured scan is not here")
def test_a_measured_scan_of_three_arcs():
    """Helsinki Tomography Challenge 2022, teaching sample tb: from 30 views, against 183 by least squares."""
    with np.load(HTC) as file:
        angles, lines = file["angles"].tolist(), file["sino"]
    scanner = make_scanner({"angles": angles, "source_distance_mm": 410.66, "detector_distance_mm": 143.08,
                            "detector_count": 560, "detector_pitch_mm": 0.2, "detector_offset_mm": 0.04,
                            "field_of_view_mm": 76, "size": 128, "water_per_cm": 0.36})
    assert "views cover 274 degrees" in scanner_warnings(scanner)[0]

    def few(n):
        thinned, chosen = scanner.thinned(n)
        r = Reconstructor.from_checkpoint("tiny", scanner=thinned)
        r.scanner, part = merged_bins(thinned, lines[chosen], 128)
        return r, r.sinograms(part)

    r, y = few(183)
    assert relative_residual(r.degrade, y, 128) < 0.011
    want = cgne(r.degrade.operator(128, 183), torch.zeros(1, 1, 128, 128), y, max_iter=20)
    r, y = few(30)
    fbp_error, spdps_error = (float((r.run(method, y)[0] - want).square().mean().sqrt()) / 0.192e-3
                              for method in ("fbp", "spdps"))
    assert fbp_error < 250 and spdps_error < 112
