"""What cannot be CT in HU, and patients that cannot be right: said or refused by every program, or taken if told."""

import numpy as np
import pytest
from conftest import ROOT, body, make_dicom, make_series, write_slices
from test_prepare import reasons, run

import reconstruct
import test as evaluation
import train
from datasets import look
from datasets.plausible import doubt
from datasets.slices import find_slices, patient_of, read_slice, split_by_patient
from utils.errors import InputError

HU = body(32, 1).astype(np.float32)
NO_HU = {"mu": (HU + 1000) * 0.000192, "unit": (HU + 1024) / 4095, "signed unit": HU / 2048, "stored": HU + 1024,
         "noisy stored": HU + 1000 + np.random.default_rng(0).normal(0, 20, HU.shape), "unsigned": HU + 32768,
         "8 bit": ((HU + 1024) / 16).astype(np.uint8), "labels": (HU > 0) * np.int16(3), "empty": HU * 0,
         "clipped": np.full_like(HU, 3071), "twice shifted": HU - 3000}


def test_hu_are_hu():
    for size in (16, 64, 256):
        assert not any(doubt(body(size, seed)) for seed in range(20))
    for path in (ROOT / "datasets" / "sample").rglob("*.npy"):
        hu = np.load(path)
        assert not doubt(hu) and not doubt(np.where(hu == -1024, -3024, hu)), "whatever is outside the scan circle"


@pytest.mark.parametrize("unit", NO_HU)
def test_what_is_no_hu_is_refused_unless_trusted(tmp_path, unit):
    np.save(tmp_path / "x.npy", NO_HU[unit])
    with pytest.raises(InputError, match="; --trust-hu takes it all the same"):
        read_slice(tmp_path / "x.npy")
    assert read_slice(tmp_path / "x.npy", trust=True).shape == HU.shape


def test_what_may_be_hu_is_a_warning():
    assert doubt(np.full((8, 8), -1024)) == ("warning", "is -1024 HU everywhere")
    assert doubt(np.linspace(-300, 300, 64)) == ("warning", "has no air, its smallest value is -300: is it in HU?")
    assert doubt(np.linspace(-1000, -700, 64))[0] == "warning"


@pytest.fixture
def stored(tmp_path):
    """A data folder in HU + 1024."""
    for part in ("train", "val", "test"):
        folder = write_slices(tmp_path / "in" / f"{part}_img", ("A",), 2, 32)
        for path in folder.glob("*.npy"):
            np.save(path, np.load(path) + 1024)
    return tmp_path / "in"


def test_every_program_checks_hu(stored, tmp_path, call):
    out = ("--out", tmp_path / "out")
    training = ("--data", stored, "--preset", "tiny", "--images", 1, "--device", "cpu")
    assert "HU + 1024" in call(train.main, *training, *out, expect=1)
    testing = ("--data", stored, "--methods", "fbp", "--views", 36, "--device", "cpu")
    assert "HU + 1024" in call(evaluation.main, *testing, *out, expect=1)
    said = call(evaluation.main, *testing, "--trust-hu", "--out", tmp_path / "test")
    assert "patient(s)" in said
    assert "HU + 1024" in call(look.main, stored)
    one = (stored / "test_img" / "A_000.npy", "--views", 36, "--method", "fbp")
    assert "HU + 1024" in call(reconstruct.main, *one, "--out", tmp_path / "r")
    assert "1 of 1 slices" in call(reconstruct.main, *one, "--trust-hu", "--out", tmp_path / "r2")
    status, report, rows = run(tmp_path, "--split", "1", "0", "0")
    assert status == 1 and not rows and all("HU + 1024" in reason for reason in reasons(report).values())
    assert len(run(tmp_path, "--trust-hu", out="trusted")[2]) == 6


def test_what_may_be_wrong_stands_last(data, tmp_path, call):
    np.save(data / "test_img" / "D_000.npy", np.full((32, 32), -1024, np.int16))
    said = call(evaluation.main, "--data", data, "--methods", "fbp", "--views", 36, "--device", "cpu", "--out",
                tmp_path / "out")
    assert said.splitlines()[-1] == ("Warning: 1 of 8 slices may not be what they should: D_000.npy is -1024 HU "
                                     "everywhere.")


def test_dicom_says_that_it_is_hu_and_is_kept_with_a_warning(tmp_path):
    """A label map in a CT file; and pixels without a sign, none of which can be air."""
    make_dicom(tmp_path / "in/1.dcm", pixels=np.arange(256, dtype=np.int16).reshape(16, 16) % 5, RescaleIntercept=0)
    status, report, rows = run(tmp_path)
    assert status == 0 and len(rows) == 1 and "whole numbers" in reasons(report, "warning")["1.dcm"]
    make_dicom(tmp_path / "in/1.dcm", RescaleIntercept=0)
    status, report, rows = run(tmp_path, out="unsigned")
    assert status == 0 and len(rows) == 1 and "none is air" in reasons(report, "warning")["1.dcm"]


@pytest.mark.parametrize("names", [("0000", "0001", "0002"), ("slice1", "slice12"), ("caseA-1", "caseA-2", "caseA-3")])
def test_names_that_make_every_slice_a_patient_are_no_split(tmp_path, names, call):
    (tmp_path / "in/scan").mkdir(parents=True)
    files = [tmp_path / "in/scan" / f"{name}.npy" for name in names]
    for seed, path in enumerate(files):
        np.save(path, body(32, seed))
    with pytest.raises(InputError, match="of a patient of its own .* If it is so, say --patients-from name"):
        split_by_patient(files, 0.5)
    assert len(split_by_patient(files, 0.5, source="name")[0]) >= 1
    training = ("--preset", "tiny", "--data", tmp_path / "in/scan", "--out", tmp_path / "run", "--device", "cpu")
    assert "of a patient of its own" in call(train.main, *training, expect=1)
    assert "By their names, each of" in call(look.main, tmp_path / "in/scan")
    if names[0].isdigit():  # prepare knows the folder
        assert {row["patient"] for row in run(tmp_path, "--keep-names")[2]} == {"scan"}
    else:
        with pytest.raises(SystemExit):
            run(tmp_path)
        assert run(tmp_path, "--split", "1", "0", "0", out="whole")[0] == 0
    rows = run(tmp_path, "--patients-from", "name", "--keep-names", out="named")[2]
    assert {row["patient"] for row in rows} == set(names)
    (tmp_path / "in/scan/manifest.csv").write_text("file,patient\n" + "".join(f"{f.name},P\n" for f in files))
    rows = run(tmp_path, "--patients-from", "manifest", "--keep-names", out="told")[2]
    assert {row["patient"] for row in rows} == {"P"}


def test_one_id_for_all_is_no_split(tmp_path, capsys):
    for name, uid in (("Ann", "1.1"), ("Bob", "1.2"), ("Cid", "1.3")):
        make_series(tmp_path / "in" / name / "CT", 2, PatientID="Anonymous", SeriesInstanceUID=uid)
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "All 3 series are of one patient" in capsys.readouterr().err
    assert run(tmp_path, "--split", "1", "0", "0", out="whole")[0] == 0
    assert "Warning: All 3 series are of one patient" in capsys.readouterr().err
    rows = run(tmp_path, "--patients-from", "folder", "--keep-names", out="folders")[2]
    assert {row["patient"] for row in rows} == {"Ann", "Bob", "Cid"}
    rows = run(tmp_path, "--patients-from", "folder", out="hidden")[2]
    text = (tmp_path / "hidden/report.csv").read_text()
    assert not any(name in row["source"] + text for row in rows for name in ("Ann", "Anonymous"))
    assert len({row["patient"] for row in run(tmp_path, "--patients-from", "name", out="one")[2]}) == 1
    with pytest.raises(SystemExit):
        run(tmp_path, "--patients-from", "manifest", out="none")
    assert "No manifest.csv tells the patient of 6 file(s)" in capsys.readouterr().err


def test_training_and_validation_that_share_a_patient_are_said(data, tmp_path, call):
    np.save(data / "val_img" / "A_009.npy", body(32, 9))
    said = call(train.main, "--preset", "tiny", "--data", data, "--out", tmp_path / "run", "--images", 4, "--batch", 4,
                "--device", "cpu")
    assert "8 slices of 2 patient(s) train." in said and "Warning: 1 patient(s) train and validate, such as A" in said


def test_names_of_known_data_sets():
    assert [patient_of(name) for name in ("L067_FD_1_1.CT.0001.npy", "000001_02_01_103.png", "case_012.npy")] == [
        "L067", "000001", "case"]


def test_slices_of_the_published_preparation_are_read(tmp_path):
    (tmp_path / "test_img").mkdir()
    np.save(tmp_path / "test_img/L506_0.npy", HU[None])
    np.testing.assert_array_equal(read_slice(find_slices(tmp_path, "test")[0]), HU)


def test_a_pointer_or_a_web_page_is_named(tmp_path):
    for content, text in ((b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
                          (b"<!DOCTYPE html><html>", "is a web page")):
        (tmp_path / "A_1.npy").write_bytes(content)
        with pytest.raises(InputError, match=text):
            read_slice(tmp_path / "A_1.npy")
