"""Measured scans: what their files hold, counts, units, and the alarms that a wrong geometry or a wrong file sets off.

Sinograms are analytic line integrals of ellipses (tests/test_scanner.py).
"""

import json
import os
import re
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_scanner import FAN, PARALLEL, line_integrals, phantom

from datasets.arrays import read_arrays
from datasets.counts import estimate_photons
from datasets.series import Refused
from datasets.sinograms import read_sinograms
from fig import conventions
from models import alarms
from models.consistency import deviation
from models.degradation import Degradation
from models.geometry import check_axes, in_degrees, near_plane, read_in_mm
from models.jobs import measured
from models.reconstructor import Reconstructor
from models.scanner import make_scanner, to_pixels
from reconstruct import main, parse
from utils.errors import InputError
from utils.units import mu_to_hu, pixel_cm

SAMPLE = Path(__file__).parent.parent / "datasets" / "sample" / "test_img"
SMALL = FAN | {"angles": {"start": 0, "step": 2, "count": 180}, "detector_count": 250, "detector_pitch_mm": 3.0,
               "size": 64}
SCANNER = make_scanner(SMALL)
LINES = line_integrals(SCANNER)
SQUARE = make_scanner(SMALL | {"detector_count": 180, "detector_pitch_mm": 4.2})
VOLUME = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)


@pytest.fixture
def scan(tmp_path, capsys):
    """scan(array or file, *options, expect=status, **geometry): what reconstruct.py says by FBP; OUT is tmp_path/out.
    """
    def scan(data, *options, expect=0, method=("fbp",), **geometry):
        if isinstance(data, np.ndarray):
            np.save(tmp_path / "scan.npy", data)
            data = tmp_path / "scan.npy"
        (tmp_path / "g.json").write_text(json.dumps({k: v for k, v in (SMALL | geometry).items() if v is not None}))
        try:
            status = main([str(data), "--geometry", str(tmp_path / "g.json"), "--out", str(tmp_path / "out"),
                           "--format", "npy", "--method", *method, *map(str, options)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert status == expect, out + err
        return out + err

    return scan


def error(tmp_path, want=None):
    """RMSE in HU of the first slice to the phantom, inside the circle."""
    hu, at = np.load(tmp_path / "out/volume.npy")[0], np.linspace(-1, 1, 64)
    truth = mu_to_hu(phantom(64)) if want is None else want
    return np.sqrt(((hu - truth)[np.add.outer(at**2, at**2) < 1] ** 2).mean())


def tiff(path, pages):
    first, *rest = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=rest)


def test_every_file_holds_the_same_sinograms(tmp_path):
    turned = VOLUME.transpose(1, 0, 2)  # (views, slices, bins)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/lines"], file["deep/angle"], file["name"] = turned, np.arange(4), "text"
    with h5py.File(tmp_path / "b.mat", "w") as file:  # as MATLAB 7.3 writes it: axes from the other end
        file["scan/sinogram"], file["#refs#/a"] = turned.T, turned.T
        file["text"] = np.zeros((4, 5), np.uint16)
        file["text"].attrs["MATLAB_class"] = np.bytes_("char")
    savemat(tmp_path / "c.mat", {"scan": {"sinogram": turned, "angles": np.arange(4), "name": "x"}},
            do_compression=True)
    tiff(tmp_path / "d.tif", turned)
    (tmp_path / "stack").mkdir()
    for i, page in enumerate(VOLUME):
        tiff(tmp_path / f"stack/row_{i + 9}.tiff", [page])  # 9, 10, 11: in the order of numbers, not of letters
    for name in ("a.h5", "b.mat", "c.mat", "d.tif"):
        lines, told = read_sinograms(tmp_path / name, axes="views,slices,bins")
        np.testing.assert_array_equal([lines[i] for i in range(3)], VOLUME, err_msg=name)
        assert told == {"detector_count": 5}
    lines, _ = read_sinograms(tmp_path / "stack")
    np.testing.assert_array_equal([lines[i] for i in (2, 0)], VOLUME[[2, 0]])
    _, told = read_sinograms(tmp_path / "c.mat", "scan/sinogram", axes="views,rows,bins", angles="scan/angles")
    assert told == {"detector_count": 5, "detector_rows": 3, "angles": [0, 1, 2, 3]}
    savemat(tmp_path / "e.mat", {"lines": VOLUME[0].T})
    lines, _ = read_sinograms(tmp_path / "e.mat", axes="bins,views")
    np.testing.assert_array_equal(lines[0], VOLUME[0])
    for name, content in {"a.txt": "0\n90\n180\n270\n", "b.csv": "0, 90, 180, 270\n"}.items():
        (tmp_path / name).write_text(content)
        _, told = read_sinograms(tmp_path / "e.mat", axes="bins,views", angles=str(tmp_path / name))
        assert told["angles"] == [0, 90, 180, 270]


def test_files_that_are_refused(tmp_path):
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("x", (4, 5), "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((4, 5), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", (4, 5))
        file.create_virtual_dataset("x", layout)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "virtual.h5"), "x")
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        file.create_dataset("x", (2**20, 2**20), "f4", chunks=(64, 64))
    savemat(tmp_path / "bomb.mat", {"x": VOLUME}, do_compression=True)
    content = bytearray((tmp_path / "bomb.mat").read_bytes()[:128])
    inside = zlib.compress(struct.pack("<II", 14, 2**32 - 8) + bytes(100))
    (tmp_path / "bomb.mat").write_bytes(content + (struct.pack("<II", 15, len(inside)) + inside) * 3)
    (tmp_path / "old.mat").write_bytes(bytes(200))
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.tif")
    Image.fromarray(VOLUME[0]).save(tmp_path / "sizes.tif", save_all=True,
                                    append_images=[Image.fromarray(VOLUME[0, :2])])
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "a.npz", VOLUME)
    (tmp_path / "a.npz").rename(tmp_path / "archive.npy")
    os.mkfifo(tmp_path / "pipe.tif")  # opening it would wait for ever
    for name, told, lines in (("list", "[]", VOLUME), ("plane", "{}", VOLUME[0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "geometry.json").write_text(told)
        np.save(tmp_path / name / "sinograms.npy", lines)
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"], file["b"] = VOLUME, VOLUME[0]
    (tmp_path / "cut.h5").write_bytes((tmp_path / "two.h5").read_bytes()[:200])
    np.save(tmp_path / "line.npy", np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([{}], object))
    (tmp_path / "g.txt").write_text("x")
    for name, text in {"two.h5": "arrays a, b; name", "cut.h5": "no whole HDF5", "line.npy": "shape",
                       "g.txt": "no sinogram", "object.npy": "no whole .npy",
                       "archive.npy": "no whole .npy array", "pipe.tif": "no regular file",
                       "list": "or a sound geometry.json", "plane": "lacks sinograms.npy or",
                       "external.h5": "in other files", "virtual.h5": "in other files", "link.h5": r"arrays \(none\)",
                       "huge.h5": "GiB|at most 2", "bomb.mat": "12 GiB that must be read at once",
                       "old.mat": "no MATLAB file", "colour.tif": "in colours", "sizes.tif": "different sizes",
                       "empty": "neither DICOM-CT-PD"}.items():
        with pytest.raises(Refused, match=text):
            read_sinograms(tmp_path / name)
    np.save(tmp_path / "v.npy", VOLUME)
    for options, text in (({"axes": "views,bins"}, "has 3 axes"), ({"axes": "views,views,bins"}, "has 3 axes"),
                          ({"angles": "nowhere.txt"}, "no array nowhere.txt"), ({"dark": "1"}, "--flat names"),
                          ({"flat": "1", "dark": "2"}, "flat field of 1 and a dark field of 2"),
                          ({"flat": str(tmp_path / "old.mat")}, "needs .*old.mat, which is no MATLAB file")):
        with pytest.raises(Refused, match=text):
            read_sinograms(tmp_path / "v.npy", **options)


def exchange(path, lines, photons=100000, dark=100, frames=20, degrees=True):
    """Counts of (views, bins) as two rows of a beamline's file, with noise, a dead bin and a ray without photons."""
    rng = np.random.default_rng(0)
    gain = 0.5 + rng.random((2, lines.shape[1]))
    counts = rng.poisson(photons * gain * np.exp(-np.stack([lines] * 2, axis=1))) + dark
    white = rng.poisson(photons * gain, (frames, *gain.shape)) + dark
    counts[:, 0, 80] = white[:, 0, 80] = dark
    counts[7, 0, 100] = dark
    with h5py.File(path, "w") as file:
        file["exchange/data"], file["exchange/data_white"] = counts.astype("u4"), white.astype("u4")
        file["exchange/data_dark"] = np.full((5, *gain.shape), dark, "u2")
        file["exchange/theta"] = np.arange(len(lines)) * (2.0 if degrees else np.radians(2))


def test_counts_of_a_beamline_become_line_integrals(tmp_path, scan):
    exchange(tmp_path / "e.h5", LINES)
    lines, told = read_sinograms(tmp_path / "e.h5")
    assert lines.shape == (2, 180, 250) and told["detector_rows"] == 2 and told["angles"][:2] == [0, 2]
    assert told["photons"] == pytest.approx(100000, rel=0.25)
    assert np.isnan(lines[0][:, 80]).all() and np.isnan(lines[0][7, 100])
    np.testing.assert_allclose(lines[1][:, 125], LINES[:, 125], atol=0.5)
    assert abs((lines[1] - LINES).mean()) < 0.003
    said = scan(tmp_path / "e.h5", angles=None, detector_row_pitch_mm=2)
    assert "slice 1 of the scan has 181 values without counts (0.40%)" in said and "most in bin 81, 100% of" in said
    assert error(tmp_path) < 80 and np.load(tmp_path / "out/volume.npy").shape == (2, 64, 64)


def test_flat_and_dark_may_be_numbers_and_files(tmp_path, scan):
    np.save(tmp_path / "flat.npy", np.full((1, 250), 5000.0))
    np.save(tmp_path / "counts.npy", np.rint(4900 * np.exp(-LINES) + 100).astype(np.uint16))
    scan(tmp_path / "counts.npy", "--flat", tmp_path / "flat.npy", "--dark", 100)
    assert error(tmp_path) < 60
    (tmp_path / "out").rename(tmp_path / "first")
    assert "transmission" in scan(np.exp(-LINES), expect=1)
    scan(np.exp(-LINES), "--flat", 1)
    assert error(tmp_path) < 60
    assert read_sinograms(tmp_path / "scan.npy", flat="1")[1]["photons"] is None
    assert read_sinograms(tmp_path / "counts.npy", flat="5000", dark="100")[1]["photons"] == 4900


@pytest.mark.parametrize("size, merged", [(32, 6), (64, 3), (256, 1)])
def test_the_photons_give_the_noise_of_a_real_scanner(tmp_path, size, merged):
    """As data consistency reckons it (models/consistency.py), of the bins that are left."""
    np.save(tmp_path / "scan.npy", noisy(LINES, 1e5))
    (tmp_path / "g.json").write_text(json.dumps(SMALL | {"water_per_cm": 0.25, "photons": 1e5}))
    job = measured(parse([str(tmp_path / "scan.npy"), "--geometry", str(tmp_path / "g.json"), "--out",
                          str(tmp_path / "out"), "--size", str(size)]))
    clean = to_pixels(job.scanner, LINES[:, :250 // merged * merged].reshape(180, -1, merged).mean(2), size)
    sigma = deviation(clean, job.photons, job.scanner.pixel_cm(size))
    assert job.photons == merged * 1e5 and ((job.read(0)[0] - clean) / sigma).std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("photons", [1e6, 1e5, 1e4, 1e3])
def test_the_noise_of_a_scan_gives_its_photons(photons):
    """Of ellipses with sharp edges, in all views and in few."""
    lines = noisy(LINES, photons)
    assert estimate_photons(lines) == pytest.approx(photons, rel=0.3)
    assert estimate_photons(lines.clip(0)) == pytest.approx(photons, rel=0.3), "air that was cut off tells nothing"
    assert estimate_photons(np.repeat(lines, 30, axis=0)) == pytest.approx(photons, rel=0.3), "of some views"
    assert estimate_photons(lines[::5]) == pytest.approx(photons, rel=0.3)


def test_structure_is_not_taken_for_noise():
    slices = np.stack([np.load(path) for path in sorted(SAMPLE.glob("*.npy"))[:3]])
    y = Reconstructor().simulate(slices, 36).numpy() * pixel_cm(256)
    assert [estimate_photons(lines[0]) for lines in y] == [None] * 3
    assert estimate_photons(LINES) is None and estimate_photons(np.zeros((9, 50), np.float32)) is None
    few = noisy(np.ones((40, 4)), 1e4)
    assert estimate_photons(few) is None and estimate_photons(few.reshape(4, 40)) is not None
    assert estimate_photons(noisy(np.ones((90, 90)), 5e6)) == pytest.approx(5e6, rel=0.1)
    assert estimate_photons(noisy(np.ones((90, 90)), 2e7)) is None
    counts = np.random.default_rng(0).poisson(1e5 * np.exp(-y))
    assert [estimate_photons(lines[0]) for lines in -np.log(counts / 1e5)] == pytest.approx([1e5] * 3, rel=0.3)


def test_a_scan_that_does_not_tell_its_photons_is_told_them(tmp_path):
    def job(**fields):
        (tmp_path / "g.json").write_text(json.dumps(SMALL | fields))
        return measured(parse([str(tmp_path / "scan.npy"), "--geometry", str(tmp_path / "g.json"), "--out",
                               str(tmp_path / "out")]))

    np.save(tmp_path / "scan.npy", noisy(LINES, 1e5))
    found = job()
    assert found.photons == 3 * found.checks["photons"], "a merged bin counts those of three"
    assert found.checks["photons"] == pytest.approx(1e5, rel=0.5)
    assert re.match(r"The noise of this scan is that of \d(\.\d)?e\+0[45] photons a ray; if you know", found.noise)
    known, without = job(photons=2e4), job(photons="none")
    assert (known.photons, known.checks["photons"], known.noise) == (6e4, 2e4, "")
    assert (without.photons, without.checks["photons"], without.noise) == (np.inf, "none", "")
    shared = LINES.copy()
    merged = LINES[:, :249].reshape(180, 83, 3).mean(axis=2)
    shared[:, :249] += np.repeat(noisy(merged, 1e5) - merged, 3, axis=1)
    np.save(tmp_path / "scan.npy", shared)
    assert job().photons == pytest.approx(1e5, rel=0.5), "neighbours with the same noise: merging takes none of it away"
    with pytest.raises(InputError, match="photons are 'some'; expected a number above 0, or \"none\""):
        job(photons="some")


def test_units_of_a_geometry_file(tmp_path):
    (tmp_path / "mm.json").write_text(json.dumps(SMALL | {"angle_offset": 30, "direction": "cw"}))
    cm = {name: value / 10 if name.endswith("_mm") else value for name, value in SMALL.items()}
    (tmp_path / "cm.json").write_text(json.dumps(cm | {
        "length_unit": "cm", "angle_unit": "radian", "angle_offset": np.pi / 6, "direction": "cw",
        "angles": {"start": 0, "step": np.radians(2), "count": 180}}))
    (tmp_path / "short.json").write_text(json.dumps({name.removesuffix("_mm"): value for name, value in SMALL.items()}
                                                    | {"length_unit": "mm", "angle_unit": "radian", "direction": "cw",
                                                       "angle_offset": np.pi / 6,
                                                       "angles": np.radians(2 * np.arange(180)).tolist()}))
    want, *others = (make_scanner(in_degrees(read_in_mm(tmp_path / name)))
                     for name in ("mm.json", "cm.json", "short.json"))
    for other in others:
        np.testing.assert_allclose(other.theta(180), want.theta(180), atol=1e-9)
        assert other.detector_pitch_mm == pytest.approx(3) and other.source_distance_mm == pytest.approx(600)
    radians = {"angles": np.radians(2 * np.arange(180)).tolist()}
    with pytest.raises(InputError, match='180 angles span 6.25 degrees; they look like radians: say "angle_unit"'):
        in_degrees(radians)
    assert in_degrees(radians | {"angle_unit": "degree"}) == radians
    with pytest.raises(InputError, match="expected mm or cm"):
        (tmp_path / "g.json").write_text('{"length_unit": "inch"}')
        read_in_mm(tmp_path / "g.json")


def test_rows_of_a_cone_beam_near_its_plane_are_fan_beams(tmp_path, scan):
    rows = SMALL | {"detector_rows": 40, "detector_row_pitch_mm": 2.2, "detector_row_offset_mm": 1.1}
    fan, near, said = near_plane(rows, 40)
    heights = (np.arange(40) - 19.5) * 2.2 + 1.1
    assert near == np.flatnonzero(abs(heights) < 1100 * np.tan(np.radians(1.2))).tolist() and len(near) == 21
    assert fan["slice_spacing_mm"] == pytest.approx(2.2 * 600 / 1100) and make_scanner(fan)
    assert fan["first_slice_mm"] == pytest.approx(heights[near[0]] * 600 / 1100)
    assert "has 19 rows beyond 1.2 degrees" in said and "RTK, TIGRE or LEAP" in said
    assert near_plane(SMALL, 40) == (SMALL, list(range(40)), "")
    parallel = PARALLEL | {"detector_rows": 40, "detector_row_pitch_mm": 2.2}
    assert near_plane(parallel, 40)[1:] == (list(range(40)), "")
    with pytest.raises(InputError, match="needs detector_row_pitch_mm"):
        near_plane(SMALL | {"detector_rows": 40}, 40)
    with pytest.raises(InputError, match="40 rows beyond 1.2 degrees.*RTK, TIGRE or LEAP"):
        near_plane(rows | {"detector_row_offset_mm": 300}, 40)
    said = scan(np.stack([LINES] * 3, axis=1), "--axes", "views,rows,bins", expect=1, detector_row_pitch_mm=40)
    assert "Refused: the scan has 2 rows beyond 1.2 degrees" in said and "RTK" in said
    assert np.load(tmp_path / "out/volume.npy").shape == (1, 64, 64) and error(tmp_path) < 60


def test_axes_in_another_order_are_named(scan):
    for shape, text in (((3, 250, 180), "try --axes slices,bins,views"), ((1, 250, 180), "try --axes bins,views$"),
                        ((180, 3, 250), "try --axes views,slices,bins, rows instead"),
                        ((250, 180, 3), "try --axes bins,views,slices")):
        with pytest.raises(InputError, match=text):
            check_axes(SCANNER, shape)
    check_axes(SCANNER, (3, 180, 250))
    with pytest.raises(InputError, match=r"expected the same \(views, bins\)$"):
        check_axes(SCANNER, (3, 181, 250))
    assert "try --axes views,slices,bins" in scan(np.stack([LINES] * 3, axis=1), expect=1)


def noisy(lines, photons):
    counts = np.random.default_rng(0).poisson(photons * np.exp(-lines))
    return -np.log(np.maximum(counts, 0.5) / photons).astype(np.float32)


def half_fan():
    """The detector from 84 mm left of the axis on, whose opposite views measure the rest."""
    return LINES[:, 80:], make_scanner(SMALL | {"detector_count": 170, "detector_offset_mm": 120.0})


@pytest.mark.parametrize("lines, scanner", [
    (LINES, SCANNER), (noisy(LINES, 1e4), SCANNER), (noisy(LINES, 1e3), SCANNER),
    (LINES * 10, make_scanner(SMALL | {"water_per_cm": 1.92})), (LINES[::5], SCANNER.thinned(36)[0]),
    (line_integrals(make_scanner(PARALLEL)), make_scanner(PARALLEL)), half_fan(),
], ids=["plain", "10,000 photons", "1,000 photons", "steel", "36 views", "parallel", "half fan"])
def test_a_good_scan_sets_off_no_alarm(lines, scanner):
    assert alarms.check_values(lines, scanner) == []
    left, said = alarms.check_geometry(lines, scanner, 64, "cpu")
    assert said == [] and 0 < left < 0.08


def test_an_alarm_names_the_offset_of_the_whole_detector():
    """Not of the merged bins that it looks at, which leave out those at the end."""
    scanner = make_scanner(SMALL | {"detector_count": 239, "detector_offset_mm": -4.5})
    _, said = alarms.check_scan(LINES[:, 11:], scanner, 32, "cpu")
    found = re.search(r'"detector_offset_mm": ([-\d.]+) \(--find-centre\) it would be [01]', said[0])
    assert float(found[1]) == pytest.approx(16.5, abs=1)


def test_an_image_that_fits_sets_off_no_alarm():
    hu = mu_to_hu(phantom(64))
    assert alarms.check_image(hu, 0.192) == []
    assert "0.384 in the geometry it would be near 0 HU" in alarms.check_image(2 * hu + 1000, 0.192)[0]
    assert "has 58% of the field at 3071 HU" in alarms.check_image(10 * hu + 9000, 0.192)[0]
    assert "object of -800 HU" in alarms.check_image(0.2 * hu - 800, 0.192)[0]


def dead(lines, index):
    lines = lines.copy()
    lines[index] = 0
    return lines


@pytest.mark.parametrize("lines, text", [
    (np.round(4000 * np.exp(-LINES)), "look like counts: give --flat"),
    (np.exp(-LINES), "transmission I/I0.*--flat 1"), (np.round(LINES * 1000), "look like scaled integers"),
    (np.where(np.arange(250) == 9, np.nan, LINES), "holds 180 values that are NaN.* view 1, bin 10"),
    (line_integrals(SQUARE).T, "% of the measurement unexplained.*with --axes bins,views it would be [01]"),
], ids=["counts", "transmission", "scaled", "NaN", "transposed"])
def test_what_cannot_be_right_is_refused_with_its_cause(lines, text):
    scanner = SCANNER if lines.shape[1] == 250 else SQUARE
    with pytest.raises(InputError, match=text):
        alarms.check_values(lines, scanner)
        alarms.check_geometry(lines, scanner, 64, "cpu")


@pytest.mark.parametrize("lines, change, text", [
    (np.roll(LINES, 3, axis=1), {}, 'does not fit.*"detector_offset_mm": -[89].* .--find-centre. it would be [01]'),
    (LINES, {"direction": "cw"}, 'does not fit.*with "direction": "ccw" it would be [01]'),
    (dead(LINES, np.s_[:, 125]), {}, "1 bins that are the same in every view, such as bin 126"),
    (dead(LINES, np.s_[17]), {}, "1 views that are the same in every bin, such as view 18"),
    (LINES[:, 70:180], {"detector_count": 110}, "is truncated"), (0 * LINES, {}, "is 0 everywhere"),
    (LINES - 1.5, {}, "do the flat and dark fields belong"),
], ids=["centre", "direction", "dead bin", "dead view", "truncated", "empty", "negative"])
def test_what_may_be_wrong_is_a_warning(lines, change, text):
    scanner = make_scanner(SMALL | change)
    said = alarms.check_values(lines, scanner) + alarms.check_geometry(lines, scanner, 64, "cpu")[1]
    assert any(re.search(text, one) for one in said), said


def test_a_warning_stands_last_and_in_the_records(tmp_path, scan):
    lines = dead(np.roll(LINES, 3, axis=1), np.s_[17])
    for _ in range(2):  # told again by a run that has nothing to do
        *_, first, second = scan(lines).splitlines()
        assert first.startswith("Warning: slice 1 of the scan has 1 views that are the same in every bin")
        assert second.startswith("Warning: slice 1 of the scan does not fit its geometry: the best image")
        run = json.loads((tmp_path / "out/run.json").read_text())
        assert 0.05 < run["residual"] < 0.15 and len(run["alarms"]) == 2
        assert len((tmp_path / "out/report.csv").read_text().splitlines()) == 3


def test_counts_stop_before_any_work(tmp_path, scan):
    said = scan(np.round(4000 * np.exp(-np.stack([LINES] * 2))), expect=1)
    assert "slice 1 of the scan holds values up to 4000" in said and not (tmp_path / "out").exists()


def test_a_slice_that_is_refused_is_not_written_as_air(tmp_path, scan):
    volume = np.stack([LINES, np.nan * LINES, LINES])
    said = scan(volume, expect=1)
    assert "Refused: slice 2 of the scan holds 45000 values that are NaN" in said and "2 of 3 slices" in said
    assert "volume.npy is not written, as 1 of 3 slices are missing" in said
    assert not list((tmp_path / "out").glob("volume*"))
    scan(volume, "--format", "dicom", "--out", tmp_path / "dicom", expect=1)
    assert sorted(path.name for path in (tmp_path / "dicom").glob("*.dcm")) == ["slice_0001.dcm", "slice_0003.dcm"]
    assert "another source" in scan(np.stack([LINES] * 3), expect=1)


def test_several_methods_have_a_folder_each_and_one_picture(tmp_path, scan):
    said = scan(np.stack([LINES, 0.9 * LINES, LINES]), "--views", 36, method=("sirt", "tv"))
    for method in ("sirt", "tv"):
        run = json.loads((tmp_path / f"out/{method}/run.json").read_text())
        assert run["method"] == method and run["views"] == 36 and f"views by {method}" in said
        hu = np.load(tmp_path / f"out/{method}/volume.npy")
        at = np.linspace(-1, 1, 64)
        error = (hu[1] - mu_to_hu(0.9 * phantom(64)))[np.add.outer(at**2, at**2) < 1]
        assert np.sqrt((error**2).mean()) < 140
    with Image.open(tmp_path / "out/preview.png") as picture:
        assert picture.size == (3 * 320, 360)  # FBP, SIRT, TV
        shown = np.asarray(picture, float)[20:340].reshape(64, 5, 3, 64, 5)[:, 2, :, :, 2]
    np.testing.assert_allclose(shown[:, 2], (np.clip((hu[1] + 1000.0) / 3000, 0, 1) * 255).round(), atol=1)
    before = (tmp_path / "out/preview.png").read_bytes()
    scan(np.stack([LINES, 0.9 * LINES, LINES]), "--views", 36, method=("sirt", "tv"))
    assert (tmp_path / "out/preview.png").read_bytes() == before
    (tmp_path / "out/preview.png").unlink()
    scan(np.stack([LINES, 0.9 * LINES, LINES]), "--views", 36, method=("sirt", "tv"))
    assert (tmp_path / "out/preview.png").read_bytes() == before


def test_a_large_stack_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.arrays.BLOCK", 2 * VOLUME[:, 0].nbytes)
    np.save(tmp_path / "v.npy", VOLUME)
    stack = read_arrays(tmp_path / "v.npy")[""].ordered(1, 0, 2)
    assert stack.shape == (4, 3, 5)
    for i in (3, 0, 1, 2):
        np.testing.assert_array_equal(stack[i], VOLUME[:, i])


def test_the_centre_is_found_where_it_is_asked_for(tmp_path, scan):
    said = scan(np.roll(LINES, 3, axis=1), "--find-centre")
    assert "detector_offset_mm" in said and "Warning" not in said
    assert error(tmp_path) < 60


@pytest.mark.parametrize("degrees, direction", [(0, 1), (40, 1), (40, -1)])
def test_the_drawing_shows_the_scanner(degrees, direction):
    """A point on the drawn line from the source to a bin is seen by that bin."""
    scanner = make_scanner({
        "source_distance_mm": conventions.S, "detector_distance_mm": conventions.D,
        "detector_pitch_mm": conventions.PITCH, "detector_offset_mm": conventions.OFFSET,
        "detector_count": conventions.BINS, "field_of_view_mm": conventions.FIELD, "size": 72,
        "angles": [degrees], "direction": "ccw" if direction == 1 else "cw"})
    source, bins = conventions.places(degrees, direction)
    for index in (1, 3, 4):
        right, up = source + conventions.S / (conventions.S + conventions.D) * (bins[index] - source)
        image = torch.zeros(1, 1, 72, 72)
        image[0, 0, int(36 - up / 5), int(36 + right / 5)] = 1
        assert Degradation(scanner).project(image, 1)[0, 0, 0].argmax() == index


def test_the_drawing_is_what_its_script_draws(tmp_path, call):
    call(conventions.main, "--out", tmp_path / "c.svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert all(name in drawn for name in ("source_distance_mm", "detector_offset_mm", "source at 40")) and \
        len(drawn) < 50_000
