"""What goes wrong in a long training, and that nothing done is lost by it."""

import importlib.metadata
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import test as evaluation
import train
from datasets.loader import sample_at
from fig import plot_run
from models import run as training_run
from models import training
from models.epct import loss
from utils.device import memory_advice
from utils.errors import Stopped
from utils.files import writing
from utils.nonfinite import NonFinite
from utils.scalars import Step
from utils.state import newest_state, save_state, versions

FAST = ["--preset", "tiny", "--device", "cpu", "--images", "16", "--epct-start", "2", "--ema-start", "4", "--hops", "1",
        "--precision", "fp32", "--val-every", "16", "--save-every", "4", "--val-slices", "1", "--dc", "1", "--stem",
        "4"]


@pytest.fixture
def go(data, tmp_path, call):
    return lambda *extra, expect=0: call(train.main, *FAST, "--data", data, "--out", tmp_path / "out", *extra,
                                         expect=expect)


def broken_from(calls, is_broken):
    """The loss, not finite in the calls (counted from 1) for which is_broken holds."""
    def broken(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if is_broken(len(calls)) else 1.0)
    return broken


def test_steps_that_are_not_finite_are_skipped_and_counted(go, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "loss", broken_from([], lambda n: n in (2, 5)))
    go("--images", "8")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "skipped" in line] == [2]
    _, state = newest_state(tmp_path / "out")
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {state["step"] - 2}
    assert all(value.isfinite().all() for value in state["network"].values())


def test_many_in_a_row_stop_the_run_with_its_state_and_the_slices_named(go, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "loss", broken_from([], lambda n: n > 4))
    text = go("--patience", "3", "--epct-start", "1000", expect=1)
    assert "3 optimizer steps in a row" in text and "14 images" in text
    _, state = newest_state(tmp_path / "out")
    assert state["seen"] == 14 and state["skipped"] == 3
    assert all(value.isfinite().all() for value in state["network"].values())
    expected = sorted({["A", "B"][int(s) // 4] + f"_{int(s) % 4:03d}.npy"
                       for s in (sample_at(i, 8, 3407, 1)[0] for i in range(8, 14))})
    assert text.strip().endswith("Slices in them: " + ", ".join(expected) + ".")


def test_only_skips_in_a_row_count_and_only_their_slices_are_blamed():
    watch = NonFinite(patience=2)
    step = lambda slices, losses, bad: watch.record(  # noqa: E731
        Step([0] * len(slices), slices, [18] * len(slices), torch.tensor(losses), torch.tensor(1.0), torch.tensor(bad)))
    step([1, 2], [float("nan"), 1.0], 1.0)
    step([3, 4], [1.0, 1.0], 0.0)
    step([5, 6], [1.0, float("inf")], 1.0)
    assert not watch.check() and watch.total == 2
    step([7, 8], [1.0, 1.0], 1.0)  # its gradient alone
    assert watch.check() and watch.total == 3 and watch.blamed == {6} and watch.present == {5, 6, 7, 8}


def test_a_signal_saves_and_the_same_command_goes_on(data, tmp_path, go):
    """SIGTERM, as pre-emption sends it: exit code 143, then bit-identical to the run that was left alone."""
    command = [sys.executable, "train.py", *map(str, FAST), "--data", str(data), "--save-every", "1000", "--out"]
    out = tmp_path / "stopped"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here: their number decides the last bits
    process = subprocess.Popen([*command, str(out)], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, env={**os.environ, **threads})
    while process.poll() is None and not list(out.glob("events.out.tfevents*")):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate()
    if process.returncode:  # else it had just finished
        assert process.returncode == 143 and "the same command resumes" in text
        assert newest_state(out)[1]["seen"] < 16
    go("--save-every", "1000")
    resumed = go("--save-every", "1000", "--out", out)
    assert "Resuming" in resumed
    whole, stopped = (load_file(folder / "checkpoint.safetensors") for folder in (tmp_path / "out", out))
    assert all(torch.equal(whole[k], stopped[k]) for k in whole)


def test_a_state_cut_short_anywhere_is_passed_over(go, tmp_path, capsys):
    go()
    out, rng = tmp_path / "out", random.Random(0)
    before, newest = sorted(out.glob("state-*.pt"))
    content = newest.read_bytes()
    for length in [0, 1, len(content) - 1, *(rng.randrange(len(content)) for _ in range(5))]:
        newest.write_bytes(content[:length])
        path, state = newest_state(out)
        assert path == before and state["seen"] == 12
        assert f"{newest.name} cannot be read" in capsys.readouterr().err
    assert "after 12 of 16" in go()
    assert newest_state(out)[0] == newest


def test_what_is_published_at_the_end_is_the_states(go, tmp_path):
    """Killed between the last state and checkpoint.safetensors, which is then an older one or missing."""
    go("--images", "8")
    published = tmp_path / "out" / "checkpoint.safetensors"
    whole = load_file(published)
    older = {name: value + 1 for name, value in whole.items()}
    for before in (None, older):
        published.unlink()
        if before:
            training_run.save_checkpoint(published, before, train.PRESETS["tiny"].network(), {})
        assert "Done: 8 images" in go("--images", "8")
        _, state = newest_state(tmp_path / "out")
        found = load_file(published)
        assert all(torch.equal(found[name], whole[name]) and torch.equal(found[name], state["ema"][name])
                   for name in whole)


def test_validation_is_what_test_gives_for_the_same_slices(go, data, tmp_path, call):
    go("--images", "4", "--val-every", "4")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [line for line in lines if "val18/mse" in line]
    call(evaluation.main, "--data", data / "val_img", "--limit", 1, "--methods", "one-step", "naive", "--device", "cpu",
         "--checkpoint", tmp_path / "out" / "checkpoint.safetensors", "--out", tmp_path / "test")
    for row in json.loads((tmp_path / "test" / "summary.json").read_text()):
        if row["window"] == [3000, 500]:
            assert validation[f"val{row['views']}/{row['method']}/psnr"] == pytest.approx(row["psnr"], abs=1e-3)


def test_a_run_says_what_it_will_do_and_how_long_it_takes(go, monkeypatch):
    monkeypatch.setattr(training_run, "SHORT", 1)
    text = go("--images", "4", "--hops", "0", "--dc", "0")
    assert "8 slices of 2 patient(s) train." in text and "1 slices of 1 patient(s) validate." in text
    assert re.search(r"million parameters, cpu, 1 process\(es\), 8 slices of 32 x 32: 2 batches and 2 "
                     r"optimizer steps to do, about \d+ min\.", text)


def test_a_writing_leaves_the_previous_state(go, tmp_path):
    go("--images", "8", "--val-every", "100")
    out = tmp_path / "out"
    states = {path: path.read_bytes() for path in out.glob("state-*.pt")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    newest, state = newest_state(out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(Stopped, match="takes no more data.*free some space"):
            save_state(out, 12, state)
        with pytest.raises(Stopped, match="takes no more data.*free some space"), writing(out):
            network = torch.nn.Linear(1000, 1000)
            training_run.save_checkpoint(out / "checkpoint.safetensors", network.state_dict(),
                                         train.PRESETS["tiny"].network(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in out.glob("state-*.pt")} == states
    assert not list(out.glob(".*partial")) and newest_state(out)[0] == newest


def test_slices_that_changed_are_refused_unless_told(go, data):
    go("--images", "8")
    changed = data / "train_img" / "A_000.npy"
    np.save(changed, np.load(changed) + 1)
    assert "--accept-new-data" in go("--images", "8", expect=1)
    text = go("--images", "8", "--accept-new-data")
    assert "slices changed" in text and "Resuming" in text
    assert "Resuming" in go("--images", "8")


def test_out_of_memory_says_which_batch_and_accumulation(go, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(training, "loss", full)
    text = go("--batch", "8", expect=1)
    assert "8 slices at a time" in text and "--accumulate 2" in text and "--batch 4" in text
    with pytest.raises(Stopped, match="--accumulate 8: 1 at a time, --batch 16"), memory_advice(16, 2, 4):
        full()
    with pytest.raises(Stopped, match="one slice at a time"), memory_advice(2, 2, 1):
        full()


def test_how_a_step_is_computed_may_differ_on_resume(go, tmp_path):
    go("--images", "8")
    assert "Resuming" in go("--images", "8", "--accumulate", "2", "--patience", "5")
    path = tmp_path / "out" / "run.json"
    described = json.loads(path.read_text())
    preset = described["preset"]  # as commit a8309e4 wrote it: other names, fields that are gone, one that is younger
    for new, old in {"any_view_share": "between", "focus_share": "focus", "estimates_by": "rollout"}.items():
        preset[old] = preset.pop(new)
    preset |= {"combined": False, "rotate": 0.0, "zoom": 0.0, "translate": 0.0, "starts": 1}
    del preset["update"]
    path.write_text(json.dumps(described | {"preset": preset | {"update": "naive"}}))
    assert "Resuming" in go("--images", "8")
    path.write_text(json.dumps(described | {"preset": preset | {"rotate": 5.0}}))
    assert "begun with rotate 5.0, which this version no longer has" in go("--images", "8", expect=1)
    path.write_text(json.dumps(described | {"preset": preset}))
    assert "another preset (update)" in go("--images", "8", expect=1)
    path.write_text(json.dumps(described | {"preset": preset | {"update": "naive"}}))
    assert "another preset (lr)" in go("--images", "8", "--lr", "0.5", expect=1)


def test_dry_run_prints_configuration_and_cost_and_writes_nothing(go, tmp_path):
    text = go("--dry-run", "--lr", "0.25")
    assert "lr                 0.25" in text and "16 images" in text and "GiB" in text
    assert not (tmp_path / "out").exists()


def test_plot_run_draws_the_curves(go, tmp_path, call):
    go("--images", "8")
    (tmp_path / "out" / "metrics.jsonl").open("a").write('{"images": 9, "loss/res')  # killed while it wrote
    assert "curves.png" in call(plot_run.main, tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "no metrics.jsonl" in call(plot_run.main, tmp_path, expect=1)


def test_versions_are_those_of_what_is_installed(monkeypatch):
    """numba is optional: without it there is nothing to record."""
    found, version = versions(), importlib.metadata.version

    def without_numba(name):
        if name == "numba":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_numba)
    assert versions() == {name: value for name, value in found.items() if name != "numba"} and "torch" in versions()
