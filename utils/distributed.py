"""One process or many (torchrun): who am I, what is my share, and what did the others find."""

import contextlib
import os
import signal
import sys
from datetime import timedelta
from math import ceil

import torch
import torch.distributed as dist


def start(device: str) -> tuple[int, int, str]:
    """(rank, processes, device): joins the others where torchrun started this process. On CUDA it takes the GPU of its
    local rank. Only rank 0 prints to standard output."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # In an evaluation a rank may wait for the others' slices for longer than the default half an hour.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
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


def shares(first: int, last: int, rank: int, processes: int, parts: int) -> tuple[list[range], float]:
    """Global sample indices [first, last) of this rank, cut into at most `parts` ranges, and the weight of each slice.

    The weight makes the mean over processes of the weighted sums the mean over the batch. A rank without a slice in a
    small last batch computes the first one with weight 0, because all processes take part in every gradient exchange.
    """
    mine, weight = range(first + rank, last, processes), processes / (last - first)
    if not mine:
        mine, weight = range(first, first + 1), 0.0
    size = ceil(len(mine) / parts)
    return [mine[i:i + size] for i in range(0, len(mine), size)], weight


def sync_gradients(model, last: bool):
    """Context of a forward and backward call: the processes exchange gradients in the last one of a step only."""
    return contextlib.nullcontext() if last or not dist.is_initialized() else model.no_sync()


class Stop:
    """While open, notes SIGTERM and SIGINT, for the loop to save and end; a second one ends the process at once."""

    def __enter__(self):
        self.number = 0
        self.before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> int:
        """The largest signal that any process got, or 0: all processes then stop after the same batch."""
        if not dist.is_initialized():
            return self.number
        found = torch.tensor(self.number)  # a message on the CPU: the GPU is not waited for
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)
