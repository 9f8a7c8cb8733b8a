"""Samplers: the published traces call for call, batches against single slices, limits."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from datasets.slices import find_slices, read_slices
from models.checkpoint import denoiser, find_checkpoint, load_checkpoint, placed
from models.consistency import data_consistency
from models.degradation import LEVELS, Degradation, levels_for, multiples
from models.samplers import SAMPLERS, one_step, reco, sequential, spdps
from utils.units import hu_to_mu

TRACES = json.loads((Path(__file__).parent / "golden" / "spdps_traces.json").read_text())


class Recorder:
    """Stands in for the network and D: estimates count the calls, degradations are noted."""

    def __init__(self):
        self.levels, self.degradations = [], []

    def denoise(self, x_t, views):
        self.levels.append(LEVELS.index(views[0]))
        return torch.full_like(x_t, len(self.levels))

    def __call__(self, x0_hat, n_s):
        return x0_hat

    def shift(self, x_t, x0_hat, n_t, n_s):
        self.degradations += [[len(self.levels), n_t[0]], [len(self.levels), n_s[0]]]
        return x_t


@pytest.mark.parametrize("trace", TRACES, ids=range(len(TRACES)))
def test_spdps_reproduces_the_published_traces(trace):
    recorder, scripted = Recorder(), iter(trace["ssim"])
    out, nfe = spdps(recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), LEVELS[:trace["t_start"] + 1],
                     semantic_budget=trace["semantic_budget"], refine_steps=trace["refine_steps"],
                     similarity=lambda a, b: torch.tensor([next(scripted)]))
    assert recorder.levels == trace["levels"]
    assert nfe == [trace["nfe"]]
    assert recorder.degradations == trace["degrade"]
    assert (out == trace["nfe"]).all(), "the last estimate is what is returned"


def test_spdps_that_never_settles_ends_at_the_densest_level():
    recorder = Recorder()
    _, nfe = spdps(recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), LEVELS, similarity=lambda a, b: torch.zeros(1))
    assert recorder.levels == [7, 6, 5, 4, 3, 2, 1, 0] and nfe == [8]


def test_spdps_from_the_densest_level_is_one_call():
    recorder = Recorder()
    _, nfe = spdps(recorder.denoise, recorder, torch.zeros(2, 1, 8, 8), levels_for(288))
    assert nfe == [1, 1] and recorder.degradations == []


def smooth(x_t, views):
    """A stand-in for a network that moves different slices by different amounts."""
    x_t = x_t[:, :1] + 0.1 * x_t[:, 1:].sum(1, keepdim=True)  # reco's residual, where there is one
    blurred = torch.nn.functional.avg_pool2d(x_t, 5, 1, 2)
    return torch.where(x_t.amax(dim=(1, 2, 3), keepdim=True) > 0.35, blurred, 0.9 * x_t + 0.1 * blurred)


@pytest.fixture(scope="module")
def slices():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(8, 1, 6, 6, generator=generator), size=64, mode="bicubic")
    return Degradation()(x.clamp(0, 1) * torch.linspace(0.1, 0.5, 8).view(8, 1, 1, 1), 18)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_gives_what_its_slices_give_alone(name, anchored, slices):
    options = {"anchored": anchored} | ({"tau": 0.9} if name == "spdps" else {})
    degrade, levels = Degradation(), levels_for(18)
    together, nfe = SAMPLERS[name](smooth, degrade, slices, levels, **options)
    alone = [SAMPLERS[name](smooth, degrade, slices[i:i + 1], levels, **options) for i in range(8)]
    assert nfe == [calls for _, (calls,) in alone]
    if name == "spdps":
        assert len(set(nfe)) > 1, "the case must make slices differ in their number of calls"
    assert torch.equal(together, torch.cat([x for x, _ in alone]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_chains_look_at_the_anchored_residual(name, slices):
    """Where there is more than one call, and but for reco, which has its own."""
    x = [SAMPLERS[name](smooth, Degradation(), slices[:2], levels_for(72), anchored=a)[0] for a in (False, True)]
    assert torch.equal(*x) == (name in ("one-step", "reco"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_of_the_shipped_network_gives_what_slices_alone_give(precision):
    """To the bit: data consistency magnifies what rounding leaves of a difference a thousandfold along the chain."""
    _, hu = read_slices(find_slices(ROOT / "datasets" / "sample", "test")[:3])
    degrade, network = Degradation(), load_checkpoint(find_checkpoint("tiny"))[0]
    denoise = denoiser(placed(network, "cpu", precision), precision=precision)
    y = degrade.project(degrade.full(hu_to_mu(torch.from_numpy(hu))[:, None]), [24] * 3)

    def go(sampler, y):
        return sampler(denoise, degrade, degrade.fbp(y, 256), multiples(24), dc=data_consistency(degrade, y, 8),
                       anchored=network.config.anchored)[0]

    for sampler in (one_step, sequential, spdps):
        assert torch.equal(go(sampler, y), torch.cat([go(sampler, y[i:i + 1]) for i in range(3)]))


def test_callback_sees_every_call(slices):
    seen = []
    _, nfe = spdps(smooth, Degradation(), slices, levels_for(18), lambda i, v, x: seen.extend(i), tau=0.9)
    assert [seen.count(i) for i in range(8)] == nfe


def test_a_perfect_network_sees_the_truths_degradations_in_every_chain(slices):
    degrade, truth = Degradation(), slices * 0.7

    def denoise(x, views):
        torch.testing.assert_close(x[:, :1], degrade(truth[:len(x)], views), rtol=0, atol=1e-4)
        torch.testing.assert_close(x[:, 1:], torch.zeros_like(x[:, 1:]), rtol=0, atol=1e-4)
        return truth[:len(x)]

    for sampler in SAMPLERS.values():
        for anchored in (False, True):
            out, _ = sampler(denoise, degrade, degrade(truth, 36), levels_for(36), anchored=anchored)
            torch.testing.assert_close(out, truth)


@pytest.mark.parametrize(("views", "calls"), [(18, 18), (36, 16), (72, 12), (288, 2)])
def test_reco_calls_twice_a_level_and_restarts_once(views, calls, slices):
    levels, seen, residuals = levels_for(views), [], []

    def denoise(x_t, n):
        residuals.append(x_t[:, 1:])
        seen.append((n[0], x_t[:1, :1]))
        return 0.9 * x_t[:, :1]

    degrade, x_T = Degradation(), slices[:1]
    _, nfe = reco(denoise, degrade, x_T, levels)
    assert nfe == [calls] == [len(seen)]
    if views == 72:
        assert [n for n, _ in seen[::2]] == [72, 126, 126, 180, 234, 288]
        x0_hat = 0.9 * seen[3][1]
        restarted = degrade.shift(x_T, x0_hat, [72], [126])
        torch.testing.assert_close(seen[4][1], restarted)
        assert residuals[0].shape[1] == 0
        torch.testing.assert_close(residuals[1], torch.tanh(x_T - degrade(0.9 * x_T, 72)))


def test_spdps_restarts_only_without_data_consistency(slices):
    """Two estimates a pass of the semantic phase and four of detail; the budget given counts either way."""
    def nfe(**options):
        return spdps(smooth, Degradation(), slices[:1], levels_for(18), similarity=lambda a, b: torch.ones(len(a)),
                     **options)[1]

    def dc(x0_hat, slices):
        return x0_hat

    assert (nfe(), nfe(dc=dc), nfe(dc=dc, semantic_budget=2)) == ([8], [6], [8])


def test_spdps_visits_no_level_again_with_data_consistency():
    """72 views, settled at once: 72, 126, and 180 next, where the published sampler visits 126 again."""
    def visited(dc):
        recorder = Recorder()
        spdps(recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), levels_for(72), dc=dc, semantic_budget=1,
              similarity=lambda a, b: torch.ones(1))
        return recorder.levels

    assert visited(None) == [4, 3, 3, 2, 1, 0] and visited(lambda x0_hat, slices: x0_hat) == [4, 3, 2, 1, 0]
