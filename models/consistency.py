"""Data consistency: estimates brought back to the measured sinogram by conjugate gradients (README, "Method")."""

import torch
from torch_radon.solvers import cgne

from models.degradation import Degradation, equal_angles, projector


def data_consistency(degrade: Degradation, y: list[torch.Tensor], iterations: int):
    """dc(x0_hat, slices): `iterations` of CG on min |P_n x - y|^2 from the estimates x0_hat (B, 1, H, W) of `slices`.

    y: measured sinograms, (1, n, bins) each. The correction lies in the range of P_n^T: what the measurement does not
    see stays as the network has it. None for 0 iterations.
    """
    @torch.no_grad()
    def dc(x0_hat, slices):
        x, views = torch.empty_like(x0_hat), [y[i].shape[-2] for i in slices]
        for n in dict.fromkeys(views):
            group = [j for j, v in enumerate(views) if v == n]
            operator = projector(x.shape[-1], equal_angles(n, degrade.start))
            x[group] = cgne(operator, x0_hat[group], torch.stack([y[slices[j]] for j in group]), max_iter=iterations)
        return x

    return dc if iterations else None
