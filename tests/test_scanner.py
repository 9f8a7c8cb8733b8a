"""Measured sinograms: the geometry in mm against line integrals worked out by hand, DICOM-CT-PD, refusals."""

import json
import struct
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from datasets.ctpd import is_projections
from datasets.dicom import Refused
from datasets.sinograms import read_sinograms
from models.consistency import data_consistency
from models.degradation import Degradation
from models.reconstructor import Reconstructor
from models.scanner import PublishedScanner, make_scanner, read_geometry, to_pixels
from reconstruct import main
from utils.errors import InputError

# Ellipses of a body without any symmetry: middle x, y (mm, right and down), half axes, turn, attenuation in water.
BODY = [(0, 0, 150, 120, 0, 1.0), (40, 30, 30, 20, 0.4, 0.3), (-60, -20, 25, 40, -0.3, -0.5), (10, -60, 15, 15, 0, 0.8)]
FAN = {"angles": {"start": 0, "step": 0.5, "count": 720}, "detector_count": 500, "detector_pitch_mm": 1.5,
       "field_of_view_mm": 360, "size": 128, "source_distance_mm": 600, "detector_distance_mm": 500}
PARALLEL = {"beam": "parallel", "angles": {"start": 0, "step": 0.5, "count": 360}, "detector_count": 640,
            "detector_pitch_mm": 0.8, "field_of_view_mm": 360, "size": 128}


def phantom(size, fine=4):
    """mu in 1/cm of BODY over 360 mm, each pixel the mean of fine x fine points."""
    at = (np.arange(size * fine) + 0.5) * 360 / size / fine - 180
    x, y = np.meshgrid(at, at)
    mu = np.zeros(x.shape)
    for a, b, r, s, turn, value in BODY:
        along = (x - a) * np.cos(turn) + (y - b) * np.sin(turn)
        across = (y - b) * np.cos(turn) - (x - a) * np.sin(turn)
        mu += 0.192 * value * ((along / r) ** 2 + (across / s) ** 2 < 1)
    return mu.reshape(size, fine, size, fine).mean((1, 3))


def line_integrals(scanner):
    """(views, bins) of BODY: chord length x attenuation of every ray, from the words that describe a Scanner."""
    bins = (np.arange(scanner.detector_count) - scanner.detector_count / 2 + 0.5) * scanner.detector_pitch_mm
    bins = (bins + scanner.detector_offset_mm) * (-1 if scanner.flip_detector else 1)
    S, R = scanner.source_distance_mm, scanner.source_distance_mm + scanner.detector_distance_mm
    rows = []
    for angle in scanner.angles:
        t = np.radians(angle + scanner.angle_offset) * (1 if scanner.direction == "ccw" else -1)
        right, ahead = np.array([np.cos(t), -np.sin(t)]), np.array([-np.sin(t), -np.cos(t)])  # as seen from the source
        if scanner.beam == "parallel":
            start, way = bins[:, None] * right, np.tile(ahead, (len(bins), 1))
        elif scanner.detector_shape == "curved":
            start, way = -S * ahead, np.sin(bins / R)[:, None] * right + np.cos(bins / R)[:, None] * ahead
        else:
            start, way = -S * ahead, bins[:, None] * right + R * ahead
            way = way / np.linalg.norm(way, axis=1, keepdims=True)
        row = np.zeros(len(bins))
        for a, b, r, s, turn, value in BODY:
            to_axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / [r, s]
            o, d = (start - [a, b]) @ to_axes, way @ to_axes
            A, B, C = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
            row += 0.192 * value * 2 * np.sqrt(np.maximum(B * B - A * C, 0)) / A
        rows.append(row / 10)  # 1/cm x mm
    return np.array(rows, np.float32)


def fbp(scanner, lines, size):
    """(size, size) from line integrals (views, bins)."""
    return Degradation(scanner).fbp(to_pixels(scanner, lines, size)[None, None], size)[0, 0]


def psnr(mu, want):
    """In the headline window, 3000 HU wide."""
    return -10 * np.log10((((np.asarray(mu) - want) / 0.192 / 3) ** 2).mean())


@pytest.mark.parametrize("change", [
    {}, {"direction": "cw"}, {"detector_offset_mm": -6.3, "direction": "cw"}, {"detector_offset_mm": 6.3},
    {"detector_shape": "curved", "detector_offset_mm": 0.375},
    {"detector_shape": "curved", "flip_detector": True, "angle_offset": 33, "detector_offset_mm": 4},
    PARALLEL, PARALLEL | {"direction": "cw", "detector_offset_mm": 5, "flip_detector": True},
    {"angles": [*np.arange(0, 360, 0.5), *np.arange(0, 90, 0.5)]},  # a quarter measured twice
], ids=str)
def test_fbp_of_analytic_line_integrals_is_the_phantom(change):
    fields = PARALLEL | change if "beam" in change else FAN | change
    scanner = make_scanner(fields)
    lines = line_integrals(scanner)
    want = phantom(128)
    assert psnr(fbp(scanner, lines, 128), want) > 35
    other = make_scanner(fields | {"direction": "cw" if scanner.direction == "ccw" else "ccw"})
    assert psnr(fbp(other, lines, 128), want) < 30  # so orientation is indeed seen
    for flip, turned in (("left-right", want[:, ::-1]), ("up-down", want[::-1])):
        flipped = make_scanner(fields | {"flip_image": flip})
        assert psnr(fbp(flipped, lines, 128), turned) > 35


def test_water_and_thinned_views():
    scanner = make_scanner(FAN | {"water_per_cm": 0.2})
    lines = line_integrals(scanner)
    y = to_pixels(scanner, lines * 0.2 / 0.192, 64)
    np.testing.assert_allclose(y, to_pixels(make_scanner(FAN), lines, 64), rtol=1e-5)
    few, chosen = scanner.thinned(50)
    assert len(few.angles) == 50 and [scanner.angles[i] for i in chosen] == list(few.angles)
    np.testing.assert_allclose(few.shares(50), 1, atol=0.1)
    with pytest.raises(InputError, match="holds 720 views"):
        scanner.thinned(721)
    for views, factor in ((50, 2), (100, 3), (720, 2)):
        few, _ = scanner.thinned(views)
        finer = few.resampled(views * factor)
        assert len(finer.angles) == views * factor and set(few.angles) <= set(np.round(finer.angles, 9))
        np.testing.assert_allclose(finer.shares(views * factor), 1, atol=0.15)
    assert scanner.resampled(4).angles == (0.0, 90.0, 180.0, 270.0)


@pytest.mark.parametrize("change, text", [
    ({"detector_pitch_mm": None}, "detector_pitch_mm is None; expected a finite number"),
    ({"pitch": 1}, "unknown fields pitch"), ({"direction": "left"}, "expected ccw or cw"),
    ({"detector_count": 1.5}, "whole number"), ({"size": 0}, "more than 0"), ({"flip_detector": 1}, "true or false"),
    ({"source_distance_mm": 200}, "inside the image"), ({"source_distance_mm": float("nan")}, "finite"),
    ({"angles": []}, "no list"), ({"detector_offset_mm": 400}, "puts the axis of rotation beside the detector"),
    ({"angles": {"start": 0, "step": 1}}, "expected start, step and count"), ({"angles": ["a"]}, "finite"),
    ({"detector_distance_mm": -1}, "below 0"), ({"beam": "parallel", "detector_shape": "curved"}, "curved")])
def test_geometries_that_cannot_be_are_refused_with_the_reason(change, text):
    with pytest.raises(InputError, match=text):
        make_scanner(FAN | change)


def test_geometry_files(tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(FAN))
    (tmp_path / "g.yaml").write_text("angles: {start: 0, step: 0.5, count: 720}\ndetector_count: 500\n")
    assert read_geometry(tmp_path / "g.json") == FAN
    assert read_geometry(tmp_path / "g.yaml") == {key: FAN[key] for key in ("angles", "detector_count")}
    bad = {"a.json": "{", "b.json": "[1]", "c.yaml": "a: [", "d.yaml": "!!python/object/apply:os.getcwd []"}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="geometry"):
            read_geometry(tmp_path / name)
    with pytest.raises(InputError, match="lacks angles"):
        make_scanner({})


def test_the_sinogram_must_fit_the_geometry():
    scanner = make_scanner(FAN)
    with pytest.raises(InputError, match="700 views of 500 bins, the geometry 720 of 500"):
        to_pixels(scanner, np.zeros((700, 500)), 64)
    with pytest.raises(InputError, match="NaN"):
        to_pixels(scanner, np.full((720, 500), np.nan), 64)


PUBLISHED_IN_MM = {"angles": {"start": 0, "step": 10, "count": 36}, "detector_count": 84, "detector_pitch_mm": 2.0,
                   "field_of_view_mm": 32, "source_distance_mm": 134.375, "detector_distance_mm": 134.375, "size": 32}


def test_chain_in_the_measured_geometry():
    """CvG's own scanner, told in mm, degrades as the published one does but for the true weights; dc meets the
    sinogram."""
    scanner, x = make_scanner(PUBLISHED_IN_MM), torch.from_numpy(phantom(32)).float()[None, None]
    degrade = Degradation(scanner)
    for n in (36, 72):
        torch.testing.assert_close(degrade(x, n), Degradation()(x, n), atol=0.004, rtol=0)
        torch.testing.assert_close(degrade.project(x, n), Degradation().project(x, n), rtol=1e-5, atol=1e-5)
    y = degrade.project(x, 36)
    corrected = data_consistency(degrade, torch.cat([y, 2 * y]), 20)(torch.zeros_like(x), [1])
    assert (degrade.project(corrected, 36) - 2 * y).norm() < 0.01 * y.norm()


def test_both_scanners_keep_one_contract():
    for scanner in (PublishedScanner(0.5), make_scanner(PUBLISHED_IN_MM)):
        theta = scanner.theta(50)
        assert scanner.projector(32, theta) is scanner.projector(32, theta), "made once"
        assert scanner.projector(32, theta).det_count == 84
    np.testing.assert_allclose(PublishedScanner(0.5).theta(4), 0.5 + np.pi / 2 * np.arange(4))
    np.testing.assert_allclose(make_scanner(PUBLISHED_IN_MM).theta(36), PublishedScanner().theta(36), rtol=1e-12)


def test_line_integrals_of_a_real_scanner_become_an_image_by_five_lines():
    """`sinograms` takes them as measured, one slice or several; the side is the scanner's own."""
    scanner = make_scanner(FAN | {"direction": "cw", "detector_offset_mm": -6.3})
    lines, r = line_integrals(scanner), Reconstructor(scanner=scanner)
    x0_hat, calls = r.run("fbp", r.sinograms(np.stack([lines, 0 * lines])))
    assert x0_hat.shape == (2, 1, 128, 128) and calls == [0, 0] and not x0_hat[1].any()
    assert psnr(x0_hat[0, 0], phantom(128)) > 35
    r = Reconstructor(scanner=replace(scanner, size=64))
    assert r.run("fbp", r.sinograms(lines))[0].shape == (1, 1, 64, 64)


def write_projections(folder, lines, scanner, syntax=ExplicitVRLittleEndian, skip=(), **change):
    """A DICOM-CT-PD folder of one rotation on a curved detector; `change` replaces fields by name."""
    folder.mkdir()
    slope = float(np.float32(lines.max() / 65000))
    n, pitch = scanner.detector_count, scanner.detector_pitch_mm
    tags = {"pitch": (0x70291002, "FL", pitch), "shape": (0x7029100B, "CS", "CYLINDRICAL"),
            "rows": (0x70291010, "US", 1), "columns": (0x70291011, "US", n),
            "source": (0x70311003, "FL", scanner.source_distance_mm), "z": (0x70311002, "FL", -100.0),
            "span": (0x70311031, "FL", scanner.source_distance_mm + scanner.detector_distance_mm),
            "centre": (0x70311033, "FL", [(n + 1) / 2 - scanner.detector_offset_mm / pitch, 1.0]),
            "water": (0x70411001, "DS", "0.0192")}
    for number in np.random.default_rng(0).permutation(len(lines)):
        view = pydicom.Dataset()
        view.file_meta = pydicom.dataset.FileMetaDataset()
        view.file_meta.TransferSyntaxUID = syntax
        view.file_meta.MediaStorageSOPClassUID = view.SOPClassUID = pydicom.uid.RawDataStorage
        view.file_meta.MediaStorageSOPInstanceUID = view.SOPInstanceUID = pydicom.uid.generate_uid()
        view.InstanceNumber = int(number) + 1
        view.Rows, view.Columns, view.SamplesPerPixel, view.PhotometricInterpretation = n, 1, 1, "MONOCHROME2"
        view.BitsAllocated = view.BitsStored = 16
        view.HighBit, view.PixelRepresentation = 15, 0
        view.RescaleSlope, view.RescaleIntercept, view.DataCollectionDiameter = f"{slope:.8e}", 0, 360
        view.PatientPosition = "FFS"  # phi grows clockwise as displayed
        view.PixelData = np.rint(lines[number] / slope).astype("<u2").tobytes()
        angle = (0x70311001, "FL", float(np.radians(scanner.angles[number])))
        for name, (tag, kind, value) in ({"angle": angle} | tags).items():
            value = change.get(name, value)
            if name not in skip:
                view.add_new(tag, kind, value(number) if callable(value) else value)
        view.save_as(folder / f"{pydicom.uid.generate_uid()[-20:]}.dcm", enforce_file_format=True)


@pytest.mark.parametrize("step, offset, syntax", [
    (0.5, 1.7, ExplicitVRLittleEndian), (-0.5, -1.7, ImplicitVRLittleEndian)])
def test_dicom_ct_pd_reconstructs_to_the_phantom(tmp_path, step, offset, syntax):
    scanner = make_scanner(FAN | {  # 0 at 12 o'clock and clockwise, as the format has it
        "angles": {"start": 40, "step": step, "count": 720}, "angle_offset": 180, "direction": "cw",
        "detector_shape": "curved", "detector_offset_mm": offset})
    write_projections(tmp_path / "scan", line_integrals(scanner), scanner, syntax)
    (tmp_path / "g.json").write_text('{"size": 128}')
    assert is_projections(tmp_path / "scan")
    assert main([str(tmp_path / "scan"), "--geometry", str(tmp_path / "g.json"), "--method", "fbp", "--format", "npy",
                 "--out", str(tmp_path / "out")]) == 0
    hu = np.load(tmp_path / "out/volume.npy")
    assert hu.shape == (1, 128, 128) and psnr(hu[0] / 1000 * 0.192 + 0.192, phantom(128)) > 35


def test_projections_that_are_not_one_plane_rotation_are_refused(tmp_path):
    scanner = make_scanner(FAN | {"angles": {"start": 0, "step": 90, "count": 4}, "detector_count": 8})
    lines = np.ones((4, 8), np.float32)
    for name, change, text in [
            ("spiral", {"z": lambda i: float(i)}, "no plane"), ("cone", {"rows": 4}, "lacks the tag"),
            ("two", {"source": lambda i: 500.0 + i}, "different scans"),
            ("count", {"columns": 9}, "9 detector columns"), ("ball", {"shape": "SPHERICAL"}, "neither FLAT"),
            ("nan", {"span": float("nan")}, "finite")]:
        write_projections(tmp_path / name, lines, scanner, **change)
        with pytest.raises(Refused, match=text):
            read_sinograms(tmp_path / name)
    write_projections(tmp_path / "lost", lines, scanner, skip=("angle",))
    with pytest.raises(Refused, match="lacks the tag"):
        read_sinograms(tmp_path / "lost")
    path = next((tmp_path / "lost").iterdir())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Refused, match="lacks|cannot be read"):
        read_sinograms(tmp_path / "lost")


def test_private_values_may_come_as_bytes(tmp_path):
    scanner = make_scanner(FAN | {"angles": {"start": 0, "step": 90, "count": 4}, "detector_count": 8})
    write_projections(tmp_path / "s", np.ones((4, 8), np.float32), scanner, ImplicitVRLittleEndian)
    view = pydicom.dcmread(next((tmp_path / "s").iterdir()))
    assert view[0x70291002].value == struct.pack("<f", 1.5)  # the test above means what it says
    lines, told = read_sinograms(tmp_path / "s")
    assert told["detector_pitch_mm"] == 1.5 and told["detector_count"] == 8 and told["angle_offset"] == 180
    assert told["water_per_cm"] == pytest.approx(0.192) and told["detector_shape"] == "curved"
    np.testing.assert_allclose(lines, 1, atol=1e-4)
