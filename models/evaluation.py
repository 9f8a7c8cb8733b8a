"""Evaluation: from a ground truth to a measurement, and from an image to the rows of a result table."""

import hashlib
import time
from dataclasses import dataclass

import torch
from torch_radon import transmission_noise

from models.baselines import sirt
from models.degradation import Degradation
from models.estimate import Estimate
from models.reconstructor import Reconstructor
from models.samplers import redegrade, sequential
from utils.device import peak_memory, reset_peak_memory, synchronize
from utils.metrics import score
from utils.units import pixel_cm


@dataclass(frozen=True)
class Noise:
    """Of a simulated measurement."""

    photons: float | None = None  # I0, photons a ray; None: no noise
    electronic: float = 0.0       # standard deviation of electronic noise, counts
    seed: int = 0


def simulate_measurement(x0: torch.Tensor, n_views: int, names: list[str], degrade: Degradation,
                         noise: Noise) -> torch.Tensor:
    """What the scanner gives of slices x0 (B, 1, H, H): sinograms (B, 1, n, bins).

    Noise is a function of seed, name and views. It is drawn on the CPU, so that it does not depend on the device.
    """
    y = degrade.project(x0, n_views)
    if noise.photons is None:
        return y
    noisy = []
    for sinogram, name in zip(y, names, strict=True):
        digest = hashlib.sha256(f"{noise.seed}/{name}/{n_views}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noisy.append(transmission_noise(sinogram.cpu(), noise.photons, pixel_cm(x0.shape[-1]), noise.electronic,
                                        generator))
    return torch.stack(noisy).to(y.device)


@torch.no_grad()
def warm_up(reconstructor: Reconstructor, y: torch.Tensor, size: int) -> None:
    """Compile kernels, build tables and let libraries choose algorithms before anything is timed."""
    degrade, n = reconstructor.degrade, y.shape[-2]
    estimate = Estimate(lambda x, n_t: x[:, :1], degrade, degrade.fbp(y, size), n)
    sequential(estimate, degrade, estimate.x_T, reconstructor.chain(n), redegrade)
    reconstructor.run("one-step", y, size)
    sirt(degrade, y, size, iterations=1)


def timed(reconstructor: Reconstructor, method: str, y: torch.Tensor, size: int, **options):
    """(x0_hat, calls, seconds a slice, GiB at most) of `Reconstructor.run`."""
    device = str(y.device)
    reset_peak_memory(device)
    synchronize(device)
    start = time.perf_counter()
    x0_hat, calls = reconstructor.run(method, y, size, **options)
    synchronize(device)
    return x0_hat, calls, (time.perf_counter() - start) / len(y), peak_memory(device)


def score_rows(x0_hat: torch.Tensor, x0: torch.Tensor, windows, common: list[dict]) -> list[dict]:
    """Result rows, one a slice and window, the headline window first. common: what the rows of a slice share."""
    scores = [score(x0_hat, x0, *window, slow=window == windows[0]) for window in windows]
    return [{**about, "width": w[0], "centre": w[1], **{k: repr(v[i].item()) for k, v in values.items()}}
            for i, about in enumerate(common) for w, values in zip(windows, scores, strict=True)]
