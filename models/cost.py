"""What a network and its training cost: parameters, FLOPs, memory, time."""

import time
from dataclasses import asdict
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from datasets.slices import find_slices, read_slices
from models.presets import Preset
from models.schedule import budget
from models.unet import UNet, UNetConfig
from utils.device import bf16_pays


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
    hours = calls / 3 * seconds_a_call(preset, size, device) / 3600
    return "\n".join([
        *(f"{name:18} {value}" for name, value in asdict(preset).items()),
        f"{parameters:,} parameters; {flops / 1e9:.2f} GFLOP for a call of one slice of {size}x{size}",
        f"{images:,} images, {steps:,} optimizer steps, {calls * flops / 1e15:.4g} PFLOP",
        f"about {held / 2**30:.2f} GiB for one process, besides slices and projector tables",
        f"about {hours:.2f} h for the network, by one call on this device"])


def seconds_a_call(preset: Preset, size: int, device: str) -> float:
    """Seconds of one forward and backward call of one slice, measured; the first of two warms up."""
    network = UNet(preset.network()).to(device, preset.dtype)
    x, t = torch.zeros(1, 1, size, size, device=device, dtype=preset.dtype), torch.zeros(1, device=device)
    bf16 = preset.precision == "bf16" and bf16_pays(device)
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            x0_hat = network(x, t)
        x0_hat.sum().backward()
        network.conv_in.weight.grad.sum().item()  # waits for the device
    return time.perf_counter() - start
