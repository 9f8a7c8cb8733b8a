"""Folders to slices for training: resuming, stopping, splits, privacy, the scripts around it."""

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, body, make_dicom, make_series
from PIL import Image

from datasets import look, preprocess_aapm
from datasets.prepare import main, prepare, split_patients
from datasets.series import Slice
from datasets.slices import fingerprint, patient_of
from utils.errors import InputError, RunFolderError


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(tmp_path, *options, source="in", out="out"):
    """(exit status, rows of report.csv, rows of all manifests) of a run on tmp_path/source."""
    status = main([str(tmp_path / source), "--out", str(tmp_path / out), "--size", "8", "--workers", "1", *options])
    rows = [row for path in sorted((tmp_path / out).glob("*/manifest.csv")) for row in table(path)]
    return status, table(tmp_path / out / "report.csv"), rows


def refuses(capsys, text, main, *args):
    """Whether a script ends with status 1 and a sentence that holds `text`."""
    with pytest.raises(SystemExit) as stop:
        main(*args)
    return stop.value.code == 1 and text in capsys.readouterr().err


def reasons(report, status="refused"):
    return {Path(row["file"]).name: row["reason"] for row in report if row["status"] == status}


def test_patients_of_slices_without_a_header(tmp_path):
    for place in ("a/001", "a/002", "b/001", "c/case-7_001", "c/case-7_002", "d/slice_1", "e/slice_1"):
        path = tmp_path / "in" / f"{place}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(len(place)).integers(-1024, 500, (16, 16)))
    _, _, rows = run(tmp_path, "--keep-names")
    assert sorted({row["patient"] for row in rows}) == ["a", "b", "case-7", "d", "e"]
    assert all(patient_of(row["file"]) == row["patient"] for row in rows)


def test_splits_are_by_patient_and_deterministic():
    patients = [f"P{i}" for i in range(10)]
    parts, again, other = (split_patients(patients, ["0.8", "0.1", "0.1"], seed) for seed in (0, 0, 1))
    assert sorted(parts.values()) == ["test", *["train"] * 8, "val"] and parts == again != other
    for count in range(1, 30):
        for split in (["0.8", "0.1", "0.1"], ["0.34", "0.33", "0.33"], ["0", "0", "1"], ["0.5", "0.5", "0"]):
            part_of = split_patients([f"P{i}" for i in range(count)], split, 0)
            wanted = [share for share in split if float(share)]
            assert len(part_of) == count and len(set(part_of.values())) == min(count, len(wanted))
    assert split_patients(["A", "B", "C"], ["train=*", "test=B"], 0) == {"A": "train", "B": "test", "C": "train"}
    assert split_patients(["A", "B", "C"], ["val=A"], 0) == {"A": "val"}
    for split in (["0.5", "0.2", "0.1"], ["nan", "0.5", "0.5"], ["1"], ["train=A", "0.5"], ["test=Z"]):
        with pytest.raises(InputError, match="--split"):
            split_patients(["A"], split, 0)


def test_no_name_no_id_and_no_path_of_a_field_reaches_the_output(tmp_path, capfd):
    make_series(tmp_path / "in/SECRET-ID", PatientID="SECRET-ID")
    make_series(tmp_path / "in/other", PatientID="../../../escape", SeriesInstanceUID="1.2.4", PatientName="")
    make_dicom(tmp_path / "in/other/bad.dcm", PatientID="SECRET-ID", PixelSpacing=[99, 99])
    status, report, rows = run(tmp_path)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    text = "".join(str(path.relative_to(tmp_path)) for path in written) + "".join(
        path.read_text() for path in written if path.suffix != ".npy") + "".join(capfd.readouterr())
    for secret in ("SECRET", "Topsecret", "Jane", "escape"):
        assert secret not in text
    assert status == 1 and len(rows) == 8 and len({row["patient"] for row in rows}) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    _, _, rows = run(tmp_path, "--keep-names", out="named")
    assert {row["patient"] for row in rows} > {"SECRET-ID"}
    assert all(path.resolve().is_relative_to(tmp_path / "named") for path in (tmp_path / "named").rglob("*.npy"))


def test_a_second_run_does_only_what_is_missing_and_refuses_other_options(tmp_path, capsys):
    make_series(tmp_path / "in")
    assert run(tmp_path)[0] == 0
    files = sorted((tmp_path / "out").rglob("*.npy"))
    manifest = (tmp_path / "out/train_img/manifest.csv").read_text()
    lost, content = files[1], files[1].read_bytes()
    before = {path: path.stat().st_mtime_ns for path in files}
    lost.unlink()
    assert run(tmp_path)[0] == 0
    assert lost.read_bytes() == content and (tmp_path / "out/train_img/manifest.csv").read_text() == manifest
    assert {path for path in files if path.stat().st_mtime_ns != before[path]} == {lost}
    for change in (["--volumes"], ["--seed", "1"], ["--split", "0", "0", "1"], ["--keep-names"]):
        assert refuses(capsys, "holds a set of slices with another", run, tmp_path, *change)
    run(tmp_path, "--patients-from", "name", out="told")
    assert refuses(capsys, "with another patients_from", lambda: run(tmp_path, out="told"))
    make_dicom(tmp_path / "in/new.dcm", ImagePositionPatient=[0, 0, -5])  # shifts every number
    assert refuses(capsys, "made from other input", run, tmp_path)
    (tmp_path / "foreign/train_img").mkdir(parents=True)
    np.save(tmp_path / "foreign/train_img/x_000.npy", np.zeros((8, 8)))
    with pytest.raises(RunFolderError, match="made from other input"):
        prepare([str(tmp_path / "in")], tmp_path / "foreign", 8, ["0.8", "0.1", "0.1"], 0, False, False, 1)
    assert manifest == (tmp_path / "out/train_img/manifest.csv").read_text()
    for _ in range(2):  # an output inside the input is not read again
        assert len(run(tmp_path, out="in/prepared")[2]) == 5


def test_contents_decide_what_is_done_again(tmp_path):
    make_series(tmp_path / "in")
    run(tmp_path)
    files = sorted((tmp_path / "out").rglob("*.npy"))
    content, manifest = [path.read_bytes() for path in files], (tmp_path / "out/train_img/manifest.csv").read_bytes()
    source = tmp_path / "in/2.dcm"
    before, stat = source.read_bytes(), source.stat()
    source.write_bytes(before[:-512] + bytes(512))  # other pixels: same size, same time
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    files[0].write_bytes(content[0][:-2] + b"\1\1")  # an output that was damaged
    files[1].write_bytes(content[1][:-9])
    files[3].write_bytes(b"")
    status, _, rows = run(tmp_path)
    assert status == 0 and [path.read_bytes() == kept for path, kept in zip(files, content, strict=True)] == [
        True, True, False, True]
    assert (np.load(files[2]) == -1024).all()
    source.write_bytes(before)
    run(tmp_path)
    assert [path.read_bytes() for path in files] == content
    assert (tmp_path / "out/train_img/manifest.csv").read_bytes() == manifest


def test_names_that_are_no_text_are_names(tmp_path):
    for name in (b"a\xff", b"b\xfe", b"c"):
        for index in range(2):
            with open(os.fsencode(tmp_path) + b"/%s_%03d.npy" % (name, index), "wb") as file:
                np.save(file, body(16, index + len(name)))
    status, _, rows = run(tmp_path, "--keep-names", source="")
    assert status == 0 and len({row["patient"] for row in rows}) == 3 and len(rows) == 6
    files = sorted(tmp_path.glob("*.npy"))
    assert fingerprint(files, np.zeros(1)) != fingerprint(files[1:], np.zeros(1))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"options": 1}', '{"outputs": []}', "\0"])
def test_a_damaged_record_is_named(tmp_path, capsys, text):
    make_series(tmp_path / "in", 1)
    run(tmp_path)
    (tmp_path / "out/prepare.json").write_text(text)
    assert refuses(capsys, "prepare.json", run, tmp_path)


def test_the_number_of_processes_changes_nothing(tmp_path):
    make_series(tmp_path / "in", 40)
    make_dicom(tmp_path / "in/9.dcm", ImagePositionPatient=[0, 0, 22.5], compress=True, damage=True)
    (tmp_path / "in/17.dcm").write_bytes(b"")
    written = []
    for workers in ("1", "3"):
        assert run(tmp_path, "--workers", workers, out=workers)[0] == 1
        files = [path for path in sorted((tmp_path / workers).rglob("*")) if path.is_file()]
        written.append({str(path.relative_to(tmp_path / workers)): path.read_bytes() for path in files})
    assert written[0] == written[1] and len(written[0]) == 38 + 3  # slices; manifest, report, record


def test_a_slice_that_fails_to_decode_is_named_and_the_others_are_written(tmp_path):
    make_series(tmp_path / "in")
    make_dicom(tmp_path / "in/2.dcm", ImagePositionPatient=[0, 0, 5], compress=True, damage=True)
    for options, out in (((), "out"), (("--volumes",), "vol")):
        status, report, rows = run(tmp_path, *options, out=out)
        assert status == 1 and len(rows) == 3 and "decode" in reasons(report)["2.dcm"]


def command(tmp_path, *options):
    return [sys.executable, "-m", "datasets.prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]


def test_command_line(tmp_path):
    make_series(tmp_path / "in")
    (tmp_path / "in/empty.dcm").touch()
    (tmp_path / "options").write_text("--size\n8\n--workers\n2\n")
    done = subprocess.run(command(tmp_path, f"@{tmp_path / 'options'}"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "4 slices of 1 patient" in done.stdout and "1 refused" in done.stderr
    assert "Traceback" not in done.stderr


def test_usage_errors_are_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = [str(tmp_path), "--out", str(tmp_path / "out")]
    for extra, text in ((["--size", "0"], "8 to 4096"), (["--workers", "0"], "at least 1"), (["--none"], "--none"),
                        (["--out", str(tmp_path / "file")], "is a file"), ([f"@{tmp_path / 'none'}"], "No such file")):
        with pytest.raises(SystemExit) as stop:
            main([*argv, *extra])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and text in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("module", ["prepare", "preprocess_aapm", "look", "slices"])
def test_help_and_slices_wait_for_no_heavy_import(module):
    code = f"import sys, datasets.{module}; print({{'torch', 'numba', 'nibabel', 'matplotlib'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


def written(tmp_path):
    return {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*")
            if path.is_file()}


def test_a_writing_ends_with_a_sentence_and_the_same_command_goes_on(tmp_path):
    make_series(tmp_path / "in", 12)
    full = subprocess.run(command(tmp_path, "--size", "64", "--workers", "2"), stderr=subprocess.PIPE, text=True,
                          cwd=ROOT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
    assert full.returncode == 1 and full.stderr.startswith("Stopped: writing failed (")
    assert "repeat the command to go on" in full.stderr and len(full.stderr.splitlines()) == 1
    assert written(tmp_path).keys() == {"prepare.json"}
    assert subprocess.run(command(tmp_path, "--size", "64"), cwd=ROOT).returncode == 0
    assert len(written(tmp_path)) == 12 + 3


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process_and_the_same_command_goes_on(tmp_path, sign):
    make_series(tmp_path / "in", 300)
    whole = command(tmp_path, "--size", "128", "--workers", "2")
    process = subprocess.Popen(whole, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and len(list((tmp_path / "out").glob("*/*.npy"))) < 10:
        time.sleep(0.01)
    (os.killpg if sign == signal.SIGINT else os.kill)(process.pid, sign)  # Ctrl-C reaches the whole group
    said = process.communicate(timeout=60)[1]
    if sign == signal.SIGINT:
        assert process.returncode == 130 and said.startswith("Stopped") and len(said.splitlines()) == 1
        assert not list((tmp_path / "out").rglob("*.partial"))
    end = time.monotonic() + 20
    while (left := running(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    assert not left
    assert len(list((tmp_path / "out/train_img").glob("*.npy"))) < 300
    assert subprocess.run(whole, cwd=ROOT).returncode == 0
    assert len(written(tmp_path)) == 300 + 3


def running(group):
    """Numbers of the processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ends meanwhile
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] * (int(number) == group and state != "Z")
    return found


def test_aapm_names_and_splits(tmp_path, capsys):
    numbers = {"L067": 6, "L333": 4, "L506": 3}
    for patient, count in numbers.items():
        for index in range(count):
            make_dicom(tmp_path / f"{patient}/full_1mm/{patient}_FD_1_1.CT.{index:04d}.IMA", PatientID="x",
                       SeriesInstanceUID=f"1.{patient[1:].lstrip('0')}", ImagePositionPatient=[0, 0, -index])
    argv = [str(tmp_path), "--size", "8", "--workers", "1", "--out"]
    names = {}
    for split in ("patient", "aapm-published"):
        assert preprocess_aapm.main([*argv, str(tmp_path / split), "--split", split]) == 0
        names[split] = {part: sorted(path.name for path in (tmp_path / split / f"{part}_img").glob("*.npy"))
                        for part in ("train", "val", "test")}
    assert [[len(files) for files in parts.values()] for parts in names.values()] == [[6, 4, 3], [9, 1, 3]]
    assert names["aapm-published"]["val"] == ["L333_FD_1_1.CT.0003.npy"]  # the cut goes through L333
    assert names["patient"]["test"][0] == "L506_FD_1_1.CT.0000.npy" and patient_of(names["patient"]["val"][0]) == "L333"
    assert refuses(capsys, "full_1mm", preprocess_aapm.main, [str(tmp_path / "patient"), "--out", str(tmp_path / "z")])


def test_aapm_as_tcia_has_it_full_dose_only(tmp_path, capsys):
    for dose, uid in (("Full", "1.1"), ("Low", "1.2")):
        make_series(tmp_path / f"in/L067/08-25-2018-1/1.000000-{dose} Dose Images-{uid}", 2, PatientID="L067",
                    SeriesInstanceUID=uid, SeriesDescription=f"{dose} Dose Images", ConvolutionKernel=f"B{uid}")
    assert preprocess_aapm.main([str(tmp_path / "in"), "--out", str(tmp_path / "aapm"), "--size", "8"]) == 0
    rows = table(tmp_path / "aapm/train_img/manifest.csv")
    assert len(rows) == 2 and all("Full Dose" in row["source"] for row in rows)
    for only in ("full DOSE", "b1.1"):
        status, report, rows = run(tmp_path, "--split", "1", "0", "0", "--only", only, out=only)
        assert status == 0 and len(rows) == 2 and len(reasons(report, "left out")) == 2
    _, report, rows = run(tmp_path, "--split", "1", "0", "0")
    assert len(rows) == 4 and "series of lower dose" in reasons(report, "warning")["0.dcm"]


def test_published_cut_has_the_published_numbers():
    counts = {"L067": 560, "L096": 823, "L109": 318, "L143": 585, "L192": 600, "L286": 525, "L291": 856, "L310": 533,
              "L333": 610, "L506": 526}
    slices = [Slice(f"{p}_{i:04d}.IMA", patient=p) for p, n in counts.items() for i in range(n)]
    parts = preprocess_aapm.split_slices(slices, "aapm-published")
    assert [sum(part == name for part, _ in parts) for name in ("train", "val", "test")] == [4869, 541, 526]
    assert sum(part == "train" and one.patient == "L333" for part, one in parts) == 69


def test_look_tells_what_is_odd(tmp_path, capsys):
    make_series(tmp_path / "in")
    make_series(tmp_path / "in/two", SeriesInstanceUID="1.9", PatientID="other", pixels=np.eye(16, dtype=np.uint16))
    run(tmp_path, "--split", "0.5", "0.5", "0")
    assert look.main([str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "4 slices in 4 files of 1 patients" in said and "8 x 8 int16" in said and "1.400" in said
    assert Image.open(tmp_path / "out/sheet.png").size[0] > 100
    folder = tmp_path / "out/train_img"
    first, second, third, _ = sorted(folder.glob("*.npy"))
    np.save(first, np.zeros((8, 8), np.int16))
    np.save(second, np.full((8, 8), np.nan))
    third.rename(tmp_path / "out/val_img" / third.name)
    look.main([str(tmp_path / "out")])
    said = capsys.readouterr().out
    for text in ("0 HU everywhere", "NaN", "differs from the hash", "is not there", "not in manifest", "share patient"):
        assert text in said, text
    assert refuses(capsys, "no .npy files", look.main, [str(tmp_path)])
