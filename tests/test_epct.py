"""What EPCT draws and minimises beyond the published recipe, which tests/test_paper.py asserts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

import models.run
import train
from datasets.loader import Part
from models.consistency import data_consistency
from models.degradation import Degradation
from models.drawn import draw_views
from models.epct import advance, loss, network_input, next_level, start_chain
from models.estimate import Estimate
from models.levels import LEVELS, multiples
from models.presets import PRESETS
from models.samplers import redegrade, sequential
from models.schedule import forward_calls
from models.unet import UNet

UNIFORM = (np.arange(8000) + 0.5) / 8000


def test_measurements_at_the_levels_and_in_focus():
    def draws(**fields):
        counts = Counter(draw_views(u, replace(PRESETS["paper"], **fields)) for u in UNIFORM)
        return [counts[n] for n in LEVELS]

    assert draws() == [1000] * 8, "the published draw"
    np.testing.assert_allclose(draws(focus_share=0.6), [400, 400, 400, 400, 2000, 400, 2000, 2000], atol=1)
    twice = draws(focus_share=0.6, focus_views="72 18 72")
    np.testing.assert_allclose(twice, [400] * 4 + [3600, 400, 400, 2000], atol=1)


def test_a_chain_without_jumps_goes_level_by_level_and_stays_at_the_densest():
    chain, uniform = [126], np.random.default_rng(0).random((5, 2))
    for u in uniform:
        chain.append(next_level(chain[-1], LEVELS, u, jumps=0.0))
    assert chain == [126, 180, 234, 288, 288, 288]


def test_jumps_reach_every_denser_level_alike():
    uniform = (np.arange(7000) + 0.5) / 7000
    drawn = [next_level(18, LEVELS, (0.4, u), jumps=0.5) for u in uniform]
    assert {n: drawn.count(n) for n in LEVELS} == {n: 1000 * (n > 18) for n in LEVELS}
    assert next_level(18, LEVELS, (0.6, 0.0), jumps=0.5) == 36


def test_measurements_between_the_levels():
    """The angle between views is uniform."""
    draws = [draw_views(u, replace(PRESETS["paper"], any_view_share=0.5)) for u in UNIFORM]
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


def test_an_anchored_residual_is_that_of_the_measurement_in_training_as_in_sampling():
    """Beside x_T nothing; then tanh(D(x0_hat, n_T) - x_T) of the network's last estimate, before data consistency."""
    x0 = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    preset = replace(PRESETS["tiny"], jumps=0.0, focus_share=0.0, any_view_share=0.5, hops=3)
    assert preset.network().anchored and forward_calls(preset, 3) == forward_calls(replace(preset, channels=1), 3)
    degrade, seen = Degradation(), []

    def denoise(x, n):
        seen.append((n[0], x.clone()))
        return 0.8 * x[:, :1]

    part = Part(range(2), [0, 1], x0, [np.array([0.134] + [0.5] * 6)] * 2)
    chain = start_chain(part, degrade, preset, "cpu")
    for hop in range(4):
        if hop > 0:
            advance(chain, hop, preset)
        chain.x0_hat = denoise(network_input(chain, None, preset)[0], chain.n_t)
    trained, x_T = seen.copy(), degrade(x0, 24)
    assert [n for n, _ in trained] == [24, 48, 72, 96] and chain.n_T == [24, 24] and torch.equal(chain.x_T, x_T)
    torch.testing.assert_close(trained[1][1][:, 1:], torch.tanh(degrade(0.8 * x_T, 24) - x_T))
    seen.clear()
    dc = data_consistency(degrade, degrade.project(x0, 24), 8)
    sequential(Estimate(denoise, degrade, x_T, 24, dc, anchored=True), degrade, x_T, multiples(24), redegrade)
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
    monkeypatch.setattr(models.run, "validate", lambda *_: ({"val18/mse": 1.0}, torch.zeros(1, 4, 4)))
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
