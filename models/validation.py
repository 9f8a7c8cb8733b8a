"""Validation while training: fixed slices, one call and a whole chain, at the three levels that the field reports,
and the chain with noise where training has noise."""

import numpy as np
import torch

from models.consistency import ITERATIONS
from models.evaluation import Noise, simulate_measurement
from models.graphs import directly
from models.presets import Preset
from models.reconstructor import Reconstructor
from utils.distributed import gather
from utils.metrics import score
from utils.units import WINDOWS, window

VIEWS = (18, 36, 72)
PHOTONS = ("1e5", "1e4")


def validate(network, truths: torch.Tensor, preset: Preset, device: str):
    """Mean PSNR/SSIM (W3000/L500) of one-step and the preset's sampler at 18, 36, 72 views, 18-view MSE, a picture.

    truths: x0 (N, 1, H, H), mu, of this process; the means are those over all processes. Methods are those of test.py
    as it runs them on such weights, with its iterations of data consistency. The picture (1, H, W) shows this process's
    first slices: truth, FBP and reconstruction, a level below the other.
    """
    was_training = network.training
    network.eval()
    reconstructor = Reconstructor(network, device=device, dc=ITERATIONS if preset.dc else 0,
                                  mirror=preset.dc > 0, graphs=directly)
    scores, rows = {}, []

    def note(name, x0_hat, x0):
        for metric, value in score(x0_hat, x0, *WINDOWS[0]).items():
            scores.setdefault(f"{name}/{metric}", []).extend(value.tolist())

    for n in VIEWS:
        for i in range(0, len(truths), 4):
            x0 = truths[i:i + 4].to(device)
            y = reconstructor.degrade.project(x0, n)
            for photons in PHOTONS if preset.noise_share else ():
                names = [str(j) for j in range(i, i + len(x0))]
                noisy = simulate_measurement(x0, n, names, reconstructor.degrade, Noise(float(photons)))
                x0_hat, _ = reconstructor.run(preset.val_sampler, noisy, x0.shape[-1], photons=float(photons))
                note(f"val{n} {photons} photons/{preset.val_sampler}", x0_hat, x0)
            for name in dict.fromkeys(("one-step", preset.val_sampler)):
                x0_hat, _ = reconstructor.run(name, y, x0.shape[-1])
                note(f"val{n}/{name}", x0_hat, x0)
            if n == VIEWS[0]:
                mse = (x0_hat - x0).square().mean(dim=(1, 2, 3))
                scores.setdefault("val18/mse", []).extend(mse.tolist())
            if i == 0:
                x_T = reconstructor.degrade.fbp(y, x0.shape[-1])
                rows.append(torch.cat([window(image[0], *WINDOWS[0]) for image in (x0, x_T, x0_hat)], dim=-1))
    network.train(was_training)
    shards = gather(scores)
    means = {k: float(np.mean([v for shard in shards for v in shard.get(k, [])])) for k in shards[0]}
    return means, torch.cat(rows, dim=-2) if rows else None
