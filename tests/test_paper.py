"""The preset `paper` against method and numbers of Chen et al., MICCAI 2025: schedule, EMA, levels, inputs, losses."""

import copy

import numpy as np
import pytest
import torch
from conftest import write_slices

import models.run
import models.training
import train
from datasets.loader import batches, load_slices, sample_at
from models.degradation import Degradation
from models.drawn import draw_views
from models.epct import compose, next_level
from models.levels import LEVELS
from models.presets import PRESETS
from models.schedule import inputs_of, learning_rate, update_ema, validation_due
from models.unet import UNet, UNetConfig
from utils.state import newest_state


def test_paper_schedule():
    paper, count = PRESETS["paper"], 4869
    assert (paper.batch, paper.epochs, paper.lr, paper.clip) == (4, 40, 4e-5, 1.0)
    assert (paper.ema, paper.ema_every, paper.ema_start, paper.epct_start) == (0.995, 10, 2000, 2000)
    spans = list(batches(count, 4, 40 * count))
    assert len(spans) == 40 * 1218 and spans[1217] == (4868, 4869) and spans[1218] == (4869, 4873)
    rates = [learning_rate(paper, 0, 0, epoch) for epoch in range(40)]
    assert [inputs_of(paper, step) for step in (0, 1999, 2000, 2001)] == [1, 1, 2, 2]
    assert rates == [4e-5] * 25 + [4e-5 * 0.8] * 15
    assert sorted(sample_at(i, 7, 5, 3)[0] for i in range(7, 14)) == list(range(7))
    assert (validation_due(paper, 4868, 4869, 40 * 4869, 4869), paper.val_sampler) == (True, "sequential")
    ends = [validation_due(paper, 0, epoch * 100, 4000, 100) for epoch in (1, 2, 4, 40)]
    assert ends == [True, False, True, True]


def test_composed_levels_are_the_published_draw():
    """t' ~ U{0..t-1}; t - 1 where no jumps are made; level 0 stays."""
    uniform = np.random.default_rng(0).random((8000, 2))
    draws = np.bincount([LEVELS.index(next_level(LEVELS[5], LEVELS, u, jumps=1.0)) for u in uniform])
    assert len(draws) == 5 and np.abs(draws - 1600).max() < 150
    assert {next_level(54, LEVELS, u, jumps=0.0) for u in uniform[:50]} == {72}
    assert {next_level(288, LEVELS, u, 0.5) for u in uniform[:50]} == {288}


@pytest.mark.parametrize(("step", "expected"), [(10, 1.0), (11, 0.0), (1990, 1.0), (2000, 0.005), (2005, 0.0)])
def test_ema_copies_then_averages(step, expected):
    ema, network = (UNet(UNetConfig(width=32)) for _ in range(2))
    for parameter in ema.parameters():
        parameter.data.zero_()
    update_ema(ema, network, step, PRESETS["paper"])
    torch.testing.assert_close(ema.conv_in.weight, expected * network.conv_in.weight)


def test_composed_inputs():
    """x_t - D(x0_hat, n_t) + D(x0_hat, n_s); x0_hat itself at level 0; D(x0_hat, n_s) for "naive"."""
    torch.manual_seed(0)
    x_t, x0_hat = torch.rand(2, 2, 1, 32, 32)
    degrade = Degradation()
    found = compose(degrade, x_t, [18, 288], x0_hat, [54, 288], "shift")
    shifted = x_t[:1] - degrade(x0_hat[:1], 18) + degrade(x0_hat[:1], 54)
    torch.testing.assert_close(found, torch.cat([shifted, x0_hat[1:]]), rtol=1e-4, atol=1e-5)
    found = compose(degrade, x_t, [18, 126], x0_hat, [54, 180], "naive")
    torch.testing.assert_close(found, torch.cat([degrade(x0_hat[:1], 54), degrade(x0_hat[1:], 180)]))


def test_paper_steps_twice_a_batch_with_the_ema_as_it_stands(data, tmp_path, monkeypatch):
    """One t and one t' a batch; L1's step, the EMA's update, then L2 on what that EMA estimates from x_t."""
    calls, updates = [], []
    plain_forward, plain_update = UNet.forward, models.training.update_ema

    def forward(network, x, t):
        out = plain_forward(network, x, t)
        calls.append((network, x.detach().clone(), t.tolist(), out.detach().clone(), len(updates)))
        return out

    def update(ema, network, step, preset):
        updates.append(step)
        plain_update(ema, network, step, preset)

    monkeypatch.setattr(UNet, "forward", forward)
    monkeypatch.setattr(models.training, "update_ema", update)
    monkeypatch.setattr(models.run, "validate", lambda *_: ({"val18/mse": 1.0}, torch.zeros(1, 4, 4)))
    train.main(["--preset", "paper", "--width", "32", "--data", str(data), "--out", str(tmp_path / "out"), "--images",
                "16", "--epct-start", "2", "--device", "cpu"])
    # Batches 1 and 2 end with k = 1, 2; batch 3 has k = 3 > 2 after L1: EMA call and L2; batch 4 likewise.
    assert [after for *_, after in calls] == [0, 1, 2, 3, 3, 4, 5, 5] and updates == [1, 2, 3, 4, 5, 6]
    for restore, estimate, composed in (calls[2:5], calls[5:8]):
        assert restore[0] is composed[0] and estimate[0] is not restore[0] and estimate[0].training
        assert len(set(restore[2])) == len(set(composed[2])) == 1
        assert torch.equal(estimate[1], restore[1])
        n_T, n_s = ([LEVELS[int(t)] for t in call[2]] for call in (restore, composed))
        expected = compose(Degradation(), restore[1], n_T, estimate[3], n_s, "shift")
        torch.testing.assert_close(composed[1], expected)


def plain_loop(network, truths, epochs, seed, epct_start, ema_start):
    """EPCT as the paper and its published code have it, for truths (N, 1, H, H) with N <= 4: one batch an epoch.

    Only the random draws are ours.
    """
    ema, count, k = copy.deepcopy(network), len(truths), 0
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-5, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 25, 0.8)
    degrade = Degradation()

    def step(x, t):
        nonlocal k
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(network(x, torch.full((count,), float(t))), x0).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        k += 1
        if k % 10 == 0:
            for average, value in zip(ema.parameters(), network.parameters(), strict=True):
                average.data = value.data.clone() if k < ema_start else 0.995 * average.data + 0.005 * value.data

    for epoch in range(epochs):
        drawn = [sample_at(i, count, seed, 3) for i in range(epoch * count, (epoch + 1) * count)]
        x0, (_, _, u) = truths[[d[0] for d in drawn]], drawn[0]
        t = int(u[0] * 8)
        x_t = degrade(x0, LEVELS[t])
        step(x_t, t)
        if k > epct_start:
            with torch.no_grad():
                x0_hat = ema(x_t, torch.full((count,), float(t)))
            s = int(u[2] * t)
            step(x_t - degrade(x0_hat, LEVELS[t]) + degrade(x0_hat, LEVELS[s]) if t > 0 else x0_hat, s)
        schedule.step()
    return network.state_dict(), ema.state_dict()


def test_paper_is_the_plain_loop_of_the_paper(tmp_path, monkeypatch):
    """27 epochs, past the first decay of the rate; without dropout, whose draws are not comparable.

    Tolerance: an optimizer step moves a weight by 4e-5, and Adam magnifies the rounding of gradients near its epsilon.
    """
    write_slices(tmp_path / "data" / "train_img", ("A", "B"), 1, 16)
    write_slices(tmp_path / "data" / "val_img", ("C",), 1, 16)
    monkeypatch.setattr(models.run, "validate", lambda *_: ({"val18/mse": 1.0}, torch.zeros(1, 4, 4)))
    train.main(["--preset", "paper", "--width", "32", "--dropout", "0", "--data", str(tmp_path / "data"), "--out",
                str(tmp_path / "out"), "--epochs", "27", "--epct-start", "5", "--ema-start", "25", "--seed", "3407",
                "--precision", "fp64", "--device", "cpu"])
    _, state = newest_state(tmp_path / "out")
    assert state["step"] == 5 + 2 * 22
    (_, slices), *_ = load_slices(tmp_path / "data", 0.1, 0, 3407, 8, True)
    torch.manual_seed(3407)
    network = UNet(UNetConfig(width=32, dropout=0.0)).double()
    expected = plain_loop(network, Degradation().full(slices.double()), 27, 3407, 5, 25)
    for found, plain in zip((state["network"], state["ema"]), expected, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_paper_fields():
    """Every number of the published recipe, and that nothing else is on."""
    paper = PRESETS["paper"]
    assert (paper.optimizer, paper.lr, paper.weight_decay, paper.clip, paper.schedule) == ("adam", 4e-5, 0, 1, "step")
    assert (paper.batch, paper.epochs, paper.images, paper.precision, paper.dropout) == (4, 40, 0, "fp32", 0.1)
    assert (paper.ema, paper.ema_every, paper.ema_start, paper.ema_dropout) == (0.995, 10, 2000, True)
    assert (paper.epct_start, paper.hops, paper.jumps, paper.update) == (2000, 1, 1.0, "shift")
    assert paper.estimates_by == "ema"
    assert (paper.loss, paper.publish, paper.val_sampler) == ("mse", "raw", "sequential")
    assert paper.network() == UNetConfig()
    assert not (paper.augment or paper.per_sample_levels or paper.dc or paper.focus_share or paper.any_view_share)
    assert paper.accumulate == 1 and paper.warmup == 0


def test_the_recorded_seed_draws_these_levels():
    """One t in {0..7} a batch, from its first slice: a run of today repeats those of yesterday."""
    draws = [sample_at(4 * i, 4869, 3407, 3)[2] for i in range(4000)]
    levels = [LEVELS.index(draw_views(u[0], PRESETS["paper"])) for u in draws]
    assert levels[:12] == [3, 3, 5, 6, 1, 7, 4, 5, 4, 2, 0, 4]
    assert np.abs(np.bincount(levels, minlength=8) - 500).max() < 90
    assert all(next_level(LEVELS[t], LEVELS, u[1:], 1.0) > LEVELS[t] or t == 0
               for t, u in zip(levels, draws, strict=True))
