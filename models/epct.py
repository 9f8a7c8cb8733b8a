"""Error-Propagating Composite Training (EPCT; Chen et al., MICCAI 2025): the network's inputs and its loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from datasets.loader import Part, deform
from models.consistency import data_consistency
from models.degradation import LEVELS, Degradation, chain_levels, condition
from models.presets import Preset
from models.samplers import anchored_residual


def measured_views(u: float, preset: Preset) -> int:
    """Views n_T of a measurement from a uniform draw u: with probability `between` any count from 18 to 288, the angle
    between two views uniform; of the others, with probability `focus` one of `focus_views`, else a published level's.
    """
    if u < preset.between:
        densest, sparsest = 1 / LEVELS[0], 1 / LEVELS[-1]
        return round(1 / (sparsest - u / preset.between * (sparsest - densest)))
    u = (u - preset.between) / (1 - preset.between)
    if u < preset.focus:
        return preset.focused[int(u / preset.focus * len(preset.focused))]
    return LEVELS[int((u - preset.focus) / (1 - preset.focus) * len(LEVELS))]


def conditioning(views: list[int], kind: str, like: torch.Tensor) -> torch.Tensor:
    """View counts as the network takes them, (B,) float32."""
    return torch.tensor([condition(n, kind) for n in views], device=like.device)


def loss(x0_hat: torch.Tensor, x0: torch.Tensor, kind: str, scale: float) -> torch.Tensor:
    """Loss of an estimate for each slice, (B,).

    kind: "mse", the published one; "rmse", its root: every slice weighs the same however good it already is;
    "charbonnier", mean sqrt(e^2 + 0.01^2) - 0.01, which minds outliers less; "spectral", rmse with every frequency
    weighted by its radius (mean 1), for sharp detail. In units of `scale` mu, which keeps gradients well above Adam's
    epsilon; 1 for the published network.
    """
    error = (x0_hat - x0) / scale
    if kind == "charbonnier":
        return ((error.square() + 0.01**2).sqrt() - 0.01).mean(dim=(1, 2, 3))
    if kind == "spectral":
        ramp = _radii(error.shape[-1], error.device, error.dtype)
        return (torch.fft.fft2(error, norm="ortho").abs().square() * ramp).mean(dim=(1, 2, 3)).sqrt()
    mse = error.square().mean(dim=(1, 2, 3))
    return mse if kind == "mse" else mse.sqrt()


@lru_cache(maxsize=8)
def _radii(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Distance of each frequency of fft2 from zero, (size, size), with mean 1."""
    f = torch.fft.fftfreq(size, device=device, dtype=dtype)
    radii = (f[:, None]**2 + f**2).sqrt()
    return radii / radii.mean()


def denser_views(n: int, levels: tuple[int, ...], uniform, jumps: float) -> int:
    """Views of the level after n views in a chain through `levels`: any denser one, uniformly, with probability
    `jumps`, else the next. A chain at the densest stays there."""
    t = levels.index(n)
    if t == 0:
        return n
    return levels[int(uniform[1] * t) if uniform[0] < jumps else t - 1]


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
    return torch.tensor([n >= LEVELS[0] for n in n_t], device=like.device).view(-1, 1, 1, 1)


@dataclass
class Chain:
    """The slices of one forward and backward call, and where each stands in its chain of inputs."""

    part: Part
    x0: torch.Tensor              # ground truths, mu (B, 1, H, W)
    degrade: Degradation
    dc: Callable | None           # data consistency with the measurements
    x_t: torch.Tensor             # the network's input now
    views: list[int]              # and its view counts
    x0_hat: torch.Tensor | None = None  # the last estimate
    pure: torch.Tensor | None = None    # where x_t is an estimate itself and has no residual, (B, 1, 1, 1)
    measured: tuple[torch.Tensor, list[int]] | None = None  # x_T and n_T, to which residuals are anchored,
    residual: torch.Tensor | None = None                    # and the last such residual


def begin(part: Part, degrade: Degradation, preset: Preset, seed: int, device: str) -> Chain:
    """The restore input x_T = D(x0, n_T), T drawn for each slice."""
    x0 = part.x.to(device, non_blocking=True)
    if preset.deforms:
        x0 = degrade.full(deform(x0, part.indices, seed, preset.rotate, preset.zoom, preset.translate))
    n_T = [measured_views(u[0], preset) for u in part.uniform]
    dc = data_consistency(degrade, degrade.project(x0, n_T), preset.dc) if preset.dc else None
    x_T = degrade(x0, n_T)
    return Chain(part, x0, degrade, dc, x_T, n_T, measured=(x_T, n_T))


def hop(chain: Chain, number: int, preset: Preset) -> None:
    """Compose input number 1, 2, ... of a chain, at denser levels, from the estimate of the input before it."""
    x0_hat = torch.where(chain.x0_hat.isfinite(), chain.x0_hat, chain.x_t)  # what was not finite took no part either
    if preset.residual_channel == "anchored":
        chain.residual = anchored_residual(chain.degrade, x0_hat, *chain.measured)
    if chain.dc:
        x0_hat = chain.dc(x0_hat, range(len(x0_hat)))
    n_s = [denser_views(n, chain_levels(n_T, preset.conditioning, preset.dc), u[2 * number - 1:2 * number + 1],
                        preset.jumps)
           for n, n_T, u in zip(chain.views, chain.measured[1], chain.part.uniform, strict=True)]
    chain.pure = _at_level_0(chain.views, chain.x_t) if preset.update == "shift" else None
    chain.x_t, chain.views = compose(chain.degrade, chain.x_t, chain.views, x0_hat, n_s, preset.update), n_s


def network_input(chain: Chain, network, preset: Preset) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network is called with: x_t (B, channels, H, W) and t (B,).

    The second channel is ReCo-Diff's tanh(x_t - D(x0_hat, n_t)), x0_hat = R([x_t, 0], t) without gradient; 0 where x_t
    is an estimate itself (arXiv 2603.02691). Or, anchored, RBG-Diff's, from the estimate before; 0 in the first call.
    """
    t = conditioning(chain.views, preset.conditioning, chain.x_t)
    if preset.channels == 1:
        return chain.x_t, t
    if preset.residual_channel == "anchored":
        residual = torch.zeros_like(chain.x_t) if chain.residual is None else chain.residual
        return torch.cat([chain.x_t, residual], dim=1), t
    with torch.no_grad():
        x0_hat = network(chain.x_t, t)
        x0_hat = torch.where(x0_hat.isfinite(), x0_hat, chain.x_t)
    with torch.autocast(t.device.type, enabled=False):
        residual = torch.tanh(chain.x_t - chain.degrade(x0_hat, chain.views))
    if chain.pure is not None:
        residual = residual.masked_fill(chain.pure, 0)
    return torch.cat([chain.x_t, residual], dim=1), t
