"""How far an image can be trusted: the share that its measurement does not determine, and an interval for each pixel.

    r = Reconstructor.from_checkpoint("tiny")
    x0_hat, _ = r.run("spdps", r.simulate(hu, views=36))
    unseen, half_width = undetermined(r.degrade, x0_hat, 36), r.half_width(x0_hat, 36)

The interval is x0_hat - half_width to x0_hat + half_width. A second network predicts it (models/train_trust.py). It is
scaled so that it held the truth in nine of ten pixels of the validation slices (split conformal prediction;
Angelopoulos and Bates, arXiv 2107.07511).
"""

from pathlib import Path

import numpy as np
import torch
from torch_radon.solvers import cgne

from models.checkpoint import load_checkpoint
from models.degradation import Degradation
from models.estimate import on_device
from models.levels import condition
from models.unet import UNet, UNetConfig
from utils.errors import InputError
from utils.files import hash16

ITERATIONS = 512  # of CG, for the share that a person sees; it determines 32 x 32 pixels from 720 views to 1e-3
FEW = 32          # and for what the network sees
COVERAGE = 0.9
TYPICAL = 0.002   # 1/cm, 10 HU: a half width where the network says 0
LARGEST = 6.0     # and how many times e more or less it can say
NOISELESS = 1e8   # photons that count as no noise when scales are interpolated


def config(width: int = 32) -> UNetConfig:
    """The error network: two channels, an image and its undetermined share, to a half width."""
    return UNetConfig(width=width, multipliers=(1, 2, 2), blocks=1, dropout=0.0, stem=2, shift=0.1, scale=0.1,
                      channels=2, zero_init=True, told_photons=True, conditioning="log-views")


@torch.no_grad()
def undetermined(degrade: Degradation, x: torch.Tensor, n_views: int, iterations: int = ITERATIONS) -> torch.Tensor:
    """(I - P^+ P) x: the part of images x (B, 1, H, H) that n views cannot see, mu.

    P^+ P x is the least-norm least-squares solution of the views of x itself. So noise in the measurement, which such a
    solution magnifies, has no part in it. Where an image fits its measurement exactly, both are the same.
    """
    operator = degrade.operator(x.shape[-1], n_views)
    return x - cgne(operator, torch.zeros_like(x), operator.forward(x), max_iter=iterations, tol=1e-8)


def half_widths(network: UNet, x: torch.Tensor, unseen: torch.Tensor, n_views: list[int], photons=None) -> torch.Tensor:
    """What the error network says of images x and `undetermined` ones after FEW iterations, (B, 1, H, H): mu, > 0.

    photons: as the network of the images was told them, (B,), or None.
    """
    t = on_device([condition(n, "log-views") for n in n_views], x.device)
    said = network(torch.cat([x, unseen], dim=1), t, photons).float()
    said = (said - network.config.shift) / network.config.scale
    return TYPICAL * (LARGEST * torch.tanh(said / LARGEST)).exp()


def scale_at(scales: list[list], n_views: int, photons: float | None) -> float:
    """Interpolated between the nearest calibrated view counts and photon numbers, linearly in their logarithms.

    scales: rows (views, photons or None, scale) of a whole grid. Beyond the grid its edge counts.
    """
    noise = sorted({p or NOISELESS for _, p, _ in scales})
    rows = [sorted((n, scale) for n, p, scale in scales if (p or NOISELESS) == level) for level in noise]
    column = [np.interp(np.log(n_views), np.log([n for n, _ in row]), [scale for _, scale in row]) for row in rows]
    return float(np.interp(np.log(photons or NOISELESS), np.log(noise), column))


def beside(checkpoint: Path) -> Path:
    """Where the error network of a checkpoint lies."""
    return checkpoint.with_name(f"{checkpoint.stem}-trust.safetensors")


def load_error_network(checkpoint: Path, device: str) -> tuple[UNet, dict] | None:
    """(error network, its header) of a checkpoint's weights, or None where there is none beside it.

    Raises InputError where the file is none, or was made for other weights.
    """
    if not (path := beside(checkpoint)).is_file():
        return None
    network, header = load_checkpoint(path, device)
    if (header.get("predicts") != "error" or network.config != config(network.config.width)
            or not _are_scales(header.get("scales"))):
        raise InputError(f"{path} holds no error network; expected what python -m models.train_trust writes.")
    if header.get("of") != hash16(checkpoint):
        raise InputError(f"{path} was made for other weights than {checkpoint}; make it anew by python -m "
                         "models.train_trust, or remove it.")
    return network, header


def _are_scales(found) -> bool:
    """Whether these are rows (views, photons or None, scale) of a whole grid, of positive numbers."""
    if not (isinstance(found, list) and found and all(isinstance(row, list) and len(row) == 3 for row in found)):
        return False
    rows = [(n, NOISELESS if p is None else p, scale) for n, p, scale in found]
    if not all(isinstance(value, int | float) and 0 < value < 1e30 for row in rows for value in row):
        return False
    grid = {row[:2] for row in rows}
    return len(rows) == len(grid) == len({n for n, _ in grid}) * len({p for _, p in grid})


def uncalibrated(header: dict, method: str, dc: int, n_views: int, size: int, scanner) -> str:
    """What of a reconstruction the intervals were not calibrated for, by an error network's header, or ""."""
    views = [n for n, _, _ in header["scales"]]
    return ", ".join(text for text, other in (
        (f"--method {method}", method != header.get("method", method)), (f"--dc {dc}", dc != header.get("dc", dc)),
        ("this scanner", scanner is not None), (f"{size} pixels", size != header.get("size", size)),
        (f"{n_views} views", not min(views) <= n_views <= max(views))) if other)
