"""Training at the command line: what it writes, resuming bit for bit, schedules, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run, write_slices
from safetensors.torch import load_file

import train
from models.checkpoint import load_checkpoint
from models.degradation import LEVELS, Degradation
from models.epct import compose, denser_level, loss, measured_level
from models.presets import PRESETS
from models.unet import UNet, UNetConfig

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
    assert losses[-1] < 0.6 * losses[0]


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
    call(train.main, *FAST, "--data", data, "--out", tmp_path / "first", "--images", "8")
    first = tmp_path / "first" / "checkpoint.safetensors"
    tuned = ["--data", data, "--out", tmp_path / "tuned", "--images", "8", "--lr", "0", "--init", first]
    call(train.main, *FAST, *tuned)
    expected = load_file(first)
    found = load_file(tmp_path / "tuned" / "checkpoint.safetensors")
    assert all(torch.equal(value, expected[k]) for k, value in found.items())
    assert "another architecture" in call(train.main, *FAST, *tuned, "--width", "64", expect=1)
    assert "another init" in call(train.main, *FAST, *tuned[:-2], expect=1)


def test_one_folder_is_split_by_patient(tmp_path, call):
    folder = write_slices(tmp_path / "slices", ("L067", "L096", "L109"), 3, 32)
    train_files, val_files = train.split_by_patient(sorted(folder.glob("*.npy")), 0.3)
    assert {f.name[:4] for f in train_files}.isdisjoint({f.name[:4] for f in val_files}) and len(val_files) == 3
    call(train.main, *FAST, "--data", folder, "--out", tmp_path / "out", "--images", "8", "--val-fraction", "0.3")


def test_bad_input_gets_a_sentence_and_nothing_is_overwritten(data, tmp_path, call):
    out = tmp_path / "out"

    def go(*extra, to=out, expect=1):
        return call(train.main, *FAST, "--data", data, "--out", to, *extra, expect=expect)

    assert "invalid choice: 'huge'" in go("--preset", "huge")
    assert "unrecognized arguments: --nonsense" in go("--nonsense", "1")
    assert "does not exist" in go("--data", tmp_path / "missing")
    assert "batch is 0; expected 1 or more" in go("--batch", "0")
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


def test_paper_schedule():
    paper, count = PRESETS["paper"], 4869
    assert (paper.batch, paper.epochs, paper.lr, paper.clip) == (4, 40, 4e-5, 1.0)
    assert (paper.ema, paper.ema_every, paper.ema_start, paper.epct_start) == (0.995, 10, 2000, 2000)
    spans = list(train.batches(count, 4, 40 * count))
    assert len(spans) == 40 * 1218 and spans[1217] == (4868, 4869) and spans[1218] == (4869, 4873)
    rates = [train.learning_rate(paper, 0, 0, epoch) for epoch in range(40)]
    assert [train.steps_of(paper, step) for step in (0, 1999, 2000, 2001)] == [1, 1, 2, 2]
    assert rates == [4e-5] * 25 + [4e-5 * 0.8] * 15
    assert sorted(train.sample_at(i, 7, 5, 3)[0] for i in range(7, 14)) == list(range(7))
    assert (train.validation_due(paper, 4868, 4869, 40 * 4869, 4869), paper.val_sampler) == (True, "sequential")
    ends = [train.validation_due(paper, 0, epoch * 100, 4000, 100) for epoch in (1, 2, 4, 40)]
    assert ends == [True, False, True, True]


def test_composed_levels_are_the_published_draw():
    uniform = np.random.default_rng(0).random((8000, 2))
    draws = np.bincount([denser_level(5, u, jumps=1.0) for u in uniform])
    assert len(draws) == 5 and np.abs(draws - 1600).max() < 150
    assert {denser_level(5, u, jumps=0.0) for u in uniform[:50]} == {4}
    assert denser_level(0, uniform[0], jumps=0.5) == 0


def test_measured_levels():
    uniform = (np.arange(8000) + 0.5) / 8000
    assert (np.bincount([measured_level(u, 0.0) for u in uniform]) == 1000).all(), "the published draw"
    draws = np.bincount([measured_level(u, 0.6) for u in uniform])
    assert np.abs(draws - [400, 400, 400, 400, 2000, 400, 2000, 2000]).max() <= 1


@pytest.mark.parametrize(("step", "expected"), [(10, 1.0), (11, 0.0), (1990, 1.0), (2000, 0.005), (2005, 0.0)])
def test_ema_copies_then_averages(step, expected):
    ema, network = (UNet(UNetConfig(width=32)) for _ in range(2))
    for parameter in ema.parameters():
        parameter.data.zero_()
    train.update_ema(ema, network, step, PRESETS["paper"])
    torch.testing.assert_close(ema.conv_in.weight, expected * network.conv_in.weight)


def test_composed_inputs():
    torch.manual_seed(0)
    x_t, x0_hat = torch.rand(2, 2, 1, 32, 32)
    degrade = Degradation()
    published = torch.cat([x_t[:1] - degrade(x0_hat[:1], 18) + degrade(x0_hat[:1], 54), x0_hat[1:]])
    torch.testing.assert_close(compose(degrade, x_t, [7, 0], x0_hat, [5, 0], "shift"), published, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compose(degrade, x_t, [7, 0], x0_hat, [5, 0], "naive"), degrade(x0_hat, [54, 288]))


def test_losses():
    network = UNet(UNetConfig(width=32, scale=0.1)).eval()
    x0, x = torch.rand(2, 2, 1, 16, 16)
    mse, x0_hat = loss(network, x, [7, 0], x0, "mse")
    torch.testing.assert_close(mse, (x0_hat - x0).square().mean((1, 2, 3)) / 0.1**2)
    torch.testing.assert_close(loss(network, x, [7, 0], x0, "rmse")[0], mse.sqrt())


def test_paper_steps_twice_a_batch_with_the_ema_as_it_stands(data, tmp_path, monkeypatch):
    """One t and one t' a batch; L1's step, the EMA's update, then L2 on what that EMA estimates from x_t."""
    calls, updates = [], []
    plain_forward, plain_update = UNet.forward, train.update_ema

    def forward(network, x, t):
        out = plain_forward(network, x, t)
        calls.append((network, x.detach().clone(), t.tolist(), out.detach().clone(), len(updates)))
        return out

    def update(ema, network, step, preset):
        updates.append(step)
        plain_update(ema, network, step, preset)

    monkeypatch.setattr(UNet, "forward", forward)
    monkeypatch.setattr(train, "update_ema", update)
    monkeypatch.setattr(train, "validate", lambda *_: ({"val18/mse": 1.0}, torch.zeros(1, 4, 4)))
    train.main(["--preset", "paper", "--width", "32", "--data", str(data), "--out", str(tmp_path / "out"), "--images",
                "16", "--epct-start", "2", "--device", "cpu"])
    # Batches 1 and 2 end with k = 1, 2; batch 3 has k = 3 > 2 after L1: EMA call and L2; batch 4 likewise.
    assert [after for *_, after in calls] == [0, 1, 2, 3, 3, 4, 5, 5] and updates == [1, 2, 3, 4, 5, 6]
    for restore, estimate, composed in (calls[2:5], calls[5:8]):
        assert restore[0] is composed[0] and estimate[0] is not restore[0] and estimate[0].training
        assert len(set(restore[2])) == len(set(composed[2])) == 1
        assert torch.equal(estimate[1], restore[1])
        T, s = int(restore[2][0]), int(composed[2][0])
        expected = compose(Degradation(), restore[1], [T] * 4, estimate[3], [s] * 4, "shift")
        torch.testing.assert_close(composed[1], expected)
