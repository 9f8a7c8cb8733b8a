"""Which device computes, and in what precision it pays."""

import torch


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises ValueError with a sentence where `device` cannot be used here."""
    if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {device} cannot be used: expected cpu"
                         + (" or cuda" if torch.cuda.is_available() else "; PyTorch finds no CUDA GPU here"))


def bf16_pays(device: str) -> bool:
    """Whether bf16 runs in hardware: on today's GPUs, and on CPUs with AVX-512 BF16 or AMX."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
