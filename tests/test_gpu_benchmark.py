"""The benchmark for a GPU, rehearsed on the CPU: every section measures, and none can hide another."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import run

from benchmarks import gpu, gpu_rows
from models.schedule import budget
from utils.errors import InputError


def test_every_section_works(tmp_path):
    text = run("-m", "benchmarks.gpu", "--rehearse", "--device", "cpu", "--out", tmp_path / "new" / "gpu.json")
    found = json.loads((tmp_path / "new" / "gpu.json").read_text(encoding="utf-8"))
    assert list(dict.fromkeys(row["section"] for row in found["rows"])) == list(gpu_rows.SECTIONS)
    assert all(row["value"] > 0 and row["met"] is None and row["name"] in text for row in found["rows"])
    assert len({row["name"] for row in found["rows"]}) == len(found["rows"])
    assert {"device", "driver", "torch", "triton", "commit"} <= set(found["machine"])
    goals = {row["name"]: row["goal"] for row in found["rows"] if row["goal"]}
    assert len(goals) == 41, "and two of MFU, for cards whose peak is known"
    assert goals["D72 replayed, batch 8"] == "≤ 10" and goals["FP 18: ASTRA / ours, batch 8"] == "≥ 10"


def test_training_leaves_a_checkpoint_and_its_tables(data, tmp_path):
    command = ("-m", "benchmarks.gpu", "--rehearse", "--device", "cpu", "--only", "--train", 0.05, "--data", data,
               "--out", tmp_path / "gpu.json")
    assert "images/s" in run(*command)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["training"]
    assert found["status"] == 0 and found["images"] >= 2 and Path(found["checkpoint"]).is_file()
    for split, slices in (("val", 4), ("test", 8)):
        assert {row["method"] for row in found[split]} == {"fbp", "sequential", "spdps"}
        assert (tmp_path / "gpu-small" / split / "results.csv").read_text().count("spdps") == 3 * slices
    assert "gpu-small exists" in run(*command, expect=1)


def test_a_schedule_is_as_long_as_its_time():
    """Three calls a restore input, five more inputs of three once hops begin; phases keep their shares."""
    preset = gpu.preset_of(["--preset", "small"])
    images, flags = gpu.fit(preset, 558, 64, 18 * 50_000)
    fitted = gpu.preset_of(["--preset", "small", "--images", str(images), *flags])
    assert 0.99 < budget(fitted, 558)[2] / (18 * 50_000) <= 1
    assert fitted.epct_start / preset.epct_start == pytest.approx(images / preset.images, abs=0.1)
    assert images < preset.images and fitted.warmup < preset.warmup and 4 <= images / fitted.val_every < 5
    longer, flags = gpu.fit(preset, 558, 64, 18 * 400_000)
    assert longer > preset.images and gpu.preset_of(["--preset", "small", *flags]).warmup == preset.warmup


@pytest.fixture
def bench(tmp_path):
    """A Bench whose rows are in bench.sent."""
    sent = []
    bench = gpu_rows.Bench("cpu", True, tmp_path, sent.append, section="card")
    bench.sent = sent
    return bench


def test_a_row_that_fails_says_why_and_the_next_is_measured(bench):
    assert bench.row("bad", lambda: 1 / 0, "s", at_most=1) is None
    assert bench.row("good", lambda: 2, "s", at_most=1) == 2
    bench.rehearsal = False
    for value in (2, 1):
        bench.row("judged", lambda value=value: value, "s", at_most=1)
        bench.row("judged", lambda value=value: value, "s", at_least=1.5)
    bench.ratio("of what failed", None, 2)
    bench.deadline = 0
    bench.row("late", lambda: 1, "s")
    assert [row["met"] for row in bench.sent] == [None, None, False, True, True, False, None]
    assert bench.sent[0]["note"] == "ZeroDivisionError: division by zero" and "no time" in bench.sent[-1]["note"]


def test_a_median_waits_for_enough_calls_and_ends_at_its_deadline(bench):
    calls = []
    bench.rehearsal = False
    assert 0.001 < gpu_rows.seconds(bench, lambda: (calls.append(0), time.sleep(0.001))) < 0.1
    assert len(calls) > 20
    calls.clear()
    bench.deadline = time.monotonic()
    gpu_rows.seconds(bench, lambda: calls.append(0), each=True)
    assert len(calls) == 3, "two to warm up, one to measure"


def test_a_machine_without_astra_gets_a_line(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "astra", None)
    gpu_rows.astra(bench)
    (line,) = bench.sent
    assert "not installed" in line["name"] and line["note"] == gpu_rows.LEFT_OUT


def test_a_process_that_lost_its_gpu_ends_after_saying_so(monkeypatch, tmp_path):
    """The next sections then get a new one."""
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(gpu_rows, "synchronize", lost)
    monkeypatch.setattr(os, "setsid", lambda: None)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    gpu_rows.work(theirs, ["card", "calls"], {"card": time.monotonic() + 60}, "cpu", True, tmp_path)
    theirs.close()
    found = {"machine": {}, "rows": []}
    left = gpu.listen(ours, ["card", "calls"], {"card": time.monotonic() + 60}, found)
    assert left == ["calls"] and found["machine"]
    assert [row["note"] for row in found["rows"]] == [
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "the GPU is lost: RuntimeError: CUDA error: an illegal memory access was encountered", "its process ended"]


def row(section: str) -> dict:
    return {"section": section, "name": section, "value": 1.0, "unit": "s", "goal": "≤ 2", "met": True, "note": ""}


def test_a_section_that_hangs_is_given_up(capsys):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    for message in (("row", row("card")), ("done", "card"), ("row", row("calls"))):
        theirs.send(message)
    found, now = {"machine": {}, "rows": []}, time.monotonic()
    ends = {"card": now + 60, "calls": now - gpu.GRACE + 0.2, "cg": now + 60}
    assert gpu.listen(ours, list(ends), ends, found) == ["cg"]
    assert [(row["section"], row["value"]) for row in found["rows"]] == [("card", 1), ("calls", 1), ("calls", None)]
    shown = capsys.readouterr().out.splitlines()
    assert "goal ≤ 2: met" in shown[0] and "its time is over" in shown[2]


def dies(connection, names, ends, device, rehearsal, folder):
    """In place of gpu_rows.work: each section measures and is done, but in "calls" the process ends."""
    for name in names:
        connection.send(("row", row(name)))
        if name == "calls":
            os._exit(1)
        connection.send(("done", name))


def test_a_section_whose_process_dies_hides_no_other(monkeypatch):
    monkeypatch.setattr(gpu, "work", dies)
    found = {"machine": {}, "rows": []}
    gpu.measure(Namespace(only=["card", "calls", "cg"], device="cpu", rehearse=True), found)
    assert [(row["section"], row["value"]) for row in found["rows"]] == [
        ("card", 1), ("calls", 1), ("calls", None), ("cg", 1)]
    assert found["rows"][2]["note"] == "its process ended"


def hangs(connection):
    """A process that starts another and waits for ever."""
    os.setsid()
    connection.send(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    time.sleep(600)


def test_a_process_ends_with_all_that_it_started():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=hangs, args=(theirs,))
    worker.start()
    child = Path("/proc", str(ours.recv()), "stat")
    gpu.end(worker)
    assert not worker.is_alive()
    for _ in range(100):
        if not child.is_file() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the process had started still runs")


def test_what_cannot_be_asked_gets_a_sentence(data, tmp_path, call):
    def go(*argv, expect):
        return call(gpu.main, "--device", "cpu", "--out", tmp_path / "gpu.json", *argv, expect=expect)

    assert "a CPU can only --rehearse" in go(expect=1)
    assert "--train and --data go together" in go("--train", 3, expect=2)
    assert "--train 1.0: expected a number of at least 2" in go("--train", 1, "--data", data, expect=2)
    assert "does not exist" in go("--rehearse", "--train", 1, "--data", tmp_path / "nowhere", expect=1)
    with pytest.raises(InputError, match="does not pay"):
        gpu.fit(gpu.preset_of(["--preset", "small"]), 8, 64, 1)
    assert not (tmp_path / "gpu.json").exists()
