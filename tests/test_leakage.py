"""Slices and patients of a training are noticed when they are evaluated."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import body, write_slices

import test as evaluation
import train
from datasets.leakage import DIGITS, met_again, together, traces
from models.checkpoint import load_checkpoint

FAST = ["--preset", "tiny", "--device", "cpu", "--images", "4", "--precision", "fp32", "--val-every", "4", "--dc", "0",
        "--val-slices", "1", "--stem", "4"]


@pytest.fixture
def trained(data, tmp_path, call):
    call(train.main, *FAST, "--data", data, "--out", tmp_path / "run")
    return tmp_path / "run" / "checkpoint.safetensors"


def test_an_evaluation_says_what_took_part_in_training(data, trained, tmp_path, call, capsys):
    def go(folder, *more):
        out = tmp_path / f"{folder.name}{len(more)}"
        text = call(evaluation.main, "--data", folder, "--out", out, "--checkpoint", trained, "--views", 36,
                    "--methods", "one-step", "--device", "cpu", *more)
        return text.strip().splitlines()[-1], {json.dumps(row["in_training"]) for row in
                                               json.loads((out / "summary.json").read_text())}

    last, found = go(data / "train_img")
    assert last.startswith("Warning: 8 of these slices and 2 of their patients, by name, took part in the training")
    assert found == {'{"slices": 8, "patients": 2}'}
    last, found = go(write_slices(tmp_path / "new", "C", 1, 64))
    assert found == {'{"slices": 0, "patients": 0}'} and "took part" not in last
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "A_999.npy", body(32, 5000))                              # another slice of patient A
    np.save(other / "Z_000.npy", np.load(data / "train_img" / "B_000.npy"))  # a slice of B by another name
    assert go(other)[1] == {'{"slices": 1, "patients": 1}'}
    last, found = go(data / "train_img", "--checkpoint", "tiny")
    assert found == {'"unknown"'} and "took part" not in last


def test_what_a_run_saw_before_is_kept(data, trained, tmp_path, call):
    """Slices of before --accept-new-data, and of the weights of --init; these were "unknown" before."""
    old = load_checkpoint(trained)[1]["traces"]
    changed = data / "train_img" / "A_000.npy"
    np.save(changed, np.load(changed) + 1)
    call(train.main, *FAST, "--data", data, "--out", tmp_path / "run", "--accept-new-data")
    found = load_checkpoint(trained)[1]["traces"]
    assert len(found["slices"]) == 9 * DIGITS and found["complete"] and found["patients"] == old["patients"]
    more = write_slices(tmp_path / "more" / "train_img", "GH", 1, 32)
    for i, path in enumerate(sorted(more.iterdir())):
        np.save(path, body(32, 5000 + i))  # which no other slice holds
    write_slices(tmp_path / "more" / "val_img", "I", 1, 32)
    call(train.main, *FAST, "--data", tmp_path / "more", "--out", tmp_path / "tuned", "--init", trained)
    tuned = load_checkpoint(tmp_path / "tuned" / "checkpoint.safetensors")[1]["traces"]
    assert len(tuned["slices"]) == 11 * DIGITS and len(tuned["patients"]) == 4 * DIGITS


def test_hashes_are_of_contents_and_of_names_that_say_something(tmp_path):
    folder = write_slices(tmp_path / "a", "AB", 2, 16)
    files = sorted(folder.glob("*.npy"))
    hu = np.stack([np.load(f) for f in files]).astype(np.float32)
    known = traces(files, hu)
    assert met_again(known, traces(files[:1], hu[:1].astype(np.int16).astype(np.float32)))["slices"] == 1
    air = np.full((1, 16, 16), -1000, np.float32)
    assert traces(files[:1], air)["slices"] == "", "all air is alike"
    bare = [tmp_path / "0001.npy", tmp_path / "0002.npy"]
    assert traces(bare, hu[:2])["patients"] == "", "numbers are no patients"
    assert together(known, None)["complete"] is False and together(known, known) == known
    assert met_again(together(known, None), traces(bare, hu[:2] + 5)) == "unknown" == met_again(None, known)
    assert met_again(together(known, None), known) == {"slices": 4, "patients": 2}


def test_the_header_stays_small():
    hu = np.arange(10_000 * 4, dtype=np.float32).reshape(-1, 2, 2)
    files = [f"P{i // 100:03d}_{i:05d}.npy" for i in range(10_000)]
    assert len(json.dumps(traces([Path(f) for f in files], hu))) < 102_000
