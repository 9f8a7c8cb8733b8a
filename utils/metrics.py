"""PSNR, SSIM, RMSE and VIF of single slices in HU windows."""

import torch
import torch.nn.functional as F
from sewar.full_ref import vifp

from utils.units import WINDOWS, window


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM of each slice, (B, 1, H, W) in [0, 1] -> (B,): 11 x 11 Gaussian, sigma 1.5, zero padding, range 1."""
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


def headline_ssim(a_mu: torch.Tensor, b_mu: torch.Tensor) -> torch.Tensor:
    """SSIM of each slice in the headline window W3000/L500, mu (B, 1, H, W) -> (B,)."""
    return ssim(window(a_mu, *WINDOWS[0]), window(b_mu, *WINDOWS[0]))


def measure(estimate_mu: torch.Tensor, truth_mu: torch.Tensor, width: float, centre: float) -> dict[str, torch.Tensor]:
    """`psnr` (dB), `ssim`, `rmse_hu` of each slice in one window, mu (B, 1, H, W) -> (B,) each.

    PSNR is 100 dB at most, so that a slice of air alone, which anything reconstructs, leaves means finite.
    """
    a, b = window(estimate_mu, width, centre), window(truth_mu, width, centre)
    mse = (a - b).square().mean(dim=(1, 2, 3))
    return {"psnr": -10 * torch.log10(mse.clamp_min(1e-10)), "ssim": ssim(a, b), "rmse_hu": mse.sqrt() * width}


def vif(estimate_mu: torch.Tensor, truth_mu: torch.Tensor, width: float, centre: float) -> torch.Tensor:
    """Pixel-domain visual information fidelity of each slice in one window, mu (B, 1, H, W) -> (B,); 1 for the truth.

    Sheikh & Bovik, IEEE TIP 15(2), 2006, by sewar, for a window of 255 grey values, as its noise variance of 2 expects.
    NaN for slices under 41 pixels, too small for its four scales.
    """
    if min(truth_mu.shape[-2:]) < 41:
        return torch.full((len(truth_mu),), torch.nan)
    images = [255 * window(x, width, centre)[:, 0].double().cpu().numpy() for x in (truth_mu, estimate_mu)]
    return torch.tensor([vifp(truth, estimate) for truth, estimate in zip(*images, strict=True)])
