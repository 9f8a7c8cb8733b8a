"""Which device computes, in what precision it pays, its peak and its memory."""

import sys
from contextlib import contextmanager
from math import ceil, nan

import torch

from utils.errors import InputError, Stopped


def chosen_device(device: str | None) -> str:
    """The device, or for None a GPU if there is one. Raises InputError where it cannot be used here."""
    if device not in (None, "cpu") and not torch.cuda.is_available():
        raise InputError(f"--device {device} cannot be used: expected cpu; PyTorch finds no CUDA GPU here.")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def bf16_pays(device: str) -> bool:
    """Whether bf16 runs in hardware: on today's GPUs, and on CPUs with AVX-512 BF16 or AMX."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# Dense bf16 tensor-core FLOP/s by the vendors' data sheets; the first name that is part of the device's name counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
         "A10": 125e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device: str) -> float | None:
    """bf16 FLOP/s that model FLOPs utilisation is measured against, or None for a device not in the table."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def synchronize(device: str) -> None:
    """Wait for what a GPU is still doing, before time is measured."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def resident(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on the GPU if it takes at most a quarter of the free memory there, else as it is."""
    fits = torch.device(device).type == "cuda" and 4 * x.nbytes <= torch.cuda.mem_get_info(device)[0]
    return x.to(device) if fits else x


def memory(device: str) -> float:
    """Largest memory of this process so far, GiB: the GPU's, or where the CPU computes the main memory's, NaN on
    Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)


@contextmanager
def memory_advice(batch: int, processes: int, accumulate: int):
    """Turn "out of GPU memory" into a sentence that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        share = ceil(batch / processes)
        part = ceil(share / accumulate)
        if part == 1:
            raise Stopped("Out of GPU memory with one slice at a time: take a smaller --width, a --stem of 2 or a "
                          "larger GPU.") from None
        raise Stopped(f"Out of GPU memory with {part} slices at a time. Repeat the command with --accumulate "
                      f"{ceil(share / (part // 2))}: {part // 2} at a time, --batch {batch} as it is and so the same "
                      f"result; or, for another result, in a new folder, with --batch {max(1, batch // 2)}.") from None
