"""What an image is worth: metrics of single slices in HU windows. A new one is a row of METRICS, nothing else."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.units import WINDOWS, window


def psnr(a: torch.Tensor, b: torch.Tensor, width: float) -> torch.Tensor:
    """dB; 100 at most, so that a slice of air alone, which anything reconstructs, leaves means finite."""
    return -10 * torch.log10(_mse(a, b).clamp_min(1e-10))


def ssim(a: torch.Tensor, b: torch.Tensor, width: float = 1.0) -> torch.Tensor:
    """SSIM with an 11 x 11 Gaussian, sigma 1.5, zero padding, range 1."""
    taps = torch.exp(-((torch.arange(11, device=a.device) - 5.0) ** 2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).to(a.dtype)
    moments = torch.cat([a, b, a * a, b * b, a * b], dim=1).flatten(0, 1)[:, None]
    moments = F.conv2d(moments, taps.view(1, 1, 11, 1), padding=(5, 0))
    moments = F.conv2d(moments, taps.view(1, 1, 1, 11), padding=(0, 5))
    mean_a, mean_b, aa, bb, ab = moments.view(len(a), 5, *a.shape[-2:]).unbind(1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (luminance * structure).mean(dim=(1, 2))


def rmse_hu(a: torch.Tensor, b: torch.Tensor, width: float) -> torch.Tensor:
    """Root mean square error in HU."""
    return _mse(a, b).sqrt() * width


def vif(a: torch.Tensor, b: torch.Tensor, width: float) -> torch.Tensor:
    """Pixel-domain visual information fidelity of a, 1 for b itself (Sheikh & Bovik, IEEE TIP 15(2), 2006), by sewar:
    its noise variance of 2 expects 255 grey values, its four scales 41 pixels, and NaN stands for smaller slices."""
    from sewar.full_ref import vifp  # slow to import

    if min(b.shape[-2:]) < 41:
        return torch.full((len(b),), torch.nan)
    truths, estimates = (255 * x[:, 0].double().cpu().numpy() for x in (b, a))
    return torch.tensor([vifp(*pair) for pair in zip(truths, estimates, strict=True)])


def _mse(a, b):
    return (a - b).square().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Metric:
    label: str                   # in tables and figures
    unit: str                    # behind the label
    better: int                  # 1: more is better, -1: less is
    compute: Callable            # (estimate, truth, width) -> (B,); images (B, 1, H, H) in [0, 1], window width in HU
    scale: float = 1.0           # of the numbers in tables
    digits: int = 2              # in tables
    headline_only: bool = False  # slow: measured and shown in the headline window alone


METRICS = {
    "psnr": Metric("PSNR", "dB", 1, psnr),
    "ssim": Metric("SSIM", "x100", 1, ssim, scale=100),
    "rmse_hu": Metric("RMSE", "HU", -1, rmse_hu, digits=1),
    "vif": Metric("VIF", "x100", 1, vif, scale=100, headline_only=True),
}


def score(estimate_mu: torch.Tensor, truth_mu: torch.Tensor, width: float, centre: float,
          slow: bool = False) -> dict[str, torch.Tensor]:
    """Every metric of each slice in one window, mu (B, 1, H, H) -> {name: (B,)}. slow: those of the headline too."""
    a, b = window(estimate_mu, width, centre), window(truth_mu, width, centre)
    return {name: metric.compute(a, b, width) for name, metric in METRICS.items() if slow or not metric.headline_only}


def headline_ssim(a_mu: torch.Tensor, b_mu: torch.Tensor) -> torch.Tensor:
    """SSIM of each slice in the headline window W3000/L500, mu (B, 1, H, H) -> (B,)."""
    return ssim(window(a_mu, *WINDOWS[0]), window(b_mu, *WINDOWS[0]))
