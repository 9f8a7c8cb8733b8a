"""The network as samplers see it: estimate(x_t, n_t, slices) -> x0_hat."""

import sys

import torch

from models.graphs import directly
from models.levels import LEVELS, condition
from utils.units import HU_RANGE, hu_to_mu


def denoiser(network, clip: bool = True, precision: str = "fp32", levels: tuple[int, ...] = LEVELS,
             photons: float | None = None, graphs=directly):
    """denoise(x_t, n_t): R(x_t, t) for x_t (B, channels, H, H) and a list of view counts.

    clip: keep estimates within what HU can be, [-1024, 3071], so that the errors of a long chain do not grow without
    bound; the published procedure does not. precision: "fp32" or "bf16", the network's arithmetic. photons: I0 of noisy
    measurements, where known, for a network that is told it. graphs: see models/graphs.py. A CPU takes one slice at a
    time: its convolutions add in an order that depends on the batch, and a chain magnifies that to 3e-4.
    """
    lowest, highest = (hu_to_mu(hu) for hu in HU_RANGE)
    weight = next(network.parameters())
    device = weight.device
    together = 1 if device.type == "cpu" else sys.maxsize

    def estimate(x_t, *told):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts = zip(*(values.split(together) for values in (x_t, *told)), strict=True)
            x0_hat = torch.cat([network(*part) for part in parts])
        return x0_hat.clamp(lowest, highest) if clip else x0_hat

    @torch.no_grad()
    def denoise(x_t, n_t):
        t = on_device([condition(n, network.config.conditioning, levels) for n in n_t], device)
        told = (t, torch.full_like(t, photons)) if photons and network.config.told_photons else (t,)
        return graphs((network, weight.data_ptr(), clip, precision), estimate, x_t, *told)

    return denoise


def on_device(values: list[float] | list[bool], device) -> torch.Tensor:
    """Numbers as (n,) on a device, float32 or bool. Nobody waits; equal ones take no copy, as graphs need it."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], device=device)
    return torch.tensor(values).to(device, non_blocking=True)


def anchored_residual(degrade, x0_hat: torch.Tensor, x_T: torch.Tensor, n_T) -> torch.Tensor:
    """tanh(D(x0_hat, n_T) - x_T): where an estimate contradicts the measurement (RBG-Diff, 2026)."""
    return torch.tanh(degrade(x0_hat, n_T) - x_T)


class Estimate:
    """One estimate of x0 a call, and the number of calls of each slice in `calls`.

    denoise(x_t, n_t): the network. x_T (B, 1, H, H): FBP of the measurements, n_T their view count. consistency(x0_hat,
    slices): data consistency, or None. anchored: the network was trained with `anchored_residual` as second channel.
    callback(slices, n_t, x0_hat): sees every call. mirror: every second call sees its input mirrored left to right, and
    its estimate is mirrored back: the errors of one orientation do not add up along a chain (docs/results.md).
    """

    def __init__(self, denoise, degrade, x_T, n_T: int, consistency=None, anchored: bool = False, callback=None,
                 mirror: bool = False):
        self.denoise, self.degrade, self.x_T, self.n_T = denoise, degrade, x_T, n_T
        self.consistency, self.anchored, self.mirror, self.callback = consistency, anchored, mirror, callback
        self.calls, self._last = [0] * len(x_T), {}

    def __call__(self, x_t, n_t: list[int], slices=None, residual=None, consistent: bool = True):
        """x0_hat of some slices (all if None) from x_t (b, 1, H, H) with n_t views' artefacts each.

        residual: the second channel; where it is not given and the network is anchored, that of the network's last
        estimate of each slice, as it was before data consistency, which leaves little of it (the first call has none).
        consistent: whether data consistency follows.
        """
        slices = range(len(self.x_T)) if slices is None else slices
        if self.anchored and self._last and residual is None:
            last = torch.stack([self._last[i] for i in slices])
            x_T = torch.stack([self.x_T[i] for i in slices])
            residual = anchored_residual(self.degrade, last, x_T, [self.n_T] * len(last))
        x = x_t if residual is None else torch.cat([x_t, residual], dim=1)
        mirrored = self.mirror and self.calls[slices[0]] % 2  # all slices of a call have had as many before
        x0_hat = self.denoise(x.flip(-1), n_t).flip(-1) if mirrored else self.denoise(x, n_t)
        self._last.update(zip(slices, x0_hat, strict=True))
        if self.consistency and consistent:
            x0_hat = self.consistency(x0_hat, slices)
        for i in slices:
            self.calls[i] += 1
        if self.callback:
            self.callback(slices, n_t, x0_hat)
        return x0_hat
