"""A scan measured by any scanner: its degradation, for the samplers, and consistency with what was measured."""

from dataclasses import dataclass

import torch
from torch_radon.solvers import cgne

from datasets.scanner import Scanner, fbp, projector


@dataclass(frozen=True)
class MeasuredDegradation:
    """D(x, n) in the geometry of a real scanner, without gradients. Images: mu (B, 1, H, W) float32, 1/cm.

    The measurement's own view count stands for its own angles, any other for equally spaced ones.
    """

    scanner: Scanner

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, n_views: list[int]) -> torch.Tensor:
        """D(x, n), n one number a slice."""
        out = torch.empty_like(x)
        for n in dict.fromkeys(n_views):
            scanner = self.scanner if n == len(self.scanner.angles) else self.scanner.resampled(n)
            group = [i for i, views in enumerate(n_views) if views == n]
            out[group] = fbp(scanner, projector(scanner, x.shape[-1]).forward(x[group]), x.shape[-1])
        return out

    def shift(self, x_t: torch.Tensor, x0_hat: torch.Tensor, n_t: list[int], n_s: list[int]) -> torch.Tensor:
        """x_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s)."""
        return x_t - self(x0_hat, n_t) + self(x0_hat, n_s)


def measured_consistency(scanner: Scanner, y: torch.Tensor, iterations: int):
    """dc(x0_hat, slices) as in models/consistency.py, for sinograms y (B, 1, views, bins) of `datasets.scanner`."""
    @torch.no_grad()
    def dc(x0_hat, slices):
        return cgne(projector(scanner, x0_hat.shape[-1]), x0_hat, y[list(slices)], max_iter=iterations)

    return dc if iterations else None
