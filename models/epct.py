"""Error-Propagating Composite Training (EPCT; Chen et al., MICCAI 2025): the network's inputs and its loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from datasets.loader import Part
from models.consistency import data_consistency
from models.degradation import Degradation
from models.drawn import draw_measurement, measure
from models.estimate import anchored_residual, on_device
from models.levels import LEVELS, chain_levels, condition
from models.presets import Preset


def next_level(n: int, levels: tuple[int, ...], uniform, jumps: float) -> int:
    """Views of the level after n views in a chain through `levels`.

    With probability `jumps` any denser one, uniformly, else the next. A chain at the densest stays there.
    """
    t = levels.index(n)
    if t == 0:
        return n
    return levels[int(uniform[1] * t) if uniform[0] < jumps else t - 1]


def loss(x0_hat: torch.Tensor, x0: torch.Tensor, kind: str, scale: float) -> torch.Tensor:
    """Loss of an estimate for each slice, (B,).

    kind: "mse", the published one; "rmse", its root: every slice weighs the same however good it already is. In units
    of `scale` mu, which keeps gradients well above Adam's epsilon; 1 for the published network.
    """
    mse = ((x0_hat - x0) / scale).square().mean(dim=(1, 2, 3))
    return mse if kind == "mse" else mse.sqrt()


@torch.no_grad()
def compose(degrade: Degradation, x_t: torch.Tensor, n_t: list[int], x0_hat: torch.Tensor, n_s: list[int],
            update: str) -> torch.Tensor:
    """The composed input of n_s views, which carries the errors of x0_hat.

    update: "shift", the published x_t - D(x0_hat, n_t) + D(x0_hat, n_s), and x0_hat itself at t = 0; or "naive",
    D(x0_hat, n_s).
    """
    if update == "naive":
        return degrade(x0_hat, n_s)
    return torch.where(_at_level_0(n_t, x_t), x0_hat, degrade.shift(x_t, x0_hat, n_t, n_s))


def _at_level_0(n_t: list[int], like: torch.Tensor) -> torch.Tensor:
    return on_device([n >= LEVELS[0] for n in n_t], like.device).view(-1, 1, 1, 1)


@dataclass
class Chain:
    """The slices of one forward and backward call, and where each stands in its chain of inputs."""

    part: Part
    x0: torch.Tensor              # ground truths, mu (B, 1, H, H)
    degrade: Degradation
    x_T: torch.Tensor             # the restore input
    n_T: list[int]                # and its view counts, one a slice
    dc: Callable | None           # data consistency with the measurements
    x_t: torch.Tensor             # the network's input now
    n_t: list[int]                # and its view counts
    x0_hat: torch.Tensor | None = None       # the last estimate
    is_estimate: torch.Tensor | None = None  # where x_t is an estimate itself and has no residual, (B, 1, 1, 1)
    residual: torch.Tensor | None = None     # the last anchored residual
    photons: torch.Tensor | None = None      # what the network is told of the noise, (B,)


def start_chain(part: Part, degrade: Degradation, preset: Preset, device: str, seed: int = 0) -> Chain:
    """The restore input, n_T drawn for each slice: x_T = D(x0, n_T), or the FBP of noisy measurements.

    A drawn scanner has its n_T views, the same for every slice.
    """
    x0 = part.x.to(device, non_blocking=True)
    n_T, noise = draw_measurement(part, degrade, preset)
    noisy = any(math.isfinite(photons) for photons, _ in noise)
    y = measure(part, degrade, x0, n_T, noise, seed) if preset.dc or noisy else None
    x_T = torch.cat([degrade.fbp(p[None], x0.shape[-1]) for p in y]) if noisy else degrade(x0, n_T)
    photons, electronic = None, 0.0
    if noise:
        photons, electronic = torch.tensor(noise, dtype=torch.float32).T.to(device, non_blocking=True)
    dc = data_consistency(degrade, y, preset.dc, photons, electronic) if preset.dc else None
    return Chain(part, x0, degrade, x_T, n_T, dc, x_T, n_T, photons=photons if preset.told_photons else None)


def advance(chain: Chain, hop: int, preset: Preset) -> None:
    """Compose the input of hop 1, 2, ... of a chain, at denser levels, from the estimate of the input before it."""
    x0_hat = torch.where(chain.x0_hat.isfinite(), chain.x0_hat, chain.x_t)  # what was not finite took no part either
    if preset.residual_channel == "anchored":
        chain.residual = anchored_residual(chain.degrade, x0_hat, chain.x_T, chain.n_T)
    if chain.dc:
        x0_hat = chain.dc(x0_hat, range(len(x0_hat)))
    n_s = [next_level(n, chain_levels(n_T, preset.conditioning, preset.dc), u[2 * hop - 1:2 * hop + 1], preset.jumps)
           for n, n_T, u in zip(chain.n_t, chain.n_T, chain.part.uniform, strict=True)]
    chain.is_estimate = _at_level_0(chain.n_t, chain.x_t) if preset.update == "shift" else None
    chain.x_t, chain.n_t = compose(chain.degrade, chain.x_t, chain.n_t, x0_hat, n_s, preset.update), n_s


def network_input(chain: Chain, network, preset: Preset) -> tuple[torch.Tensor, ...]:
    """What the network is called with: x_t (B, channels, H, H), t (B,) and, if it is told them, photons (B,).

    The second channel is ReCo-Diff's tanh(x_t - D(x0_hat, n_t)), x0_hat = R([x_t, 0], t) without gradient; 0 where x_t
    is an estimate itself (arXiv 2603.02691). Or, anchored, RBG-Diff's, from the estimate before; 0 in the first call.
    """
    t = on_device([condition(n, preset.conditioning) for n in chain.n_t], chain.x_t.device)
    told = (t,) if chain.photons is None else (t, chain.photons)
    if preset.channels == 1:
        return chain.x_t, *told
    if preset.residual_channel == "anchored":
        residual = torch.zeros_like(chain.x_t) if chain.residual is None else chain.residual
        return torch.cat([chain.x_t, residual], dim=1), *told
    with torch.no_grad():
        x0_hat = network(chain.x_t, *told)
        x0_hat = torch.where(x0_hat.isfinite(), x0_hat, chain.x_t)
    with torch.autocast(t.device.type, enabled=False):
        residual = torch.tanh(chain.x_t - chain.degrade(x0_hat, chain.n_t))
    if chain.is_estimate is not None:
        residual = residual.masked_fill(chain.is_estimate, 0)
    return torch.cat([chain.x_t, residual], dim=1), *told
