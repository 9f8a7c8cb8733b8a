"""What a network and its training cost: parameters, FLOPs, memory, time."""

import time
from dataclasses import asdict, replace
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from datasets.loader import load_batch
from datasets.slices import find_slices, read_slices
from models.presets import Preset
from models.schedule import budget, forward_calls
from models.training import Trainer
from models.unet import UNet, UNetConfig
from utils.device import synchronize
from utils.progress import Progress


@lru_cache(maxsize=32)
def cost(config: UNetConfig, size: int, precision: str) -> tuple[int, int, int]:
    """(parameters, FLOPs of a forward call of one slice, bytes kept for its backward call), without running it.

    A multiplication with an addition counts as two FLOPs; a backward call takes twice those of the forward call.
    """
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode():
        network = UNet(config)
        x, t = torch.zeros(1, 1, size, size), torch.zeros(1)
        with (FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
              torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")):
            network(x, t)
        parameters = list(network.parameters())
        for parameter in parameters:
            kept.pop(parameter.untyped_storage()._cdata, None)
    kept_bytes = sum(kept.values()) * (2 if precision == "fp64" else 1)
    return sum(p.numel() for p in parameters), counter.get_total_flops(), kept_bytes


def describe_run(preset: Preset, data, device: str) -> str:
    """Resolved configuration and cost of a run on the training slices of a folder, for a person."""
    files = find_slices(data, "train")
    size = read_slices(files[:1], preset.network().multiple, True)[1].shape[-1]
    parameters, flops, kept = cost(preset.network(), size, preset.precision)
    images, steps, calls = budget(preset, len(files))
    copies = 5 * (8 if preset.precision == "fp64" else 4)  # bytes: weights, EMA, gradient, the two averages of Adam
    held = kept * -(-preset.batch // preset.accumulate) + copies * parameters
    hours = calls / forward_calls(preset, 1 + preset.hops) * seconds_an_image(preset, size, device) / 3600
    return "\n".join([
        *(f"{name:18} {value}" for name, value in asdict(preset).items()),
        f"{parameters:,} parameters; {flops / 1e9:.2f} GFLOP for a call of one slice of {size}x{size}",
        f"{images:,} images, {steps:,} optimizer steps, {calls * flops / 1e15:.4g} PFLOP",
        f"about {held / 2**30:.2f} GiB for one process, besides slices and projector tables",
        f"about {hours:.2f} h besides validation, by one update on this device"])


def seconds_an_image(preset: Preset, size: int, device: str, processes: int = 1) -> float:
    """Seconds that a training image takes where all hops are made, measured; the first of two updates warms up."""
    count = 1 if device == "cpu" else -(-preset.batch // (preset.accumulate * processes))  # a GPU likes batches
    preset = replace(preset, epct_start=0, accumulate=1)
    trainer = Trainer(preset, seed=0, steps=2, device=device)
    _, parts, weight = load_batch(torch.full((count, 1, size, size), 0.2, dtype=preset.dtype), (0, count), 0, preset)
    for _ in Progress(range(2), desc="Measuring how long an update takes", leave=False):
        start = time.perf_counter()
        trainer.update(parts, weight, epoch=0)
        synchronize(device)
    return (time.perf_counter() - start) / (count * processes)
