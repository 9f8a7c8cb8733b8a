"""When what happens in training: optimizer steps of a batch, learning rate, EMA, validation."""

import math

import torch

from datasets.loader import batches
from models.presets import Preset


def inputs_of(preset: Preset, step: int) -> int:
    """Inputs made of each slice of a batch that starts after `step` optimizer steps: x_T, and one a hop once these
    have begun. Each is an optimizer step."""
    return 1 + preset.hops * (step + 1 > preset.epct_start)


def forward_calls(preset: Preset, inputs: int) -> int:
    """Cost of a slice's `inputs` in forward calls: a backward call costs two, the EMA's estimate and the first pass
    that fills a residual channel one each."""
    two = preset.channels == 2 and preset.residual_channel == "two-pass"
    return inputs * (3 + two) + (inputs - 1) * (1 + two) * (preset.estimates_by == "ema")


def budget(preset: Preset, count: int) -> tuple[int, int, int]:
    """Images and optimizer steps of the whole run on `count` slices, and its cost in forward calls of one slice."""
    images, step, calls = preset.images or preset.epochs * count, 0, 0
    for first, last in batches(count, preset.batch, images):
        calls += (last - first) * forward_calls(preset, inputs_of(preset, step))
        step += inputs_of(preset, step)
    return images, step, calls


def learning_rate(preset: Preset, step: int, steps: int, epoch: int) -> float:
    """Rate of the optimizer step that follows `step` of `steps`, in pass number `epoch` (from 0) over the data."""
    if preset.schedule == "step":
        return preset.lr * 0.8 ** (epoch // 25)
    if step < preset.warmup:
        return preset.lr * (step + 1) / preset.warmup
    return preset.lr * 0.5 * (1 + math.cos(math.pi * (step - preset.warmup) / max(1, steps - preset.warmup)))


@torch.no_grad()
def update_ema(ema, network, step: int, preset: Preset) -> None:
    """After optimizer step number `step`: every ema_every steps copy (before ema_start) or average."""
    if step % preset.ema_every == 0:
        keep = 0.0 if step < preset.ema_start else preset.ema
        for average, value in zip(ema.parameters(), network.parameters(), strict=True):
            average.lerp_(value, 1 - keep)


def validation_due(preset: Preset, before: int, seen: int, images: int, count: int) -> bool:
    """Whether the batch that brought `before` to `seen` images ends at a validation."""
    if preset.val_every:
        return seen // preset.val_every > before // preset.val_every or seen == images
    return seen == images or (seen % count == 0 and (seen // count - 1) % 3 == 0)
