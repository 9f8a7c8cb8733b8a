"""Training at the command line: what it writes, resuming bit for bit, schedules, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from conftest import ROOT, run, write_slices
from safetensors.torch import load_file

import train
from datasets.loader import load_slices
from datasets.slices import split_by_patient
from models.checkpoint import load_checkpoint
from models.levels import LEVELS

FAST = ["--preset", "tiny", "--device", "cpu", "--images", "48", "--epct-start", "2", "--ema-start", "4", "--hops", "2",
        "--precision", "fp32", "--val-every", "16", "--save-every", "8", "--val-slices", "2"]


def test_train_writes_a_checkpoint_with_its_configuration(data, tmp_path):
    out = tmp_path / "out"
    text = run("train.py", *FAST, "--data", data, "--out", out)
    assert "48 images" in text
    network, header = load_checkpoint(out / "checkpoint.safetensors")
    assert header["images"] == 48 and header["levels"] == list(LEVELS) and header["protocol"] == "cvg"
    assert header["training"]["seed"] == 3407 and header["preset"] == "tiny" and not network.training
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"val18/naive/psnr", "val72/one-step/ssim", "val18/mse"} <= {key for line in lines for key in line}
    assert len(list(out.glob("state-*.pt"))) == 2
    assert list(out.glob("events.out.tfevents*"))


def test_learning_lowers_the_loss(data, tmp_path, call):
    call(train.main, *FAST, "--data", data, "--out", tmp_path / "out", "--images", "400", "--warmup", "20",
        "--val-every", "400", "--save-every", "400", "--epct-start", "1000", "--augment")
    losses = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/restore"] for line in losses if "loss/restore" in line]
    assert losses[-1] < 0.8 * losses[0]  # root mean squares


def test_killed_and_restarted_ends_bit_identical(data, tmp_path):
    command = ["train.py", *FAST, "--data", data]
    run(*command, "--out", tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, *map(str, command), "--out", str(out)], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = len(list(out.glob("state-*.pt")))
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline and len(list(out.glob("state-*.pt"))) == before < 2:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(*command, "--out", out)
    whole, killed = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)


def test_a_truncated_state_is_passed_over(data, tmp_path, call):
    out = tmp_path / "out"
    call(train.main, *FAST, "--data", data, "--out", out)
    finished = load_file(out / "checkpoint.safetensors")
    newest = sorted(out.glob("state-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    text = call(train.main, *FAST, "--data", data, "--out", out)
    assert newest.name in text and "Resuming" in text
    assert all(torch.equal(value, finished[k]) for k, value in load_file(out / "checkpoint.safetensors").items())


def test_fine_tuning_starts_from_a_checkpoint(data, tmp_path, call):
    plain = [*FAST, "--conditioning", "level", "--channels", "1", "--residual-channel", "two-pass"]
    call(train.main, *plain, "--data", data, "--out", tmp_path / "first", "--images", "8")
    first = tmp_path / "first" / "checkpoint.safetensors"
    tuned = ["--data", data, "--out", tmp_path / "tuned", "--images", "8", "--lr", "0", "--init", first]
    call(train.main, *plain, *tuned)
    expected = load_file(first)
    found = load_file(tmp_path / "tuned" / "checkpoint.safetensors")
    assert all(torch.equal(value, expected[k]) for k, value in found.items())
    call(train.main, *FAST, *tuned[:3], tmp_path / "other", *tuned[4:])
    network, _ = load_checkpoint(tmp_path / "other" / "checkpoint.safetensors")
    assert network.config.conditioning == "log-views" and network.config.anchored
    found, added = network.state_dict(), network.conv_in.weight[:, 4:]
    assert all(torch.equal(value, found[k]) for k, value in expected.items() if k != "conv_in.weight")
    assert torch.equal(network.conv_in.weight[:, :4], expected["conv_in.weight"]) and not added.any()
    back = [*tuned[:3], tmp_path / "back", *tuned[4:-1], tmp_path / "other" / "checkpoint.safetensors"]
    assert "another architecture" in call(train.main, *plain, *back, expect=1)
    wide = [*tuned[:3], tmp_path / "wide", *tuned[4:], "--width", "64"]
    assert "another architecture" in call(train.main, *plain, *wide, expect=1)
    assert "another init" in call(train.main, *plain, *tuned[:-2], expect=1)


def test_one_folder_is_split_by_patient(tmp_path, call):
    folder = write_slices(tmp_path / "slices", ("L067", "L096", "L109"), 3, 32)
    train_files, val_files = split_by_patient(sorted(folder.glob("*.npy")), 0.3)
    assert {f.name[:4] for f in train_files}.isdisjoint({f.name[:4] for f in val_files}) and len(val_files) == 3
    call(train.main, *FAST, "--data", folder, "--out", tmp_path / "out", "--images", "8", "--val-fraction", "0.3")
    folder = folder.rename(tmp_path / "train_img")
    (names, _), (val_names, _), *_ = load_slices(folder, 0.3, 0, 0, 1, True)
    assert {n[:4] for n in names}.isdisjoint(n[:4] for n in val_names), "whatever the folder is called"


def test_bad_input_gets_a_sentence_and_nothing_is_overwritten(data, tmp_path, call):
    out = tmp_path / "out"

    def go(*extra, to=out, expect=1):
        return call(train.main, *FAST, "--data", data, "--out", to, *extra, expect=expect)

    assert "invalid choice: 'huge'" in go("--preset", "huge")
    assert "unrecognized arguments: --nonsense" in go("--nonsense", "1")
    assert "does not exist" in go("--data", tmp_path / "missing")
    for flags, sentence in {"--batch 0": "batch is 0; expected 1 or more", "--jumps 7": "expected a share from 0 to 1",
                            "--dropout 1.5": "expected a share", "--scale 0": "expected a positive number",
                            "--focus-views 18,36": "expected counts from 1", "--lr nan": "lr is nan",
                            "--shift inf": "not finite",
                            "--val-sampler reco": "needs channels 2 and residual_channel two-pass",
                            "--channels 1": "residual_channel anchored needs channels 2"}.items():
        assert sentence in go(*flags.split()), flags
    assert "cannot be used" in go("--device", "tpu")
    (tmp_path / "empty").mkdir()
    assert "no .npy slices" in go("--data", tmp_path / "empty")
    assert not out.exists()
    bad = np.full((32, 32), np.nan, np.float32)
    np.save(data / "train_img" / "A_999.npy", bad)
    np.save(data / "train_img" / "A_998.npy", np.zeros((40, 40)))
    text = go("--images", "8", expect=0)
    assert "A_999.npy holds NaN" in text and "A_998.npy is 40 pixels" in text and "Skipped 2 of 10" in text
    assert "--strict" in go("--strict", to=tmp_path / "strict")
    before = (out / "checkpoint.safetensors").read_bytes()
    assert "another preset" in go("--images", "8", "--lr", "0.5")
    assert "another seed" in go("--images", "8", "--seed", "1")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    assert "not empty" in go(to=tmp_path / "foreign")
    assert (out / "checkpoint.safetensors").read_bytes() == before
