"""Error-Propagating Composite Training (EPCT; Chen et al., MICCAI 2025): the network's inputs and its loss."""

import torch

from models.degradation import LEVELS, Degradation

FOCUS = tuple(LEVELS.index(n) for n in (18, 36, 72))  # the sparsity levels that the field reports


def measured_level(u: float, focus: float) -> int:
    """Level T of a measurement from a uniform draw u: one of FOCUS with probability `focus`, else any."""
    if u < focus:
        return FOCUS[int(u / focus * len(FOCUS))]
    return int((u - focus) / (1 - focus) * len(LEVELS))


def views_of(levels: list[int]) -> list[int]:
    """View counts n_t of published levels t."""
    return [LEVELS[t] for t in levels]


def conditioning(levels: list[int], like: torch.Tensor) -> torch.Tensor:
    """Levels t as the network takes them, (B,) float32."""
    return torch.tensor(levels, dtype=torch.float32, device=like.device)


def loss(network, x: torch.Tensor, t: list[int], x0: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of R(x, t) against x0 for each slice, (B,), and the estimate without its graph.

    kind: "mse", the published one, or "rmse", its root: every slice weighs the same however good it already is. In
    units of config.scale mu, which keeps gradients well above Adam's epsilon; 1 for the published network.
    """
    x0_hat = network(x, conditioning(t, x))
    mse = ((x0_hat - x0) / network.config.scale).square().mean(dim=(1, 2, 3))
    return mse if kind == "mse" else mse.sqrt(), x0_hat.detach()


def denser_level(t: int, uniform, jumps: float) -> int:
    """The level after t: t' ~ U{0..t-1} with probability `jumps`, else t - 1. A chain at level 0 stays there."""
    if t == 0:
        return 0
    return int(uniform[1] * t) if uniform[0] < jumps else t - 1


@torch.no_grad()
def compose(degrade: Degradation, x_t: torch.Tensor, t: list[int], x0_hat: torch.Tensor, s: list[int],
            update: str) -> torch.Tensor:
    """The composed input at level s, which carries the errors of x0_hat.

    update: "shift", the published x_t - D(x0_hat, n_t) + D(x0_hat, n_s), and x0_hat itself at t = 0; or "naive",
    D(x0_hat, n_s).
    """
    if update == "naive":
        return degrade(x0_hat, views_of(s))
    at_0 = torch.tensor([level == 0 for level in t], device=x_t.device).view(-1, 1, 1, 1)
    return torch.where(at_0, x0_hat, degrade.shift(x_t, x0_hat, views_of(t), views_of(s)))
