"""View counts: the published levels, how a network is told a count, and the levels of a chain."""

import math
from collections.abc import Iterable

import numpy as np

LEVELS = (288, 234, 180, 126, 72, 54, 36, 18)  # n_t, t = 0..7
FULL_VIEWS = 720


def level_of(n_views: int, levels: tuple[int, ...] = LEVELS) -> int:
    """Level t nearest to a number of views, in log views."""
    return min(range(len(levels)), key=lambda t: abs(math.log(n_views / levels[t])))


def condition(n_views: int, kind: str, levels: tuple[int, ...] = LEVELS) -> float:
    """What tells the network how many views a slice has.

    kind "level": t of the nearest level. "log-views": t interpolated between the two nearest in log views, so that
    weights trained on levels can go on with every count. From the densest level on, where a chain makes its last call,
    it is 0.
    """
    if kind == "level":
        return float(level_of(n_views, levels))
    return float(np.interp(-math.log(n_views), [-math.log(n) for n in levels], range(len(levels))))


def levels_for(n_views: int, among: Iterable[int] = LEVELS) -> tuple[int, ...]:
    """The levels of a chain that starts from a measurement: those `among` denser than it, densest first, then its."""
    return tuple(sorted((n for n in set(among) if n > n_views), reverse=True)) + (n_views,)


def chain_levels(n_views: int, kind: str, dc: int, levels: tuple[int, ...] = LEVELS) -> tuple[int, ...]:
    """The levels that a chain from n_views visits, densest first.

    These are the published ones or, with `dc` iterations of data consistency and for a network that knows any view
    count (kind "log-views"), `multiples` of the measured views.
    """
    return multiples(n_views) if dc and kind == "log-views" else levels_for(n_views, levels)


def multiples(n_views: int) -> tuple[int, ...]:
    """Levels that all contain the measured views, densest first.

    1, 2, 3, 4 times as many, and four even steps from there to the first multiple of at least 288; none above 720. For
    18 views these are the published levels. An estimate that is consistent with the measurement is exact in the views
    that it shares with a level. The published levels share few views with most measurements, and chains through them
    lose up to 1.3 dB (docs/results.md, "Any view count").
    """
    top = max(4, math.ceil(LEVELS[0] / n_views))
    factors = {1, 2, 3, *(round(4 + (top - 4) * i / 4) for i in range(5))}
    return tuple(n_views * k for k in sorted(factors, reverse=True) if k == 1 or n_views * k <= FULL_VIEWS)
