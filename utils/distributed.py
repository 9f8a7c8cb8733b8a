"""One process or many (torchrun): who am I, and what did the others find."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def start(device: str) -> tuple[int, int, str]:
    """(rank, processes, device) of this process; joins the others where torchrun started it.

    Each process of a CUDA run takes the GPU of its local rank. Only rank 0 prints to standard output.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    cuda = device.split(":")[0] == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # A rank may wait for the others' slices for longer than the default half an hour.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value) -> list:
    """`value` of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
