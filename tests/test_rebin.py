"""Helical CT to fan beams: line integrals of ellipsoids, worked out from the words of DICOM-CT-PD, against planes."""

import csv
import json
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from conftest import run

import test as evaluation
from datasets.ctpd import POSITIONS, Scan, read_scan, spot_shifts
from datasets.rebin import Rebinned, main
from datasets.series import Refused
from models.reconstructor import Reconstructor
from models.scanner import make_scanner
from reconstruct import main as reconstruct
from utils.units import mu_to_hu

# Centre and half axes in mm (right, up, into the gantry, seen from the table), attenuation in water: no symmetry.
BODY = [((0, 0, 0), (130, 95, 900), 1.0), ((-60, 15, 4), (35, 45, 30), -0.7), ((65, 35, -5), (14, 14, 12), 0.8),
        ((10, -60, 0), (16, 12, 300), 0.6)]
FIELD, SIZE, WATER = 300.0, 64, 0.0192


def integrals(start, end):
    """Line integrals from start to end, (..., 3) mm."""
    total, way = 0.0, end - start
    for centre, half, value in BODY:
        a, b = (start - centre) / half, way / np.array(half, float)
        aa, ab, cc = ((x * y).sum(-1) for x, y in ((b, b), (a, b), (a, a)))
        total = total + value * WATER * 2 * np.sqrt(np.maximum(ab**2 - aa * (cc - 1), 0)) / aa * np.linalg.norm(way,
                                                                                                              axis=-1)
    return total


def polar(radius, angle, z):
    """The point at a radius and an azimuth, 0 at 12 o'clock and counterclockwise."""
    return np.stack(np.broadcast_arrays(-radius * np.sin(angle), radius * np.cos(angle), z), -1)


def helix(states=((0.0, 0.0, 0.0),), turns=3.0, feed=20.0, rows=16, columns=192, turn=144, start=0.3, **change):
    """A Scan without files."""
    n = round(turn * turns)
    steps, states = np.arange(n), np.array(states, float)
    scan = Scan(files=[("", i, 1.0, 0.0) for i in steps], phi=start + 2 * np.pi * steps / turn,
                z=feed * (steps / turn - turns / 2), state=steps % len(states), states=states, rho=550.0, d0=1000.0,
                columns=columns, rows=rows, du=700 / columns, dv=3.0, cx=(columns + 1) / 2 + 0.25, cy=(rows + 1) / 2,
                shape="curved", position="HFS", turn=turn, water=WATER, diameter=FIELD)
    return replace(scan, **change)


def measure(scan):
    """(views, rows, columns) of a Scan."""
    out, (alpha, reach) = [], scan.cells()
    height = (scan.cy - np.arange(1, scan.rows + 1))[:, None] * scan.dv
    for phi, z, state in zip(scan.phi, scan.z, scan.state, strict=True):
        dphi, dz, drho = scan.states[state]
        cells = polar(scan.rho, phi, 0) + polar(reach, phi + np.pi + alpha, z + height)
        out.append(integrals(polar(scan.rho + drho, phi + dphi, z + dz), cells))
    return np.array(out, np.float32)


def plane(scan, z, views):
    """What an ideal fan beam in the plane z measures, (views, columns)."""
    lam, (alpha, reach) = 2 * np.pi * np.arange(views)[:, None] / views, scan.cells()
    return integrals(polar(scan.rho, lam, z), polar(scan.rho, lam, z) + polar(reach, lam + np.pi + alpha, 0))


def truth(z):
    """HU of the plane z as seen from the table, (SIZE, SIZE), each pixel the mean of 16 points."""
    at = (np.arange(4 * SIZE) + 0.5) * FIELD / SIZE / 4 - FIELD / 2
    x, y = np.meshgrid(at, -at)
    mu = sum(value * (((x - a) / r) ** 2 + ((y - b) / s) ** 2 + ((z - c) / t) ** 2 < 1)
             for (a, b, c), (r, s, t), value in BODY)
    return (mu.reshape(SIZE, 4, SIZE, 4).mean((1, 3)) - 1) * 1000


def in_memory(monkeypatch, views):
    monkeypatch.setattr(Scan, "view", lambda scan, i: views[scan.files[i][1]])


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("pitch", [0.6, 1.0])
def test_the_image_is_that_of_an_ideal_fan_beam(monkeypatch, pitch):
    scan = helix(feed=pitch * 16 * 3 * 0.55, columns=128, turn=120)
    in_memory(monkeypatch, measure(scan))
    lines = Rebinned(scan, spacing=4.0)
    scanner = make_scanner({**lines.geometry(), "size": SIZE})
    solve = Reconstructor(scanner=scanner)

    def error(sinogram, z):
        return rms(mu_to_hu(solve.run("fbp", solve.sinograms(sinogram))[0])[0, 0].numpy() - truth(z))

    assert len(lines) > 5 and (np.diff(lines.heights) == 4).all()
    for i in (1, len(lines) // 2, -2):
        z = float(lines.heights[i])
        assert error(lines[i], z) < 1.15 * error(plane(scan, z, 120), z)


SPOTS = {"angle": ((0.003, 0, 0), (-0.003, 0, 0)), "height and radius": ((0, 1.5, -5), (0, -1.5, 5)),
         "all": ((0.002, 1, -3), (-0.002, 1, -3), (0.002, -1, 3), (-0.002, -1, 3))}


@pytest.mark.parametrize("name, most", [("angle", 1 / 3), ("height and radius", 0.5), ("all", 0.5)])
def test_a_flying_focal_spot_is_corrected(monkeypatch, name, most):
    """What is left is mostly what few columns leave at edges, where two states' columns lie at one place."""
    scan = helix(SPOTS[name], turns=1.5, columns=448, turn=720, rows=8, feed=12)
    in_memory(monkeypatch, measure(scan))
    ideal = plane(scan, 0.0, 720)
    still = replace(scan, states=np.zeros((1, 3)), state=0 * scan.state)
    corrected, ignored = (rms((one := Rebinned(case, 3.0))[list(one.heights).index(0)] - ideal)
                          for case in (scan, still))
    assert corrected < most * ignored


def test_planes_come_in_any_order(monkeypatch):
    scan = helix(turns=2.5, rows=8, columns=48)
    in_memory(monkeypatch, measure(scan))
    lines = Rebinned(scan, 3.0)
    forward = [lines[i] for i in range(len(lines))]
    for i in (len(lines) - 1, 0, 3, 2):
        np.testing.assert_array_equal(lines[i], forward[i])
    assert lines.length < 1.9 * scan.turn, "only views near two planes are in memory"


def test_a_view_that_cannot_be_read_costs_the_planes_that_need_it_alone(monkeypatch):
    scan = helix(turns=6, rows=8, columns=48, feed=12)
    views = measure(scan)
    lines = Rebinned(scan, 6.0)
    middle = len(lines) // 2
    lost = lines.windows[middle + 1][1] - 1

    def view(scan, i):
        if i == lost:
            raise Refused("is lost")
        return views[i]

    monkeypatch.setattr(Scan, "view", view)
    assert not lines.windows[middle][0] <= lost < lines.windows[middle][1] and lost >= lines.windows[0][1]
    want = lines[middle], lines[0]  # the view was read ahead in vain
    with pytest.raises(Refused, match="is lost"):
        lines[middle + 1]
    np.testing.assert_array_equal([lines[middle], lines[0]], want)


def test_an_axial_scan_of_more_than_a_turn(monkeypatch):
    """1.1 turns of one row, with a flying focal spot: the fan beam of its plane."""
    scan = helix(turns=1.1, feed=0.0, rows=1, states=SPOTS["angle"], columns=96)
    in_memory(monkeypatch, measure(scan))
    (height,) = Rebinned(scan).heights
    assert rms(Rebinned(scan)[0] - plane(scan, height, 144)) < 0.02


def write(folder, scan, views, mode="FFSXYZ", swap=False, frames=1, skip=(), **change):
    """A DICOM-CT-PD folder; `change` replaces attributes and tags by name."""
    folder.mkdir(parents=True)
    slope = float(f"{views.max() / 65000:.6e}")
    for number in range(0, len(views), frames):
        file = pydicom.Dataset()
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        file.SOPClassUID, file.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
        file.InstanceNumber, file.Modality, file.PatientID, file.NumberOfFrames = number + 1, "CT", "P1", frames
        file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = *views.shape[:0:-1], 1, \
            "MONOCHROME2"
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation = 15, 0
        file.RescaleSlope, file.RescaleIntercept, file.DataCollectionDiameter = slope, 0, FIELD
        file.PixelData = np.rint(views[number:number + frames].transpose(0, 2, 1) / slope).astype("<u2").tobytes()
        part = slice(number, number + frames)
        dphi, dz, drho = (column.tolist() for column in scan.states[scan.state[part]].T)
        first, second = (dz, dphi) if swap else (dphi, dz)
        tags = {0x70291002: ("FL", scan.du), 0x70291006: ("FL", scan.dv), 0x70291010: ("US", scan.rows),
                0x70291011: ("US", scan.columns), 0x7029100B: ("CS", "CYLINDRICAL"),
                0x70311001: ("FL", (scan.phi[part] % (2 * np.pi)).tolist()),
                0x70311002: ("FL", scan.z[part].round(2).tolist()), 0x70311003: ("FL", scan.rho),
                0x70311031: ("FL", scan.d0), 0x70311033: ("FL", [scan.cx, scan.cy]), 0x7033100B: ("FL", first),
                0x7033100C: ("FL", second), 0x7033100D: ("FL", drho), 0x7033100E: ("CS", mode),
                0x70331013: ("US", scan.turn), 0x70331065: ("FL", [1000.0 + j for j in range(scan.columns)]),
                0x70391009: ("CS", "YES"), 0x70411001: ("DS", "0.0192")} | change.get("tags", {})
        for tag, (vr, value) in tags.items():
            if tag not in skip:
                file.add_new(tag, vr, value)
        if "position" not in skip:
            file.PatientPosition = scan.position
        file.save_as(folder / f"{number:05d}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def small():
    scan = helix(SPOTS["all"], turns=2.2, columns=96, turn=64, rows=8)
    return scan, measure(scan)


@pytest.mark.parametrize("swap, frames", [(False, 1), (True, 1), (False, 2), (False, 10)])
def test_files_say_the_scan(tmp_path, small, swap, frames):
    """Either edition's order of the shifts, one file a view or several frames in one."""
    scan, views = small
    folder = write(tmp_path / "scan", scan, views[:140], swap=swap, frames=frames)
    other = pydicom.dcmread(folder / "00000.dcm")
    del other[0x70291011]
    other.save_as(folder / "00000a.dcm")
    found = read_scan(tmp_path)
    assert found.patient == read_scan(folder).patient != "P1"
    np.testing.assert_allclose(found.phi, scan.phi[:140], atol=1e-5)
    np.testing.assert_allclose(found.z, scan.z[:140], atol=0.0051)
    np.testing.assert_allclose(found.states[found.state], scan.states[scan.state[:140]], atol=1e-6)
    np.testing.assert_allclose(found.view(33), views[33], atol=views.max() / 1e5)
    np.testing.assert_allclose(found.photons, 1000 + np.arange(96))
    others, shifts = found.notes
    assert "1 DICOM files beside" in others and "7033,100" in shifts and "although" not in shifts
    assert found.geometry()["photons"] == pytest.approx(1047.5)


@pytest.mark.parametrize("skip, tags, text", [
    (("position",), {}, "--position"), ((), {0x70391009: ("CS", "NO")}, "LogFlag"),
    ((0x70311031,), {}, "7031,1031"), ((), {0x7033100B: ("FL", 0.5), 0x7033100C: ("FL", 0.7)}, "0.01 radians"),
    ((), {0x7029100B: ("CS", "SPHERICAL")}, "neither"), ((0x70311002,), {}, "lacks the tag .7031,1002"),
    ((), {0x70291002: ("FL", 0.0)}, "expected more than 0")])
def test_what_a_scan_lacks_is_said(tmp_path, small, skip, tags, text):
    scan, views = small
    write(tmp_path / "scan", scan, views[:8], skip=skip, tags=tags)
    with pytest.raises(Refused, match=text):
        read_scan(tmp_path / "scan")


def change_first(folder, syntax=None, **fields):
    path = sorted(folder.iterdir())[0]
    file = pydicom.dcmread(path)
    file.file_meta.TransferSyntaxUID = syntax or file.file_meta.TransferSyntaxUID
    file.update(fields)
    file.save_as(path)


@pytest.mark.parametrize("change, text", [
    ({"NumberOfFrames": 10**9}, "is cut off"), ({"Rows": 97}, "97 x 8 pixels for 96 detector columns"),
    ({"syntax": pydicom.uid.DeflatedExplicitVRLittleEndian}, "is deflated"), ({"InstanceNumber": None}, "lacks"),
    ({"syntax": pydicom.uid.RLELossless, "PixelData": pydicom.encaps.encapsulate([bytes(9)])}, "is compressed")])
def test_a_header_that_claims_too_much_is_refused_at_once(tmp_path, small, change, text):
    scan, views = small
    folder = write(tmp_path / "scan", scan, views[:8])
    change_first(folder, **change)
    with pytest.raises(Refused, match=f"DICOM file 1 of 8 by name .*{text}"):
        read_scan(folder)


def test_what_a_rebinned_scan_cannot_be(tmp_path, small):
    """One view, no turn, back and forth, a place of the focal spot that does not come back."""
    scan, views = small
    write(tmp_path / "scan", replace(scan, state=np.arange(len(views)) // 20), views[:40])
    with pytest.raises(Refused, match="2 places of the focal spot.*that take turns"):
        read_scan(tmp_path / "scan")
    for phi in (scan.phi[:1], scan.phi[:9], np.r_[scan.phi[:70], scan.phi[69]]):
        n = len(phi)
        with pytest.raises(Refused, match="expected a whole turn"):
            Rebinned(replace(scan, phi=phi, z=scan.z[:n], state=scan.state[:n], files=scan.files[:n]))


def test_missing_views_and_several_spectra(tmp_path, small):
    scan, views = small
    folder = write(tmp_path / "a", scan, views[:40])
    (folder / "00020.dcm").unlink()
    with pytest.raises(Refused, match="after view 20.*views are missing"):
        read_scan(folder)
    folder = write(tmp_path / "b", scan, views[:40])
    for i in range(40):
        file = pydicom.dcmread(folder / f"{i:05d}.dcm")
        file.add_new(0x70331063, "US", 1 + i % 2)
        file.save_as(folder / f"{i:05d}.dcm")
    with pytest.raises(Refused, match="spectra 1, 2"):
        read_scan(folder)
    assert len(read_scan(folder, spectrum=2).phi) == 20
    with pytest.raises(Refused, match="2 folders"):
        read_scan(tmp_path)


def test_the_shifts_of_the_spot():
    """Sizes tell which tag is which; rounding is no shift; a mode that says otherwise is named."""
    tiny, mm, none = np.array([3e-4, -3e-4]), np.array([1.0, -1.0]), np.zeros(2)
    for first, second, want in ((tiny, mm, (tiny, mm)), (mm, tiny, (tiny, mm)), (none, tiny, (tiny, none)),
                                (tiny, none, (tiny, none)), (none, mm, (none, mm)), (mm, none, (none, mm)),
                                (tiny / 100, none, (none, none))):
        shifts, _ = spot_shifts(first, second, none, "")
        np.testing.assert_array_equal(shifts.T, [*want, none])
    assert "although" not in spot_shifts(none, mm, 5 * mm, "FFSZ")[1][0], "a slanted anode"
    assert "although its mode is FFSZ" in spot_shifts(tiny, none, none, "FFSZ")[1][0]
    assert spot_shifts(none, none, none, "FFSNONE")[1] == []
    assert "none is corrected" in spot_shifts(none, none, none, "FFSXY")[1][0]


# What a patient's left and front are as seen from the table, from where a supine one lies to decubitus: (x, y).
LEFT_FRONT = {"HFS": ((1, 0), (0, 1)), "FFS": ((-1, 0), (0, 1)), "HFP": ((-1, 0), (0, -1)), "FFP": ((1, 0), (0, -1)),
              "HFDR": ((0, 1), (-1, 0)), "HFDL": ((0, -1), (1, 0)), "FFDR": ((0, 1), (1, 0)),
              "FFDL": ((0, -1), (-1, 0))}


def as_displayed(seen, position):
    """An image as seen from the table, with the patient's left on its right and the front above."""
    (lx, ly), (fx, fy) = LEFT_FRONT[position]
    right, up = np.mgrid[0:SIZE, 0:SIZE][::-1] - (SIZE - 1) / 2
    x, y = lx * right + fx * -up, ly * right + fy * -up
    return seen[np.rint((SIZE - 1) / 2 - y).astype(int), np.rint(x + (SIZE - 1) / 2).astype(int)]


@pytest.mark.parametrize("position", POSITIONS)
def test_the_image_lies_as_the_patient_did(monkeypatch, small, position):
    scan, views = small
    in_memory(monkeypatch, views)
    scan = replace(scan, position=position)
    lines = Rebinned(scan, 2.0)
    solve = Reconstructor(scanner=make_scanner({**lines.geometry(), "size": SIZE}))
    index = len(lines) // 2
    hu = mu_to_hu(solve.run("fbp", solve.sinograms(lines[index]))[0])[0, 0].numpy()
    seen = truth(float(lines.heights[index]))
    errors = {other: rms(hu - as_displayed(seen, other)) for other in POSITIONS}
    assert min(errors, key=errors.get) == position and errors[position] < 0.6 * sorted(errors.values())[1]
    towards_head = np.diff(lines.heights)[0] > 0
    assert towards_head == position.startswith("HF"), "slices run from feet to head"


def written(folder):
    return [pydicom.dcmread(path) for path in sorted(folder.glob("slice_*.dcm"))]


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A head-first and a feet-first scan of one body, as the same patient has them: (folder, its truth by height)."""
    scan = helix(SPOTS["all"], turns=1.8, columns=128, turn=128, rows=8, feed=12)
    views, folder = measure(scan), tmp_path_factory.mktemp("patient")
    write(folder / "HFS", scan, views)
    write(folder / "FFS", replace(scan, position="FFS"), views)
    write(folder / "unknown", scan, views, skip=("position",))
    return folder


@pytest.mark.parametrize("position, method", [("HFS", "spdps"), ("FFS", "fbp")])
def test_from_projections_to_dicom(tmp_path, patient, position, method):
    """The whole chain: files, rebinned, 36 views reconstructed, DICOM with left, front and head where they are."""
    assert main([str(patient / position), "--out", str(tmp_path / "fan"), "--spacing", "3", "--size", str(SIZE)]) == 0
    assert reconstruct([str(tmp_path / "fan"), "--views", "36", "--method", method, "--dc", "4",
                        "--out", str(tmp_path / "dicom")]) == 0
    slices = written(tmp_path / "dicom")
    heights = [float(one.ImagePositionPatient[2]) for one in slices]
    assert heights == sorted(heights) and np.diff(heights).tolist() == [3.0] * (len(slices) - 1)
    middle = slices[len(slices) // 2]
    assert middle.PatientPosition == position and list(middle.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
    hu = middle.pixel_array.astype(float) - 1024
    height = heights[len(slices) // 2] * (1 if position == "HFS" else -1)
    want = as_displayed(truth(height), position)
    assert rms(hu - want) < 130 < rms(hu - want[:, ::-1]) and rms(hu - want[::-1]) > 130


def test_a_folder_of_projections_is_rebinned_by_itself(tmp_path, patient):
    argv = [str(patient / "unknown"), "--method", "fbp", "--size", str(SIZE), "--views", "64", "--out"]
    assert "--position" in run("reconstruct.py", *argv, tmp_path / "a", expect=1)
    assert reconstruct([*argv, str(tmp_path / "b"), "--position", "FFS"]) == 0
    assert {one.PatientPosition for one in written(tmp_path / "b")} == {"FFS"}


def test_a_stopped_run_goes_on(tmp_path, patient, monkeypatch, capsys):
    argv = [str(patient / "HFS"), "--spacing", "2", "--views", "32", "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    made, item = [], Rebinned.__getitem__

    def stop(lines, i):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(i)
        return item(lines, i)

    monkeypatch.setattr(Rebinned, "__getitem__", stop)
    with pytest.raises(SystemExit) as stopped:
        main([*argv, str(tmp_path / "half")])
    assert stopped.value.code == 130
    with open(tmp_path / "half" / ".sinograms.npy", "ab") as file:
        file.write(b"part of a slice")
    with monkeypatch.context() as damaged:
        damaged.setattr(pydicom.pixels, "pixel_array", lambda *given, **options: 1 / 0)
        damaged.setattr(Rebinned, "__getitem__", item)
        with pytest.raises(SystemExit):
            main([*argv, str(tmp_path / "half")])
    assert "HFS has a view that cannot be read: number " in capsys.readouterr().err
    monkeypatch.setattr(Rebinned, "__getitem__", lambda lines, i: made.append(i) or item(lines, i))
    assert main([*argv, str(tmp_path / "half")]) == 0
    whole, half = (np.load(tmp_path / name / "sinograms.npy") for name in ("whole", "half"))
    np.testing.assert_array_equal(half, whole)
    assert made == list(range(len(whole))), "nothing was done twice"
    with pytest.raises(SystemExit):
        main([*argv[:-2], "48", "--out", str(tmp_path / "half")])
    assert "another geometry" in capsys.readouterr().err


def test_truth_for_evaluation(tmp_path, patient):
    """test_img holds the FBP of all views, HU, which a manifest ties to the sinograms."""
    out = tmp_path / "fan"
    argv = [str(patient / "FFS"), "--spacing", "4", "--truth", "--size", str(SIZE), "--out", str(out)]
    assert main(argv) == 0
    files, geometry = sorted((out / "test_img").glob("*.npy")), json.loads((out / "geometry.json").read_text())
    lines = np.load(out / "sinograms.npy")
    assert len(files) == len(lines) and (out / "test_img/manifest.csv").read_text().count("FBP") == len(files)
    want = as_displayed(truth(-geometry["first_slice_mm"]), "FFS")
    assert rms(np.load(files[0]) - want) < 80
    np.testing.assert_allclose(np.load(out / "photons.npy"), 1000 + np.arange(128))
    argv = ["--data", str(out), "--methods", "fbp", "sirt", "--views", "32", "128", "--out"]
    evaluation.main([*argv, str(tmp_path / "r")])
    rows = list(csv.DictReader((tmp_path / "r" / "results.csv").read_text().splitlines()))
    worst = max(float(row["rmse_hu"]) for row in rows if (row["method"], row["views"]) == ("fbp", "128"))
    assert worst < 1, "all views are the truth"
    left = {(row["method"], row["views"]): float(row["held_out"]) for row in rows if row["held_out"]}
    assert set(left) == {("fbp", "32"), ("sirt", "32")}, "of 128 views none is held out"
    assert left["sirt", "32"] < 0.1 and left["sirt", "32"] < left["fbp", "32"]
    assert "unexplained" in (tmp_path / "r/table.md").read_text()
    again = tmp_path / "again"
    with pytest.raises(SystemExit):
        evaluation.main([*argv, str(again), "--photons", "1e5"])
    (out / "test_img/manifest.csv").write_text("file,patient,index\n" + "".join(f"{f.name},A,99\n" for f in files))
    with pytest.raises(SystemExit):
        evaluation.main([*argv, str(again)])
