"""The degradation D(x, n): FBP over n views of the fan-beam projection over the same views."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch_radon import RadonFanbeam

LEVELS = (288, 234, 180, 126, 72, 54, 36, 18)  # n_t, t = 0..7
FULL_VIEWS = 720


def level_of(n_views: int) -> int:
    """Published level t nearest to a number of views, in log views."""
    return min(range(len(LEVELS)), key=lambda t: abs(math.log(n_views / LEVELS[t])))


def condition(n_views: int, kind: str) -> float:
    """What tells the network how many views a slice has: t of the nearest published level or, with "log-views", t
    interpolated between the two nearest in log views, so that weights trained on levels can go on with every count.
    From 288 views on, where a chain makes its last call, it is 0.
    """
    if kind == "level":
        return float(level_of(n_views))
    return float(np.interp(-math.log(n_views), [-math.log(n) for n in LEVELS], range(len(LEVELS))))


def levels_for(n_views: int, among: Iterable[int] = LEVELS) -> tuple[int, ...]:
    """The levels of a chain that starts from a measurement: those `among` denser than it, densest first, then its."""
    return tuple(sorted((n for n in set(among) if n > n_views), reverse=True)) + (n_views,)


def chain_levels(n_views: int, conditioning: str, dc: int) -> tuple[int, ...]:
    """The levels of a chain: the published ones or, with data consistency and for a network that knows any view count,
    `multiples` of the measured."""
    return multiples(n_views) if dc and conditioning == "log-views" else levels_for(n_views)


def multiples(n_views: int) -> tuple[int, ...]:
    """Levels that all contain the measured views, densest first: 1, 2, 3, 4 times as many, and four even steps from
    there to the first multiple of at least 288; none above 720. For 18 views these are the published levels.

    An estimate that is consistent with the measurement is exact in the views it shares with a level. The published
    levels share few with most measurements, and chains through them lose up to 1.3 dB (README, "Any view count").
    """
    top = max(4, math.ceil(LEVELS[0] / n_views))
    factors = {1, 2, 3, *(round(4 + (top - 4) * i / 4) for i in range(5))}
    return tuple(n_views * k for k in sorted(factors, reverse=True) if k == 1 or n_views * k <= FULL_VIEWS)


@lru_cache(maxsize=512)  # more than any view count makes of levels
def projector(size: int, angles: tuple[float, ...]) -> RadonFanbeam:
    """CvG-Diff's scanner at `size` pixels with the field of view of 256: S = D = 1075 f, 672 f bins, f = size/256."""
    f = size / 256
    bins = 2 * math.ceil(672 * f / 2)
    return RadonFanbeam(size, angles, 1075 * f, 1075 * f, bins, 2.0)


@lru_cache(maxsize=512)
def equal_angles(n_views: int, start: float = 0.0) -> tuple[float, ...]:
    """start + 2 pi a/n, a = 0..n-1, radians."""
    return tuple(start + 2 * np.pi * np.arange(n_views) / n_views)


@lru_cache(maxsize=256)
def _shift_views(n_t: int, n_s: int, start: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Angles of n_t and n_s views with shared ones merged, and their weights in D(., n_s) - D(., n_t)."""
    weights = {}
    for n, sign in ((n_t, -1), (n_s, 1)):
        for a in range(n):
            turn = a * (math.lcm(n_t, n_s) // n)
            weights[turn] = weights.get(turn, 0.0) + sign * math.pi / (2 * n)
    turns = sorted(weights)
    angles = start + 2 * np.pi * np.array(turns) / math.lcm(n_t, n_s)
    return tuple(angles), tuple(weights[turn] for turn in turns)


@lru_cache(maxsize=256)
def _shift_weights(n_t: int, n_s: int, start: float, device: torch.device) -> torch.Tensor:
    """The weights of `_shift_views` where they are used: CUDA graphs take no copy from the host."""
    return torch.tensor(_shift_views(n_t, n_s, start)[1], device=device)


def _per_group(function, keys, *tensors):
    """Apply function(key, *slices) to the slices of each key and put the results in the batch's order."""
    if len(set(keys)) == 1:
        return function(keys[0], *tensors)
    out = torch.empty_like(tensors[0])
    for key in dict.fromkeys(keys):
        index = [i for i, k in enumerate(keys) if k == key]
        out[index] = function(key, *(x[index] for x in tensors))
    return out


@dataclass(frozen=True)
class Degradation:
    """D and what follows from it, without gradients. Images: mu (B, 1, H, W) float32, 1/cm.

    `official` applies the extra full-view pass of the published code: D'(x, n) = D(R x, n). View counts are one number
    for the batch or a list of one a slice.
    """

    start: float = 0.0      # angle of the first view, radians
    official: bool = False

    def full(self, x: torch.Tensor) -> torch.Tensor:
        """R(x) = D(x, 720): what counts as ground truth."""
        return projector(x.shape[-1], equal_angles(FULL_VIEWS)).degrade(x)

    def __call__(self, x: torch.Tensor, n_views: int | list[int]) -> torch.Tensor:
        """D(x, n)."""
        if self.official:
            x = self.full(x)
        views = [n_views] * len(x) if isinstance(n_views, int) else n_views
        return _per_group(lambda n, y: projector(y.shape[-1], equal_angles(n, self.start)).degrade(y), views, x)

    def project(self, x: torch.Tensor, n_views: list[int]) -> list[torch.Tensor]:
        """Sinograms y = P_n x as they would be measured, one (1, n, bins) a slice."""
        if self.official:
            x = self.full(x)
        return [projector(x.shape[-1], equal_angles(n, self.start)).forward(y) for n, y in zip(n_views, x, strict=True)]

    def fbp(self, y: list[torch.Tensor], size: int) -> torch.Tensor:
        """FBP of measured sinograms, (1, n, bins) each: (B, 1, size, size). D(x, n) = fbp(project(x, n))."""
        operators = [projector(size, equal_angles(sinogram.shape[-2], self.start)) for sinogram in y]
        return torch.stack([A.backprojection(A.filter_sinogram(p)) for A, p in zip(operators, y, strict=True)])

    def shift(self, x_t: torch.Tensor, x0_hat: torch.Tensor, n_t: list[int], n_s: list[int]) -> torch.Tensor:
        """x_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s), in one projection, filter and backprojection of merged views."""
        if self.official:
            x0_hat = self.full(x0_hat)

        def step(key, x, estimate):
            if key[0] == key[1]:
                return x
            angles, _ = _shift_views(*key, self.start)
            return x + projector(x.shape[-1], angles).degrade(estimate, _shift_weights(*key, self.start, x.device))

        return _per_group(step, list(zip(n_t, n_s, strict=True)), x_t, x0_hat)
