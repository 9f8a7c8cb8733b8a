"""The degradation D(x, n): FBP over n views of the projection over the same views, for any scanner.

A scanner (models/scanner.py) says where its views lie, what they count and makes the projector of such views. All else
is here, the same for the published scanner and a real one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch_radon import BaseRadon, Stack

from models.graphs import directly
from models.levels import FULL_VIEWS
from models.scanner import PublishedScanner, Scanner


@lru_cache(maxsize=2048)  # by view counts: lists of up to 720 angles are slow to look up
def _projector(scanner, size: int, n_views: int, padded: bool) -> BaseRadon:
    return (scanner.padded if padded else scanner.resampled(n_views)).projector(size, scanner.theta(n_views))


@lru_cache(maxsize=1024)
def _difference_projector(scanner, size: int, n_t: int, n_s: int) -> BaseRadon:
    return scanner.padded.projector(size, _difference(scanner, n_t, n_s)[0])


@lru_cache(maxsize=512)
def _shares(scanner, n_views: int, device: torch.device) -> torch.Tensor | None:
    """`Scanner.shares` on a device: CUDA graphs take no copy from the host."""
    shares = scanner.shares(n_views)
    return None if shares is None else torch.from_numpy(shares).to(device)


@lru_cache(maxsize=512)
def _weights(scanner, n_views: int, device: torch.device) -> torch.Tensor | None:
    """What FBP multiplies views by, (n,), or over pi/(2 n) rays, (n, bins); None: pi/(2 n)."""
    shares = _shares(scanner, n_views, device)
    return shares * (math.pi / 2 / n_views) if shares is not None and shares.ndim == 1 else shares


@lru_cache(maxsize=256)
def _difference(scanner, n_t: int, n_s: int) -> tuple[tuple[float, ...], np.ndarray]:
    """Angles of n_t and n_s views, shared ones merged, and their weights in D(., n_s) - D(., n_t), as `_weights`."""
    merged = {}
    for n, sign in ((n_t, -1), (n_s, 1)):
        shares = scanner.shares(n)
        for angle, share in zip(scanner.theta(n), np.ones(n) if shares is None else shares, strict=True):
            first, weight = merged.get(round(angle, 9), (angle, 0.0))
            merged[round(angle, 9)] = first, weight + sign * share.astype(float) * math.pi / (2 * n)
    angles, weights = zip(*(merged[key] for key in sorted(merged)), strict=True)
    rays = any(weight.ndim for weight in weights)
    return angles, np.stack(np.broadcast_arrays(*weights)) * (2 * len(angles) / math.pi if rays else 1)


@lru_cache(maxsize=256)
def _difference_weights(scanner, steps: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """The weights of `_difference` for a step (n_t, n_s) a slice, (B, views) or (B, views, bins), zero beyond a slice's
    views."""
    weights = _together([torch.from_numpy(_difference(scanner, *step)[1]).float() for step in steps])
    return weights.to(device, non_blocking=True)


def _together(weights: list[torch.Tensor]) -> torch.Tensor:
    """Weights of slices, of views or, if there are any of rays, of rays, padded to the most views of a slice."""
    if rays := [w for w in weights if w.ndim == 2]:
        weights = [w if w.ndim == 2 else (w * (2 * len(w) / math.pi))[:, None].expand(-1, rays[0].shape[1])
                   for w in weights]
    return torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)


def _degrade(operator: BaseRadon | Stack, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """FBP of the projection with the weights of views (one call, less memory) or of rays, a last dimension more."""
    if weights is None or weights.ndim == (2 if isinstance(operator, Stack) else 1):
        return operator.degrade(x, weights)
    y = operator.forward(x) * (weights[:, None] if weights.ndim == 3 else weights)
    return operator.backprojection(operator.filter_sinogram(y))


@dataclass(frozen=True)
class Degradation:
    """D and what follows from it, without gradients. Images: mu (B, 1, H, H) float32, 1/cm.

    View counts are one number for the batch or a list, one a slice. official: D'(x, n) = D(R x, n), with the extra
    full-view pass of the published code. It acts on estimates; a measurement is P_n x in any case. graphs: how D and
    `shift` are called (models/graphs.py).
    """

    scanner: PublishedScanner | Scanner = field(default_factory=PublishedScanner)
    official: bool = False
    graphs: Callable = field(default=directly, repr=False, compare=False)

    def operator(self, size: int, n_views: int | list[int], padded: bool = False) -> BaseRadon | Stack:
        """The projector P_n of size x size pixels (torch_radon); for a list of counts the stack of theirs.

        It has the bins that measure or, padded, all that the ramp filter of FBP needs (`Scanner.padded`).
        """
        if isinstance(n_views, int):
            return _projector(self.scanner, size, n_views, padded)
        return Stack([_projector(self.scanner, size, n, padded) for n in n_views])

    def full(self, x: torch.Tensor) -> torch.Tensor:
        """R(x) = D(x, 720): what counts as ground truth."""
        return Degradation(self.scanner.from_zero(), graphs=self.graphs)(x, FULL_VIEWS)

    def __call__(self, x: torch.Tensor, n_views: int | list[int]) -> torch.Tensor:
        """D(x, n)."""
        if self.official:
            x = self.full(x)
        if not isinstance(n_views, int) and len(set(n_views)) == 1:
            n_views = n_views[0]
        if isinstance(n_views, int):
            weights = _weights(self.scanner, n_views, x.device)
        else:
            weights = [_weights(self.scanner, n, x.device) for n in n_views]
            weights = None if weights[0] is None else _together(weights)

        def degraded(x, weights=None):
            return _degrade(self.operator(x.shape[-1], n_views, padded=True), x, weights)

        key = "D", self, n_views if isinstance(n_views, int) else tuple(n_views)
        return self.graphs(key, degraded, *((x,) if weights is None else (x, weights)))

    def project(self, x: torch.Tensor, n_views: int | list[int]) -> torch.Tensor | list[torch.Tensor]:
        """Sinograms y = P_n x: (B, 1, n, bins), or for a list of view counts a list of (1, n, bins)."""
        if isinstance(n_views, int):
            return self.operator(x.shape[-1], n_views).forward(x)
        return [self.operator(x.shape[-1], n).forward(one) for n, one in zip(n_views, x, strict=True)]

    def fbp(self, y: torch.Tensor, size: int) -> torch.Tensor:
        """FBP of sinograms (B, 1, n, bins): (B, 1, size, size). D(x, n) = fbp(project(x, n))."""
        n = y.shape[-2]
        operator, shares = self.operator(size, n, padded=True), _shares(self.scanner, n, y.device)
        if any(padding := self.scanner.resampled(n).padding):
            y = torch.nn.functional.pad(y, padding)
        if shares is not None:
            y = y * (shares if shares.ndim == 2 else shares[:, None])
        return operator.backprojection(operator.filter_sinogram(y))

    def shift(self, x_t: torch.Tensor, x0_hat: torch.Tensor, n_t: list[int], n_s: list[int]) -> torch.Tensor:
        """x_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s), in one projection, filter and backprojection of merged views."""
        if self.official:
            x0_hat = self.full(x0_hat)
        steps = tuple(zip(n_t, n_s, strict=True))

        def shifted(x_t, x0_hat, weights):
            projectors = [_difference_projector(self.scanner, x_t.shape[-1], *step) for step in steps]
            if len(set(steps)) == 1:
                return x_t + _degrade(projectors[0], x0_hat, weights[0])
            return x_t + _degrade(Stack(projectors), x0_hat, weights)

        return self.graphs(("shift", self, steps), shifted, x_t, x0_hat,
                           _difference_weights(self.scanner, steps, x_t.device))
