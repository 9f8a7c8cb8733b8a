"""Samplers: pure functions (estimate, degrade, x_T, levels, update, options) -> x0_hat (B, 1, H, H).

estimate(x_t, n_t, slices): x0_hat of these slices by one network call (models/estimate.py).
degrade: D(x, n) (models/degradation.py). x_T: FBP of the measurement, mu (B, 1, H, H). levels: view counts, densest
first; the last is the measurement's. update(degrade, x_t, x0_hat, n_t, n_s): x_s, the next input: `shift` or, where
estimates are consistent with the measurement, `redegrade`. A batch gives what its slices alone give.

Nothing here needs PyTorch before it runs, so that a command line knows the samplers at once.
"""

from collections.abc import Callable
from dataclasses import dataclass


def shift(degrade, x_t, x0_hat, n_t, n_s):
    """x_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s): the published update."""
    return degrade.shift(x_t, x0_hat, n_t, n_s)


def redegrade(degrade, x_t, x0_hat, n_t, n_s):
    """x_s = D(x0_hat, n_s): a consistent estimate leaves nothing of the measurement to carry over, only old errors."""
    return degrade(x0_hat, n_s)


def one_step(estimate, degrade, x_T, levels, update):
    """x0_hat = R(x_T, T)."""
    return estimate(x_T, [levels[-1]] * len(x_T))


def sequential(estimate, degrade, x_T, levels, update):
    """Every level from the measurement's to the densest: t = T, T-1, ..., 0."""
    x = x_T
    for t in reversed(range(len(levels))):
        n_t = [levels[t]] * len(x)
        x0_hat = estimate(x, n_t)
        if t > 0:
            x = update(degrade, x, x0_hat, n_t, [levels[t - 1]] * len(x))
    return x0_hat


def naive(estimate, degrade, x_T, levels, update):
    """Cold diffusion: every level, x_s = D(x0_hat, n_s) whatever the update."""
    return sequential(estimate, degrade, x_T, levels, redegrade)


def reco(estimate, degrade, x_T, levels, update):
    """ReCo-Diff (arXiv 2603.02691): two calls a level, with one restart from the measurement after two levels.

    The second call sees beside x_t what the first leaves unexplained of it, tanh(x_t - D(x0_hat, n_t)).
    """
    x, top = x_T, len(levels) - 1
    chain = [top, *range(top - 1, -1, -1)[:1], *reversed(range(top))]
    for i, t in enumerate(chain):
        n_t = [levels[t]] * len(x)
        first = estimate(x, n_t, consistent=False)
        x0_hat = estimate(x, n_t, residual=(x - degrade(first, n_t)).tanh())
        if i + 1 < len(chain):
            if i == 1:
                x, n_t = x_T, [levels[top]] * len(x)
            x = update(degrade, x, x0_hat, n_t, [levels[chain[i + 1]]] * len(x))
    return x0_hat


def spdps(estimate, degrade, x_T, levels, update, *,
          semantic_budget: int | None = None,  # n: passes of the semantic phase; None: 2 below 72 views, else 1
          refine_steps: int = 4,               # m: network calls of the detail phase
          tau: float = 0.97,                   # SSIM between successive estimates at which anatomy counts as settled
          below: tuple[int, ...] = (),         # view counts of the levels ..., -2, -1
          similarity: Callable | None = None):
    """Semantic-Prioritized Dual-Phase Sampling (Chen et al., MICCAI 2025), decided slice by slice.

    Semantic phase: one level denser a call. Where an estimate resembles the one before (SSIM >= tau), a unit of budget
    is used. With budget left the chain restarts from the measurement with this estimate; with none left it jumps to
    level m - 1. Detail phase: levels m - 1, ..., 0. A chain that reaches level 0 unsettled ends there or, as the
    published code does by Python's negative index, goes on through the levels `below`: 18 views, 36, ..., 288.
    With `redegrade` it neither restarts nor jumps back: when a chain returns to a level, the network expects stronger
    artefacts than remain (docs/results.md, "Data consistency"). Without a given budget n is 1 then.
    similarity(a, b): of two batches of estimates, (b,); None: SSIM in the headline window.
    """
    from utils.metrics import headline_ssim

    similarity = similarity or headline_ssim
    top, returns = len(levels) - 1, update is not redegrade
    last_jump = min(refine_steps, top + 1) - 1
    x, out, previous = (dict(enumerate(x_T)) for _ in range(3))  # a list of indices into a batch would make a GPU wait
    level, compare, refining = ([value] * len(x) for value in (top, False, False))
    budget = [semantic_budget or (2 if levels[-1] < 72 and returns else 1)] * len(x)
    active = list(range(len(x)))

    def views(t):
        return levels[t] if t >= 0 else below[t]

    while active:
        x0_hat = estimate(_batch(x[i] for i in active), [views(level[i]) for i in active], active)
        settled = _settled(x0_hat, previous, active, compare, similarity, tau)
        moves = []  # (slice, its estimate, level from, level to)
        for j, i in enumerate(active):
            t, s = level[i], level[i] - 1
            if not refining[i]:
                compare[i] = not settled[j]
                budget[i] -= settled[j]
                if settled[j] and budget[i] > 0:
                    x[i], t, s = x_T[i], top, top - 1
                elif settled[j]:
                    refining[i], compare[i], s = True, False, last_jump if returns else min(last_jump, t - 1)
                previous[i] = x0_hat[j]
            if s >= (0 if refining[i] else -len(below)):
                moves.append((i, x0_hat[j], t, s))
                level[i] = s
            else:
                out[i] = x0_hat[j]
        active = [i for i, *_ in moves]
        if moves:
            x_t, estimates, n_t, n_s = zip(*((x[i], e, views(t), views(s)) for i, e, t, s in moves), strict=True)
            x.update(zip(active, update(degrade, _batch(x_t), _batch(estimates), n_t, n_s), strict=True))
    return _batch(out.values())


def _batch(slices):
    """Slices (1, H, H) as (B, 1, H, H)."""
    from torch import stack

    return stack(list(slices))


def _settled(x0_hat, previous, active, compare, similarity, tau) -> list[bool]:
    """Whether each active slice resembles its previous estimate; False where there is none to compare with."""
    settled, compared = [False] * len(active), [j for j, i in enumerate(active) if compare[i]]
    if compared:
        ssim = similarity(_batch(x0_hat[j] for j in compared), _batch(previous[active[j]] for j in compared))
        for j, resembles in zip(compared, (ssim >= tau).tolist(), strict=True):
            settled[j] = resembles
    return settled


@dataclass(frozen=True)
class Method:
    """A sampler or baseline as scripts and figures know it: nothing else has to be told of a new one."""

    label: str              # in figures
    run: Callable           # the pure function
    two_pass: bool = False  # needs a network with ReCo-Diff's residual channel
    wraps: bool = False     # the published code's goes on below level 0


SAMPLERS = {
    "one-step": Method("One step", one_step),
    "sequential": Method("Sequential", sequential),
    "naive": Method("Cold diffusion", naive),
    "reco": Method("ReCo", reco, two_pass=True),
    "spdps": Method("SPDPS", spdps, wraps=True),
}
