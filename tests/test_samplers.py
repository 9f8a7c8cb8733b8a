"""Samplers: the published traces call for call, batches against single slices, limits; the estimate they call."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from datasets.slices import find_slices, read_slices
from models.degradation import Degradation
from models.estimate import Estimate, anchored_residual, denoiser
from models.levels import LEVELS, levels_for
from models.reconstructor import Reconstructor
from models.samplers import SAMPLERS, redegrade, shift
from utils.units import HU_RANGE, hu_to_mu

TRACES = json.loads((Path(__file__).parent / "golden" / "spdps_traces.json").read_text())


def sample(name, denoise, degrade, x_T, levels, update=shift, *, consistency=None, anchored=False, callback=None,
           **options):
    """(x0_hat, calls of each slice) of a sampler with a stand-in for the network."""
    estimate = Estimate(denoise, degrade, x_T, levels[-1], consistency, anchored, callback)
    return SAMPLERS[name].run(estimate, degrade, x_T, levels, update, **options), estimate.calls


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
    out, nfe = sample("spdps", recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), LEVELS[:trace["t_start"] + 1],
                      semantic_budget=trace["semantic_budget"], refine_steps=trace["refine_steps"],
                      similarity=lambda a, b: torch.tensor([next(scripted)]))
    assert recorder.levels == trace["levels"]
    assert nfe == [trace["nfe"]]
    assert recorder.degradations == trace["degrade"]
    assert (out == trace["nfe"]).all(), "the last estimate is what is returned"


def test_spdps_that_never_settles_ends_at_the_densest_level():
    recorder = Recorder()
    _, nfe = sample("spdps", recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), LEVELS,
                    similarity=lambda a, b: torch.zeros(1))
    assert recorder.levels == [7, 6, 5, 4, 3, 2, 1, 0] and nfe == [8]


@pytest.mark.parametrize(("views", "calls"), [(18, 16), (72, 13)])
def test_as_published_a_chain_that_never_settles_goes_on_below_level_0(views, calls):
    """By Python's negative index: 18 views after 288, then 36, ..., and no further than the list goes."""
    recorder = Recorder()
    _, nfe = sample("spdps", recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), levels_for(views), below=LEVELS,
                    similarity=lambda a, b: torch.zeros(1))
    visited = [*range(LEVELS.index(views), -1, -1), *range(7, -1, -1)]
    assert recorder.levels == visited and nfe == [calls]
    steps = [[i + 1, LEVELS[t]] for i in range(calls - 1) for t in visited[i:i + 2]]
    assert recorder.degradations == steps


def test_as_published_a_chain_that_settles_below_level_0_refines_from_there():
    """Settled at the second visit of 18 views (level -1): one budget, so it jumps to level 3 and ends at level 0."""
    recorder, scripted = Recorder(), iter([0.0] * 7 + [1.0])
    _, nfe = sample("spdps", recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), LEVELS, below=LEVELS,
                    semantic_budget=1, similarity=lambda a, b: torch.tensor([next(scripted)]))
    assert recorder.levels == [7, 6, 5, 4, 3, 2, 1, 0, 7, 3, 2, 1, 0] and nfe == [13]


def test_spdps_from_the_densest_level_is_one_call():
    recorder = Recorder()
    _, nfe = sample("spdps", recorder.denoise, recorder, torch.zeros(2, 1, 8, 8), levels_for(288))
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


@pytest.mark.parametrize("update", [shift, redegrade])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_gives_what_its_slices_give_alone(name, anchored, update, slices):
    options = {"anchored": anchored} | ({"tau": 0.9 if update is shift else 0.99} if name == "spdps" else {})
    degrade, levels = Degradation(), levels_for(18)
    together, nfe = sample(name, smooth, degrade, slices, levels, update, **options)
    alone = [sample(name, smooth, degrade, slices[i:i + 1], levels, update, **options) for i in range(8)]
    assert nfe == [calls for _, (calls,) in alone]
    if name == "spdps":
        assert len(set(nfe)) > 1, "the case must make slices differ in their number of calls"
    assert torch.equal(together, torch.cat([x for x, _ in alone]))


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.two_pass])
def test_chains_look_at_the_anchored_residual(name, slices):
    """Where there is more than one call. A two-pass sampler has its own residual: `Reconstructor.check` refuses it."""
    x = [sample(name, smooth, Degradation(), slices[:2], levels_for(72), anchored=a)[0] for a in (False, True)]
    assert torch.equal(*x) == (name == "one-step")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_of_the_shipped_network_gives_what_slices_alone_give(precision):
    """To the bit: data consistency magnifies what rounding leaves of a difference a thousandfold along the chain."""
    _, hu = read_slices(find_slices(ROOT / "datasets" / "sample", "test")[:3])
    r = Reconstructor.from_checkpoint("tiny", device="cpu", precision=precision, dc=8)
    y = r.degrade.project(r.degrade.full(hu_to_mu(torch.from_numpy(hu))[:, None]), 24)
    for method in ("one-step", "sequential", "spdps"):
        together, calls = r.run(method, y)
        alone = [r.run(method, y[i:i + 1]) for i in range(3)]
        assert torch.equal(together, torch.cat([x for x, _ in alone])) and calls == [n for _, (n,) in alone]


def test_callback_sees_every_call(slices):
    seen = []
    _, nfe = sample("spdps", smooth, Degradation(), slices, levels_for(18), callback=lambda i, v, x: seen.extend(i),
                    tau=0.9)
    assert [seen.count(i) for i in range(8)] == nfe


def test_a_perfect_network_sees_the_truths_degradations_in_every_chain(slices):
    degrade, truth = Degradation(), slices * 0.7

    def denoise(x, views):
        torch.testing.assert_close(x[:, :1], degrade(truth[:len(x)], views), rtol=0, atol=1e-4)
        torch.testing.assert_close(x[:, 1:], torch.zeros_like(x[:, 1:]), rtol=0, atol=1e-4)
        return truth[:len(x)]

    for name in SAMPLERS:
        for anchored in (False, True):
            for update in (shift, redegrade):
                out, _ = sample(name, denoise, degrade, degrade(truth, 36), levels_for(36), update, anchored=anchored)
                torch.testing.assert_close(out, truth)


@pytest.mark.parametrize(("views", "calls"), [(18, 18), (36, 16), (72, 12), (288, 2)])
def test_reco_calls_twice_a_level_and_restarts_once(views, calls, slices):
    levels, seen, residuals = levels_for(views), [], []

    def denoise(x_t, n):
        residuals.append(x_t[:, 1:])
        seen.append((n[0], x_t[:1, :1]))
        return 0.9 * x_t[:, :1]

    degrade, x_T = Degradation(), slices[:1]
    _, nfe = sample("reco", denoise, degrade, x_T, levels)
    assert nfe == [calls] == [len(seen)]
    if views == 72:
        assert [n for n, _ in seen[::2]] == [72, 126, 126, 180, 234, 288]
        x0_hat = 0.9 * seen[3][1]
        restarted = degrade.shift(x_T, x0_hat, [72], [126])
        torch.testing.assert_close(seen[4][1], restarted)
        assert residuals[0].shape[1] == 0
        torch.testing.assert_close(residuals[1], torch.tanh(x_T - degrade(0.9 * x_T, 72)))


def test_reco_is_made_consistent_after_second_calls_alone(slices):
    corrected = []

    def dc(x0_hat, slices):
        corrected.append(x0_hat)
        return x0_hat

    sample("reco", smooth, Degradation(), slices[:1], levels_for(72), redegrade, consistency=dc)
    assert len(corrected) == 6


def test_spdps_restarts_only_with_the_published_update(slices):
    """Two estimates a pass of the semantic phase and four of detail; the budget given counts either way."""
    def nfe(update, **options):
        return sample("spdps", smooth, Degradation(), slices[:1], levels_for(18), update,
                      similarity=lambda a, b: torch.ones(len(a)), **options)[1]

    assert (nfe(shift), nfe(redegrade), nfe(redegrade, semantic_budget=2)) == ([8], [6], [8])


def test_spdps_visits_no_level_again_with_data_consistency():
    """72 views, settled at once: 72, 126, and 180 next, where the published sampler visits 126 again."""
    def visited(update):
        recorder = Recorder()
        sample("spdps", recorder.denoise, recorder, torch.zeros(1, 1, 8, 8), levels_for(72), update, semantic_budget=1,
               similarity=lambda a, b: torch.ones(1))
        return recorder.levels

    assert visited(shift) == [4, 3, 3, 2, 1, 0] and visited(redegrade) == [4, 3, 2, 1, 0]


def test_the_updates_are_those_of_the_papers(slices):
    degrade, x_t, x0_hat = Degradation(), slices[:2], slices[2:4]
    expected = x_t - degrade(x0_hat, [18, 36]) + degrade(x0_hat, [36, 54])
    torch.testing.assert_close(shift(degrade, x_t, x0_hat, [18, 36], [36, 54]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(redegrade(degrade, x_t, x0_hat, [18, 36], [36, 54]), degrade(x0_hat, [36, 54]))


def test_an_estimate_counts_its_calls_and_tells_which_slices_are_in_them():
    seen, shown, x_T = [], [], torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 8, 8)

    def dc(x0_hat, slices):
        seen.append((list(slices), x0_hat[:, 0, 0, 0].tolist()))
        return x0_hat + 100

    estimate = Estimate(lambda x, n: 10 * x, None, x_T, 18, dc, callback=lambda *told: shown.append(told))
    assert estimate.calls == [0, 0, 0]
    assert estimate(x_T, [18] * 3)[:, 0, 0, 0].tolist() == [100, 110, 120] and estimate.calls == [1, 1, 1]
    assert estimate(x_T[1:], [36, 54], [2, 0])[:, 0, 0, 0].tolist() == [110, 120]
    assert estimate.calls == [2, 1, 2] and seen == [([0, 1, 2], [0, 10, 20]), ([2, 0], [10, 20])]
    assert estimate(x_T[:1], [72], [1], consistent=False)[0, 0, 0, 0] == 0
    assert estimate.calls == [2, 2, 2] and len(seen) == 2, "a call counts, consistent or not"
    assert [(list(slices), n_t) for slices, n_t, _ in shown] == [([0, 1, 2], [18] * 3), ([2, 0], [36, 54]), ([1], [72])]
    assert shown[1][2][:, 0, 0, 0].tolist() == [110, 120], "the callback sees what the sampler gets"


def test_every_second_call_is_mirrored(slices):
    """The network sees the mirror image and its residual, and what it says of them is mirrored back."""
    inputs, degrade, x_T = [], Degradation(), slices[:2]
    ramp = torch.linspace(0, 0.01, x_T.shape[-1])

    def denoise(x, n_t):
        inputs.append(x)
        return x[:, :1] + ramp  # the error of one orientation

    plain, mirrored = (Estimate(denoise, degrade, x_T, 18, anchored=True, mirror=on) for on in (False, True))
    for estimate in (plain, mirrored):
        estimate(x_T, [18] * 2)
    assert torch.equal(inputs[0], inputs[1]), "the first call is not"
    torch.testing.assert_close(mirrored(x_T, [36] * 2), x_T + ramp.flip(-1))
    plain(x_T, [36] * 2)
    torch.testing.assert_close(inputs[2], inputs[3].flip(-1))
    torch.testing.assert_close(mirrored(x_T, [54] * 2), x_T + ramp)
    residual = anchored_residual(degrade, x_T + ramp.flip(-1), x_T, [18] * 2)
    torch.testing.assert_close(inputs[4], torch.cat([x_T, residual], dim=1), msg="of the estimate mirrored back")


def test_an_anchored_estimate_sees_the_residual_of_the_networks_own_last_estimate(slices):
    """Of the same slice, before data consistency; nothing in the first call, and another residual where one is given.
    """
    inputs, degrade, x_T = [], Degradation(), slices[:3]

    def denoise(x, n_t):
        inputs.append(x)
        return 0.9 * x[:, :1]

    estimate = Estimate(denoise, degrade, x_T, 18, lambda x0_hat, slices: 0 * x0_hat, anchored=True)
    estimate(x_T, [18] * 3)
    assert inputs[0].shape[1] == 1
    estimate(x_T[:2], [36, 36], [2, 0])
    expected = anchored_residual(degrade, 0.9 * x_T[[2, 0]], x_T[[2, 0]], [18, 18])
    torch.testing.assert_close(inputs[1], torch.cat([x_T[:2], expected], dim=1))
    estimate(x_T[:1], [54], [2])  # its last estimate is that of the call before
    torch.testing.assert_close(inputs[2][:, 1:], anchored_residual(degrade, 0.9 * x_T[:1], x_T[2:3], [18]))
    estimate(x_T[:1], [54], [2], residual=x_T[1:2])
    assert torch.equal(inputs[3][:, 1:], x_T[1:2])


def test_estimates_are_clipped_to_what_hu_can_be_unless_the_procedure_is_the_published_one():
    network = Reconstructor.from_checkpoint("tiny", device="cpu").network
    x = torch.linspace(-3, 3, 2 * 32 * 32).view(2, 1, 32, 32)
    clipped, free = (denoiser(network, clip)(x, [18, 36]) for clip in (True, False))
    lowest, highest = (hu_to_mu(hu) for hu in HU_RANGE)
    assert free.min() < lowest and free.max() > highest
    assert torch.equal(clipped, free.clamp(lowest, highest))


def test_a_denoiser_tells_the_network_its_own_levels():
    network = Reconstructor.from_checkpoint("tiny", device="cpu").network
    x = torch.rand(1, 1, 32, 32) * 0.3
    published, other = (denoiser(network, levels=levels)(x, [60]) for levels in (LEVELS, (360, 120, 40)))
    assert not torch.equal(published, other)
    with torch.no_grad():
        assert torch.equal(denoiser(network, levels=(120, 60))(x, [60]), network(x, torch.tensor([1.0])).clamp(
            *map(hu_to_mu, HU_RANGE)))
