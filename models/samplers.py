"""Samplers: pure functions (denoise, degrade, x_T, levels, callback, dc, anchored, options) -> (x0_hat, nfe).

denoise(x_t, views): estimate of x0 from slices (B, 1, H, W) that each hold `views[i]` views' artefacts; with `anchored`
and in `reco` there is a second channel.
degrade: a `Degradation`. x_T: FBP of the measurement, mu (B, 1, H, W). levels: view counts, densest first; the last
is the measurement's. dc(x0_hat, slices), if given, makes the estimates of these slices consistent with their
measurements after every network call (models/consistency.py). The update from level t to s is the published one,
x_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s); with dc it is x_s = D(x0_hat, n_s): a consistent estimate leaves nothing
of the measurement to carry over, only the errors of estimates before it. callback(slices, views, x0_hat), if given,
sees every network call: the indices of the slices in it, their view counts and estimates. anchored: the network was
trained with the second channel of `anchored_residual`. nfe: network calls of each slice, a list. A batch gives what its
slices alone give.
"""

import torch

from models.degradation import chain_levels
from utils.metrics import headline_ssim


def anchored_residual(degrade, x0_hat, x_T, n_T):
    """tanh(D(x0_hat, n_T) - x_T): where an estimate contradicts the measurement (RBG-Diff, 2026)."""
    return torch.tanh(degrade(x0_hat, n_T) - x_T)


def _estimator(denoise, degrade, x_T, n_T, callback, dc, anchored=False):
    """estimate(x, views, slices): R(x, t), consistent with the measurements where there is `dc`, shown to `callback`.

    anchored: beside the residual of the network's last estimate of each slice, as it was before dc, which leaves little
    of it; nothing in the first call, which has all slices.
    """
    last = {}

    def estimate(x, views, slices):
        if anchored and last:
            before = torch.stack([last[i] for i in slices])
            x = torch.cat([x, anchored_residual(degrade, before, x_T[list(slices)], [n_T] * len(x))], dim=1)
        x0_hat = denoise(x, views)
        last.update(zip(slices, x0_hat, strict=True))
        if dc:
            x0_hat = dc(x0_hat, slices)
        if callback:
            callback(slices, views, x0_hat)
        return x0_hat

    return estimate


def _next(degrade, x_t, x0_hat, n_t, n_s, naive):
    """x_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s), or, naive, D(x0_hat, n_s)."""
    return degrade(x0_hat, n_s) if naive else degrade.shift(x_t, x0_hat, n_t, n_s)


def one_step(denoise, degrade, x_T, levels, callback=None, dc=None, anchored=False):
    """R(x_T, T)."""
    B = len(x_T)
    estimate = _estimator(denoise, degrade, x_T, levels[-1], callback, dc, anchored)
    return estimate(x_T, [levels[-1]] * B, range(B)), [1] * B


def sequential(denoise, degrade, x_T, levels, callback=None, dc=None, anchored=False):
    """Every level from the measurement's to the densest."""
    return _every_level(denoise, degrade, x_T, levels, callback, dc, anchored, naive=dc is not None)


def naive(denoise, degrade, x_T, levels, callback=None, dc=None, anchored=False):
    """Cold diffusion: every level, x_s = D(x0_hat, n_s). With `dc` the same as `sequential`."""
    return _every_level(denoise, degrade, x_T, levels, callback, dc, anchored, naive=True)


def _every_level(denoise, degrade, x_T, levels, callback, dc, anchored, naive):
    x, B = x_T, len(x_T)
    estimate = _estimator(denoise, degrade, x_T, levels[-1], callback, dc, anchored)
    for t in reversed(range(len(levels))):
        n_t = [levels[t]] * B
        x0_hat = estimate(x, n_t, range(B))
        if t > 0:
            x = _next(degrade, x, x0_hat, n_t, [levels[t - 1]] * B, naive)
    return x0_hat, [len(levels)] * B


def reco(denoise, degrade, x_T, levels, callback=None, dc=None, anchored=False):
    """ReCo-Diff (arXiv 2603.02691): two calls a level, the second beside what the first leaves unexplained of x_t,
    tanh(x_t - D(x0_hat, n_t)). Every level, with one restart from the measurement after two; dc after second calls.
    It has its own use for the second channel and none for `anchored`."""
    x, every = x_T, range(len(x_T))
    predict, estimate = (_estimator(denoise, degrade, x_T, levels[-1], callback, then) for then in (None, dc))
    top = len(levels) - 1
    chain = [top, *range(top - 1, -1, -1)[:1], *reversed(range(top))]
    for i, t in enumerate(chain):
        n_t = [levels[t]] * len(x)
        residual = torch.tanh(x - degrade(predict(x, n_t, every), n_t))
        x0_hat = estimate(torch.cat([x, residual], dim=1), n_t, every)
        if i + 1 < len(chain):
            if i == 1:
                x, n_t = x_T, [levels[top]] * len(x)
            x = _next(degrade, x, x0_hat, n_t, [levels[chain[i + 1]]] * len(x), naive=dc is not None)
    return x0_hat, [2 * len(chain)] * len(x)


def spdps(denoise, degrade, x_T, levels, callback=None, dc=None, anchored=False, *,
          semantic_budget=None,   # n: passes of the semantic phase; None: 2 below 72 views, 1 from there on or with dc
          refine_steps=4,         # m: network calls of the detail phase
          tau=0.97,               # SSIM between successive estimates at which anatomy counts as settled
          similarity=headline_ssim):
    """Semantic-Prioritized Dual-Phase Sampling (Chen et al., MICCAI 2025), decided slice by slice.

    Semantic phase: one level denser a call; where an estimate resembles the one before (SSIM >= tau) a unit of budget
    is used and the chain restarts from the measurement with it, or, with the budget spent, jumps to level m - 1.
    Detail phase: levels m - 1, ..., 0. A chain that reaches level 0 unsettled ends there. With dc the jump only goes to
    levels that are denser than the last: a level that is visited again expects more errors than are left.
    """
    top = len(levels) - 1
    last_jump = min(refine_steps, top + 1) - 1
    x, out, previous = x_T.clone(), torch.empty_like(x_T), torch.empty_like(x_T)
    level, nfe, compare, refining = ([value] * len(x) for value in (top, 0, False, False))
    # With dc a restart gains nothing (README, "Data consistency").
    budget = [semantic_budget or (2 if levels[-1] < 72 and dc is None else 1)] * len(x)
    estimate = _estimator(denoise, degrade, x_T, levels[-1], callback, dc, anchored)
    active = list(range(len(x)))
    while active:
        views = [levels[level[i]] for i in active]
        x0_hat = estimate(x[active], views, active)
        compared = [j for j, i in enumerate(active) if compare[i]]
        settled = dict.fromkeys(range(len(active)), False)
        if compared:
            alike = similarity(x0_hat[compared], previous[[active[j] for j in compared]])
            settled.update(zip(compared, (alike >= tau).tolist(), strict=True))
        moves = []  # (slice, its place in x0_hat, level from, level to)
        for j, i in enumerate(active):
            nfe[i] += 1
            t, s = level[i], level[i] - 1
            if not refining[i]:
                compare[i] = not settled[j]
                budget[i] -= settled[j]
                if settled[j] and budget[i] > 0:
                    x[i], t, s = x_T[i], top, top - 1
                elif settled[j]:
                    refining[i], compare[i], s = True, False, last_jump if dc is None else min(last_jump, t - 1)
                previous[i] = x0_hat[j]
            if s >= 0:
                moves.append((i, j, t, s))
                level[i] = s
            else:
                out[i] = x0_hat[j]
        active = [i for i, *_ in moves]
        if moves:
            _, estimates, n_t, n_s = zip(*((i, j, levels[t], levels[s]) for i, j, t, s in moves), strict=True)
            x[active] = _next(degrade, x[active], x0_hat[list(estimates)], n_t, n_s, naive=dc is not None)
    return out, nfe


def chain_of(network, n_views, dc):
    """Options of the samplers for a network (a UNetConfig), a measurement and iterations of data consistency."""
    return {"levels": chain_levels(n_views, network.conditioning, dc), "anchored": network.anchored}


SAMPLERS = {"one-step": one_step, "sequential": sequential, "naive": naive, "reco": reco, "spdps": spdps}
