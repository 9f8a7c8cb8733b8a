"""Error-Propagating Composite Training (EPCT; Chen et al., MICCAI 2025): the network's inputs and its loss."""

import torch

from models.degradation import LEVELS, Degradation


def views_of(levels: list[int]) -> list[int]:
    """View counts n_t of published levels t."""
    return [LEVELS[t] for t in levels]


def conditioning(levels: list[int], like: torch.Tensor) -> torch.Tensor:
    """Levels t as the network takes them, (B,) float32."""
    return torch.tensor(levels, dtype=torch.float32, device=like.device)


def loss(network, x: torch.Tensor, t: list[int], x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MSE(R(x, t), x0) of each slice, (B,), and the estimate R(x, t) without its graph.

    In units of (config.scale mu)^2, which keeps gradients well above Adam's epsilon; 1 for the published network.
    """
    x0_hat = network(x, conditioning(t, x))
    return ((x0_hat - x0) / network.config.scale).square().mean(dim=(1, 2, 3)), x0_hat.detach()


def denser_level(t: int, T: int, uniform, jumps: float) -> int:
    """The level after t in a chain that began at T: t' ~ U{0..t-1} with probability `jumps`, else t - 1.

    After level 0 a chain goes back to T - 1 (0 if T is 0), as SPDPS's reset does.
    """
    if t == 0:
        return max(T - 1, 0)
    return int(uniform[1] * t) if uniform[0] < jumps else t - 1


@torch.no_grad()
def compose(degrade: Degradation, x_T: torch.Tensor, T: list[int], x_t: torch.Tensor, t: list[int],
            x0_hat: torch.Tensor, s: list[int]) -> torch.Tensor:
    """The composed input x_s = x_t - D(x0_hat, n_t) + D(x0_hat, n_s), which carries the errors of x0_hat.

    A slice at t = 0 starts again from its measurement, x_T - D(x0_hat, n_T) + D(x0_hat, n_s), unless that is level 0
    too: then its input is x0_hat itself.
    """
    def where(levels):
        return torch.tensor([level == 0 for level in levels], device=x_t.device).view(-1, 1, 1, 1)

    again = [t_i or T_i for t_i, T_i in zip(t, T, strict=True)]
    shifted = degrade.shift(torch.where(where(t), x_T, x_t), x0_hat, views_of(again), views_of(s))
    return torch.where(where(again), x0_hat, shifted)


def restart_the_lost(x0: torch.Tensor, x_T: torch.Tensor, T: list[int], x_t: torch.Tensor,
                     t: list[int]) -> tuple[torch.Tensor, list[int]]:
    """(x_t, t), but (x_T, T) for slices whose composed input lies further from x0 than the measurement's FBP does.

    Chains lengthen by themselves as the network learns, and none runs away.
    """
    lost = ((x_t - x0).square().mean(dim=(1, 2, 3)) > (x_T - x0).square().mean(dim=(1, 2, 3))).tolist()
    x_t = torch.where(torch.tensor(lost, device=x_t.device).view(-1, 1, 1, 1), x_T, x_t)
    return x_t, [T_i if gone else t_i for gone, T_i, t_i in zip(lost, T, t, strict=True)]
