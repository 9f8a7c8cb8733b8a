"""Archives: processes that die or hang, series that are found, patients that files do not tell."""

import multiprocessing
import os
import random
import threading
import time

import numpy as np
import pytest
from conftest import body, make_dicom, make_series
from PIL import Image
from test_prepare import reasons, run

from datasets import look
from datasets.archive import find_series
from datasets.privacy import pseudonymizer
from datasets.series import LeftOut, Refused, Slice, refuse_on_error
from datasets.slices import evenly_spaced, patients_of
from utils.errors import InputError
from utils.workers import parallel, time_limit

DEADLY = set(random.Random(0).sample(range(300), 7))


def _die(number):
    if number in DEADLY:
        os._exit(11) if number % 2 else os.kill(os.getpid(), 11)
    return number


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_process_that_dies_costs_its_own_task_only(workers):
    files = len(os.listdir("/proc/self/fd"))
    assert parallel(_die, list(range(300)), workers, "dying") == [None if i in DEADLY else i for i in range(300)]
    assert not multiprocessing.active_children() and len(os.listdir("/proc/self/fd")) <= files + 2  # the fork server


def _die_soon(task):
    number, _ = task
    if number % 40 == 7:
        threading.Timer(0.02, os._exit, [11]).start()  # in a later task, or between two
    return number


def test_processes_that_die_at_any_moment_stop_nothing():
    tasks = [(i, bytes(100_000)) for i in range(300)]  # more than a pipe holds
    results = parallel(_die_soon, tasks, 2, "dying soon")
    assert len(results) == 300 and all(found in (i, None) for i, found in enumerate(results))
    assert results.count(None) <= 8


def _fail(number):
    if number == 50:
        raise OSError(28, "No space left on device")
    return number


def test_what_a_process_raises_is_raised():
    with pytest.raises(OSError, match="No space left on device"):
        parallel(_fail, list(range(100)), 2, "failing")
    assert not multiprocessing.active_children()


def _hang(number):
    with time_limit(1):
        while number == 3:
            time.sleep(60)
    return number


@pytest.mark.parametrize("count, workers", [(5, 1), (100, 2)])
def test_a_process_that_hangs_costs_its_own_task_only(count, workers):
    start = time.monotonic()
    assert parallel(_hang, list(range(count)), workers, "hanging") == [None if i == 3 else i for i in range(count)]
    assert time.monotonic() - start < 50


def test_no_tasks_give_no_results():
    assert parallel(_hang, [], 2, "nothing") == []


def test_any_error_of_a_reader_is_a_reason_that_quotes_nothing():
    @refuse_on_error("cannot be read")
    def read(error):
        raise error

    for _ in range(2):  # a decorator serves more than one call
        with pytest.raises(Refused, match=r"^cannot be read \(KeyError\)$") as refusal:
            read(KeyError("Topsecret^Jane"))
        assert isinstance(refusal.value, InputError) and refusal.value.status == 1
    with pytest.raises(LeftOut, match="^is a localiser$"):
        read(LeftOut("is a localiser"))


def test_one_series_is_found_or_the_choice_is_told(tmp_path):
    make_series(tmp_path / "in/a", 3)
    make_series(tmp_path / "in/b", 2, SeriesInstanceUID="1.9")
    (tmp_path / "in/b/notes.txt").write_text("not an image")
    with pytest.raises(InputError, match="2 series .1: 3 slices of a, 2: 2 slices of b.; choose one by --series"):
        find_series(tmp_path / "in", tmp_path / "out")
    slices, names, problems = find_series(tmp_path / "in", tmp_path / "out", 2)
    assert [one.position for one in slices] == [0, 2.5] and names == ["b/0.dcm", "b/1.dcm"]
    assert [(name, status) for name, status, _ in problems] == [("b/notes.txt", "refused")]
    with pytest.raises(InputError, match="holds no slices that can be used .*notes.txt is not an image"):
        find_series(tmp_path / "in/b/notes.txt", tmp_path / "out")


def test_names_of_patients_are_hidden_and_nothing_else(tmp_path):
    make_dicom(tmp_path / "Jane/SECRET-ID/1.dcm")
    _, (name,), _ = find_series(tmp_path / "Jane", tmp_path / "out")
    assert name.startswith("patient-") and "Jane" not in name and "SECRET" not in name and name.endswith("/1.dcm")
    slices = [Slice("x", patient="P", names=("Jane", "Doe"))]
    assert pseudonymizer(slices, keep=False)("Doering/jane.dcm").startswith("Doering/patient-")
    assert pseudonymizer(slices, keep=True)("Jane/Doe") == "Jane/Doe"


def test_a_manifest_tells_patients_or_is_ignored_by_name(tmp_path, capsys):
    np.save(tmp_path / "a.npy", body(8, 0))  # zeros would be a label map
    (tmp_path / "manifest.csv").write_text("file,patient,spacing_mm,position\na.npy,Zoë,0.8,12.5\n", encoding="utf-8")
    assert patients_of([tmp_path / "a.npy"]) == ["Zoë"]
    (one,), _, _ = find_series(tmp_path, tmp_path / "out")
    assert (one.patient, one.spacing, one.position) == ("Zoë", 0.8, 12.5)
    (tmp_path / "manifest.csv").write_text("name,who\na.npy,Z\n")
    for _ in range(2):
        assert patients_of([tmp_path / "a.npy"]) == ["a"]
    said = capsys.readouterr().err
    assert said.count("is ignored: it has the columns 'name', 'who'; expected file and patient") == 1


def test_evenly_spaced_indices():
    assert evenly_spaced(5, 3) == [0, 2, 4] and evenly_spaced(3, 9) == evenly_spaced(3, None) == [0, 1, 2]


def write_nifti(path, hu, affine=None, **header):
    """A NIfTI file of HU (N, H, H), feet first, as DICOM's axes run; `header`: fields to set afterwards."""
    nibabel = pytest.importorskip("nibabel", reason="nibabel is in requirements.txt; without it NIfTI is not read")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-0.8, -0.8, 2, 1]) if affine is None else affine)
    for field, value in header.items():
        image.header[field] = value
    nibabel.save(image, path)


def scan_of(seed):
    return np.stack([body(16, 10 * seed + k) for k in range(2)])


@pytest.mark.parametrize("image, label", [
    ("imagesTr/liver_{}.nii.gz", "labelsTr/liver_{}.nii.gz"), ("case_{}/imaging.nii.gz", "case_{}/segmentation.nii.gz"),
    ("s{}/ct.nii.gz", "s{}/segmentations/liver.nii.gz"), ("{}/ct.nii.gz", "{}/mask.npy"),
    ("scans/{}.nii.gz", "empty/{}.nii.gz")])
def test_label_maps_beside_images_are_left_out(tmp_path, image, label):
    for patient in range(4):
        write_nifti(tmp_path / "in" / image.format(patient), scan_of(patient))
        path, mask = tmp_path / "in" / label.format(patient), (scan_of(patient) > 0) * np.int16("empty" not in label)
        path.parent.mkdir(exist_ok=True)
        np.save(path, mask) if path.suffix == ".npy" else write_nifti(path, mask)
    status, report, rows = run(tmp_path, "--split", "0.5", "0.25", "0.25")
    assert status == 0 and len(rows) == 8 and len({row["patient"] for row in rows}) == 4
    assert len(reasons(report, "left out")) >= 1 and not reasons(report)
    assert len(run(tmp_path, "--trust-hu", out="all")[2]) == 16


def test_several_scans_under_one_name_are_one_patient(tmp_path):
    for phase in ("arterial", "venous"):
        for patient in "ABC":
            write_nifti(tmp_path / f"in/{phase}/{patient}.nii", scan_of(ord(patient)))
    assert {row["patient"] for row in run(tmp_path, "--keep-names")[2]} == {"A", "B", "C"}


def test_deeplesion_is_value_minus_32768_of_a_patient_study_and_series(tmp_path):
    for folder in ("000001_01_01", "000001_02_01", "000002_01_01"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.fromarray((body(16, 1).astype(int) + 32768).astype(np.uint16)).save(tmp_path / "in" / folder / "100.png")
    status, _, rows = run(tmp_path, "--keep-names", "--size", "16", "--split", "0.5", "0.5", "0")
    assert status == 0 and sorted(row["patient"] for row in rows) == ["000001", "000001", "000002"]
    (first, *_) = (tmp_path / "out").rglob("*.npy")
    np.testing.assert_array_equal(np.load(first), body(16, 1))


def test_what_comes_with_images_is_left_out_and_the_rest_is_refused(tmp_path):
    make_series(tmp_path / "in", 2)
    for name in ("._IM0", ".DS_Store", "1.dcm:Zone.Identifier", "Thumbs.db", "AUTORUN.INF", "README.TXT",
                 "dataset.json", "report.pdf", "VERSION", "index.html", "sheet.png"):
        (tmp_path / "in" / name).write_bytes(b"none of the images")
    (tmp_path / "in/more.zip").write_bytes(b"PK")
    status, report, rows = run(tmp_path)
    assert status == 0 and len(rows) == 2 and len(reasons(report, "left out")) == 11
    assert "unpack it" in reasons(report, "warning")["more.zip"]
    (tmp_path / "in/IM7").write_bytes(b"none of the images")
    assert run(tmp_path)[0] == 1


def test_an_archive_s_own_split_is_kept_unless_another_is_asked_for(tmp_path, capsys):
    for part, patients in {"train": "AB", "validation": "C", "test": "D"}.items():
        for patient in patients:
            path = tmp_path / "in" / part / f"{patient}_1.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, body(16, ord(patient)))
    _, _, rows = run(tmp_path, "--keep-names")
    found = {path.parent.name: path.name[0] for path in (tmp_path / "out").rglob("[CD]_*.npy")}
    assert found == {"val_img": "C", "test_img": "D"}
    assert "own folders" in capsys.readouterr().out
    run(tmp_path, "--split", "1", "0", "0", out="one")
    assert len(list((tmp_path / "one/train_img").glob("*.npy"))) == 4
    np.save(tmp_path / "in/test/A_2.npy", body(16, 9))
    with pytest.raises(SystemExit):
        run(tmp_path, out="both")
    assert "1 patient(s) are in several of the input's folders" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbffile,patient\r\na.npy,A\r\n", b"file;patient\r\na.npy;A\r\n", b"File\tPatient\na.npy\tA\n",
    b"sep=;\nfile;patient;spacing_mm\na.npy;A;0,7\n", "file,patient\na.npy,A\n".encode("utf-16")])
def test_manifests_of_spreadsheets_are_read(tmp_path, content):
    np.save(tmp_path / "a.npy", body(8, 0))
    (tmp_path / "manifest.csv").write_bytes(content)
    assert patients_of([tmp_path / "a.npy"]) == ["A"]
    assert find_series(tmp_path, tmp_path / "out")[0][0].spacing == (0.7 if b"0,7" in content else None)


@pytest.mark.parametrize("content", [b"", b"\0\1\2", b"file,patient\na.npy\n,B\n\n", b'file,patient\n"a',
                                     b"file,patient", b"file,patient\na.npy," + b"x" * 200_000, b"id,path\n1,2\n"])
def test_no_manifest_stops_a_program(tmp_path, content):
    np.save(tmp_path / "a.npy", body(8, 0))
    (tmp_path / "manifest.csv").write_bytes(content)
    assert len(patients_of([tmp_path / "a.npy"])) == 1 and look.main([str(tmp_path)]) == 0
    (tmp_path / "manifest.csv").write_bytes("file,patient\na.npy,Müller\n".encode("cp1252"))
    assert patients_of([tmp_path / "a.npy"]) == ["M\\xfcller"]
