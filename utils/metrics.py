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
    """Pixel-domain visual information fidelity of a, float64; 1 for b itself and where b is constant and says nothing.

    Sheikh & Bovik, IEEE TIP 15(2), 2006, for windows of 255 grey values, as its noise variance of 2 expects. NaN for
    slices under 41 pixels, too small for its four scales. A CPU takes one slice at a time: its sums over a batch add in
    another order.
    """
    if b.shape[-1] < 41:
        return b.new_full((len(b),), torch.nan, dtype=torch.float64)
    together = 1 if b.device.type == "cpu" else len(b)
    parts = zip(a.squeeze(1).double().split(together), b.squeeze(1).double().split(together), strict=True)
    return torch.cat([_vif(255 * (x - 0.5), 255 * (y - 0.5)) for x, y in parts])  # about zero rounding is least


def _vif(a, b):
    tiny, noise = 1e-10, 2.0  # variances: what is rounding alone, and the noise of the eye
    seen = known = 0.0        # what the eye learns of b from a, and from b itself
    for size in (17, 9, 5, 3):
        if size < 17:  # the next scale: half as many pixels
            a, b = (_smooth(x, size, step=2) for x in (a, b))
        mean_a, mean_b, aa, bb, ab = _smooth(torch.stack([a, b, a * a, b * b, a * b]), size)
        var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
        # The paper's channel: locally a is gain b and a distortion of its own.
        gain = torch.where(torch.minimum(var_a, var_b) < tiny, 0.0, covariance / (var_b + tiny)).clamp_min(0)
        distortion = (var_a - gain * covariance).clamp_min(tiny)
        var_b = torch.where(var_b < tiny, 0.0, var_b)
        seen = seen + torch.log1p(gain**2 * var_b / (distortion + noise)).sum((-2, -1))
        known = known + torch.log1p(var_b / noise).sum((-2, -1))
    return torch.where(known > 0, seen / known, 1.0)


def _smooth(x, size, step=1):
    """Means of images (..., H, H) under a Gaussian window of size x size pixels, sigma size/5, at every step-th place.

    Only where the window fits. As products with its band matrix: in float64 ten times as fast as convolutions.
    """
    side = x.shape[-1]
    first, column = torch.arange(0, side - size + 1, step, device=x.device), torch.arange(side, device=x.device)
    offset = (column - first.unsqueeze(1) - size // 2).to(x.dtype)
    band = torch.where(offset.abs() <= size // 2, torch.exp(-(offset**2) / (2 * (size / 5) ** 2)), 0.0)
    band = band / band.sum(1, keepdim=True)
    return band @ x @ band.mT


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
