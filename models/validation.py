"""Validation while training: fixed slices, one call and a whole chain, at the three levels that the field reports."""

import numpy as np
import torch

from models.checkpoint import denoiser
from models.consistency import data_consistency
from models.degradation import Degradation
from models.presets import Preset
from models.samplers import SAMPLERS, chain_of
from utils.distributed import gather
from utils.metrics import measure
from utils.units import WINDOWS, window


def validate(network, truths: torch.Tensor, preset: Preset, device: str):
    """Mean PSNR/SSIM (W3000/L500) of one-step and the preset's sampler at 18, 36, 72 views, 18-view MSE, a picture.

    truths: x0 (N, 1, H, H), mu, of this process; the means are those over all processes. The picture (1, H, W) shows
    this process's first slices: truth, FBP and reconstruction, a level below the other.
    """
    was_training = network.training
    network.eval()
    degrade = Degradation()
    scores, rows = {}, []
    for n in (18, 36, 72):
        for i in range(0, len(truths), 4):
            x0 = truths[i:i + 4].to(device)
            y = degrade.project(x0, [n] * len(x0))
            x_T, dc = degrade.fbp(y, x0.shape[-1]), data_consistency(degrade, y, preset.dc)
            for name, consistent in {"one-step": None, preset.val_sampler: dc}.items():
                x0_hat, _ = SAMPLERS[name](denoiser(network), degrade, x_T, dc=consistent,
                                           **chain_of(preset.network(), n, preset.dc))
                for metric, value in measure(x0_hat, x0, *WINDOWS[0]).items():
                    scores.setdefault(f"val{n}/{name}/{metric}", []).extend(value.tolist())
            if n == 18:
                mse = (x0_hat - x0).square().mean(dim=(1, 2, 3))
                scores.setdefault("val18/mse", []).extend(mse.tolist())
            if i == 0:
                rows.append(torch.cat([window(image[0], *WINDOWS[0]) for image in (x0, x_T, x0_hat)], dim=-1))
    network.train(was_training)
    shards = gather(scores)
    means = {k: float(np.mean([v for shard in shards for v in shard.get(k, [])])) for k in shards[0]}
    return means, torch.cat(rows, dim=-2) if rows else None
