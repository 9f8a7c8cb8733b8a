"""Error-Propagating Composite Training: the two losses (method.md section 3)."""

import torch

from models.degradation import LEVELS, Degradation


def views_of(levels) -> list[int]:
    """View counts n_t of a batch of published levels t."""
    return [LEVELS[t] for t in levels]


def conditioning(levels, like: torch.Tensor) -> torch.Tensor:
    """Levels t as the network takes them, (B,) float32."""
    return torch.tensor(levels, dtype=torch.float32, device=like.device)


def restore_input(degrade: Degradation, x0: torch.Tensor, t: list[int]) -> torch.Tensor:
    """x_t = D(x0, n_t)."""
    return degrade(x0, views_of(t))


@torch.no_grad()
def compose_input(ema, degrade: Degradation, x_t: torch.Tensor, t: list[int], s: list[int]) -> torch.Tensor:
    """x~_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s) with x0_hat = R_ema(x_t, t); at t = 0, where s = 0, x0_hat itself."""
    x0_hat = ema(x_t, conditioning(t, x_t))
    shifted = degrade.shift(x_t, x0_hat, views_of(t), views_of(s))
    densest = torch.tensor([level == 0 for level in t], device=x_t.device).view(-1, 1, 1, 1)
    return torch.where(densest, x0_hat, shifted)


def loss(network, x: torch.Tensor, t: list[int], x0: torch.Tensor) -> torch.Tensor:
    """MSE(R(x, t), x0) of each slice, (B,): L1 on restore inputs, L2 on composed ones. In units of (config.scale mu)^2.

    The unit keeps gradients well above Adam's epsilon; it is 1 for the published network.
    """
    return ((network(x, conditioning(t, x)) - x0) / network.config.scale).square().mean(dim=(1, 2, 3))
