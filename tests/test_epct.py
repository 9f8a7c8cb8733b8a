"""What EPCT draws and minimises beyond the published recipe, which tests/test_paper.py asserts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from datasets.loader import Part
from models.consistency import data_consistency
from models.degradation import LEVELS, Degradation, condition, multiples
from models.epct import begin, denser_views, hop, loss, measured_views, network_input
from models.presets import PRESETS
from models.samplers import sequential
from models.schedule import forward_calls
from models.unet import UNet
from utils.state import newest_state

UNIFORM = (np.arange(8000) + 0.5) / 8000


def test_measurements_at_the_levels_and_in_focus():
    def draws(**fields):
        counts = Counter(measured_views(u, replace(PRESETS["paper"], **fields)) for u in UNIFORM)
        return [counts[n] for n in LEVELS]

    assert draws() == [1000] * 8, "the published draw"
    np.testing.assert_allclose(draws(focus=0.6), [400, 400, 400, 400, 2000, 400, 2000, 2000], atol=1)
    np.testing.assert_allclose(draws(focus=0.6, focus_views="72 18 72"), [400] * 4 + [3600, 400, 400, 2000], atol=1)


def test_a_chain_without_jumps_goes_level_by_level_and_stays_at_the_densest():
    chain, uniform = [126], np.random.default_rng(0).random((5, 2))
    for u in uniform:
        chain.append(denser_views(chain[-1], LEVELS, u, jumps=0.0))
    assert chain == [126, 180, 234, 288, 288, 288]


def test_jumps_reach_every_denser_level_alike():
    uniform = (np.arange(7000) + 0.5) / 7000
    drawn = [denser_views(18, LEVELS, (0.4, u), jumps=0.5) for u in uniform]
    assert {n: drawn.count(n) for n in LEVELS} == {n: 1000 * (n > 18) for n in LEVELS}
    assert denser_views(18, LEVELS, (0.6, 0.0), jumps=0.5) == 36


def test_measurements_between_the_levels():
    """The angle between views is uniform."""
    draws = [measured_views(u, replace(PRESETS["paper"], between=0.5)) for u in UNIFORM]
    between, levels = np.array(draws[:4000]), draws[4000:]
    assert 18 == between.min() < 280 < between.max() <= 288 and {*range(18, 49)} < {*between.tolist()}
    assert abs((between < 34).mean() - 0.5) < 0.03, "1/33.9 is the mean of 1/18 and 1/288"
    assert {n: levels.count(n) for n in LEVELS} == dict.fromkeys(LEVELS, 500)


def test_rmse_weighs_slices_alike():
    """The gradient of each slice has the same norm, however small its error."""
    x0_hat, x0 = torch.rand(2, 2, 1, 16, 16)
    x0_hat[1] = x0[1] + 0.01 * (x0_hat[1] - x0[1])
    x0_hat.requires_grad_()
    torch.testing.assert_close(loss(x0_hat, x0, "rmse", 0.1), loss(x0_hat, x0, "mse", 0.1).sqrt())
    torch.testing.assert_close(loss(x0_hat, x0, "mse", 0.1), (x0_hat - x0).square().mean((1, 2, 3)) / 0.01)
    (gradient,) = torch.autograd.grad(loss(x0_hat, x0, "rmse", 0.1).sum(), x0_hat)
    torch.testing.assert_close(gradient[0].norm(), gradient[1].norm())


def test_charbonnier_is_quadratic_near_zero_and_absolute_far_from_it():
    x0 = torch.zeros(3, 1, 8, 8)
    x0_hat = torch.tensor([0.0, 1e-4, 3.0]).view(3, 1, 1, 1).expand_as(x0)
    torch.testing.assert_close(loss(x0_hat, x0, "charbonnier", 1.0), torch.tensor([0.0, 1e-4**2 / 0.02, 2.99]),
                               rtol=1e-3, atol=1e-8)


def test_spectral_loss_weighs_a_wave_by_its_frequency():
    """cos(2 pi f i/N) has radius f/N: its loss grows with sqrt(f), and white noise has that of rmse."""
    N = 64
    waves = [torch.cos(2 * torch.pi * f * torch.arange(N) / N).expand(1, 1, N, N) for f in (2, 8, 32)]
    found = torch.cat([loss(w, torch.zeros_like(w), "spectral", 1.0) / w.square().mean().sqrt() for w in waves])
    torch.testing.assert_close(found / found[0], torch.tensor([1.0, 2.0, 4.0]))
    noise = torch.randn(64, 1, N, N, generator=torch.Generator().manual_seed(0))
    spectral, rmse = (loss(noise, 0 * noise, kind, 0.1).mean() for kind in ("spectral", "rmse"))
    torch.testing.assert_close(spectral, rmse, rtol=0.01, atol=0)


def test_conditioning_on_log_views_runs_through_the_levels_and_tells_counts_apart():
    """Halfway between two levels in log views lies halfway between their t; beyond the ends it stays."""
    assert [condition(n, "log-views") for n in LEVELS] == list(range(8))
    assert condition(30, "level") == condition(36, "level") == 6.0
    assert condition(108, "log-views") == pytest.approx(3 + np.log(126 / 108) / np.log(126 / 72))
    assert condition(6, "log-views") == 7 and condition(720, "log-views") == 0


def test_a_combined_update_steps_once_a_batch(data, tmp_path, call):
    command = ["--preset", "tiny", "--data", data, "--images", "8", "--epct-start", "2", "--hops", "2", "--device",
               "cpu", "--precision", "fp32", "--val-slices", "1"]
    for flag, steps in (("--combined", 4), ("--no-combined", 2 + 2 * 3)):
        call(train.main, *command, flag, "--out", tmp_path / flag)
        assert newest_state(tmp_path / flag, "cpu")[1]["step"] == steps
        text = (tmp_path / flag / "metrics.jsonl").read_text()
        assert "loss/restore" in text and "loss/compose" in text


def test_an_anchored_residual_is_that_of_the_measurement_in_training_as_in_sampling():
    """Beside x_T nothing; then tanh(D(x0_hat, n_T) - x_T) of the network's last estimate, before data consistency."""
    x0 = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    preset = replace(PRESETS["tiny"], jumps=0.0, focus=0.0, between=0.5, hops=3)
    assert preset.network().anchored and forward_calls(preset, 3) == forward_calls(replace(preset, channels=1), 3)
    degrade, seen = Degradation(), []

    def estimate(x, n):
        seen.append((n[0], x.clone()))
        return 0.8 * x[:, :1]

    part = Part(range(2), [0, 1], x0, [np.array([0.134] + [0.5] * 6)] * 2)
    chain = begin(part, degrade, preset, 0, "cpu")
    for number in range(4):
        if number > 0:
            hop(chain, number, preset)
        chain.x0_hat = estimate(network_input(chain, None, preset)[0], chain.views)
    trained, x_T = seen.copy(), degrade(x0, 24)
    assert [n for n, _ in trained] == [24, 48, 72, 96]
    torch.testing.assert_close(trained[1][1][:, 1:], torch.tanh(degrade(0.8 * x_T, 24) - x_T))
    seen.clear()
    sequential(estimate, degrade, x_T, multiples(24), dc=data_consistency(degrade, degrade.project(x0, [24] * 2), 8),
               anchored=True)
    assert not trained[0][1][:, 1:].any() and seen[0][1].shape[1] == 1, "to the network the same"
    for (n, x), (m, y) in zip(trained, seen[:4], strict=True):
        assert n == m
        torch.testing.assert_close(x[:, :y.shape[1]], y)


def test_reco_sees_what_its_first_pass_leaves_unexplained(data, tmp_path, monkeypatch, call):
    """[x_t, tanh(x_t - D(R([x_t, 0], t), n_t))] in restore and compose steps; zero where x_t is an estimate itself."""
    calls, forward = [], UNet.forward

    def watch(network, x, t):
        out = forward(network, x, t)
        calls.append((network.training, torch.is_grad_enabled(), x.detach().clone(), t.tolist(), out.detach().clone()))
        return out

    monkeypatch.setattr(UNet, "forward", watch)
    monkeypatch.setattr(train, "validate", lambda *_: ({"val18/mse": 1.0}, torch.zeros(1, 4, 4)))
    call(train.main, "--preset", "reco", "--width", "32", "--dropout", "0", "--data", data, "--out", tmp_path / "out",
         "--images", "64", "--epct-start", "0", "--device", "cpu")
    assert forward_calls(PRESETS["reco"], 2) == 10 and len(calls) == 16 * 6
    degrade, seen = Degradation(), {"residual": 0, "zero": 0}
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        x, t, x0_hat = first[2], first[3], first[4]
        assert not first[1] and x.shape[1] == 1 and second[2].shape[1] == 2 and torch.equal(second[2][:, :1], x)
        residual = torch.tanh(x - degrade(x0_hat, LEVELS[int(t[0])]))
        if t == [0.0] * len(t) and not second[2][:, 1:].any():
            seen["zero"] += 1
        else:
            torch.testing.assert_close(second[2][:, 1:], residual)
            seen["residual"] += 1
    assert seen["residual"] > seen["zero"] > 0
