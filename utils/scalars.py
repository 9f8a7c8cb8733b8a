"""Training curves: metrics.jsonl always, TensorBoard where it is installed."""

import json
import math
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from utils.files import atomic, writing


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a killed run may leave half a line at the end, a disk damaged ones."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            found += [line] if math.isfinite(line["images"]) else []
    return found


class Step(NamedTuple):
    """What one optimizer step leaves behind; its tensors are on the device, and nobody waits for them."""

    hops: list[int]        # of each input: 0 for the restore input; 1, 2, ... for that hop's composed one
    slices: list[int]      # which slices these are
    levels: list[int]      # the published view count nearest to that of each
    losses: torch.Tensor   # of each, (inputs,)
    norm: torch.Tensor     # of the gradient before it was clipped
    skipped: torch.Tensor  # 1.0 where loss or gradient were not finite, else 0.0


class Scalars:
    """Collects steps without waiting for the device; `flush` writes their means, once every hundred images or so."""

    def __init__(self, out: Path, seen: int, writes: bool = True):
        """A run that resumes after `seen` images drops what it had written beyond them. writes: one process does."""
        self.lines, self.pending, self.seen, self.writes, self.board = out / "metrics.jsonl", [], seen, writes, None
        self.since = time.perf_counter()
        if not writes:
            return
        kept = [line for line in read_lines(self.lines) if line["images"] <= seen]
        with atomic(self.lines) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
            with writing(out):
                self.board = SummaryWriter(str(out), purge_step=seen + 1)
        except ImportError:
            print("TensorBoard is not installed: its logging is off, metrics.jsonl has the same numbers.")

    def record(self, step: Step) -> None:
        self.pending.append(step)

    def flush(self, seen: int, lr: float, skipped: int) -> dict[str, float]:
        """Write the means over the steps since the last call, of finite values of this process, and return them."""
        groups = {"gradient_norm": [step.norm.item() for step in self.pending]}
        for step in self.pending:
            for hop, n, loss in zip(step.hops, step.levels, step.losses.tolist(), strict=True):
                for name in ("loss/compose" if hop else "loss/restore", f"loss/{n}_views"):
                    groups.setdefault(name, []).append(loss)
        finite = {name: list(filter(math.isfinite, values)) for name, values in groups.items()}
        values = {name: sum(v) / len(v) for name, v in finite.items() if v}
        values |= {"lr": lr, "skipped": skipped,
                   "images_per_second": (seen - self.seen) / (time.perf_counter() - self.since)}
        self.pending, self.since, self.seen = [], time.perf_counter(), seen
        self.write(seen, values)
        return values

    @contextmanager
    def paused(self):
        """Leave what happens inside, a validation or a checkpoint, out of the throughput."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def write(self, seen: int, values: dict[str, float], picture: torch.Tensor | None = None) -> None:
        """Write values, and a picture (1, H, W) in [0, 1], at `seen` images."""
        if not self.writes:
            return
        with writing(self.lines.parent):
            with open(self.lines, "a", encoding="utf-8") as file:
                file.write(json.dumps({"images": seen, **values}) + "\n")
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(name, value, seen)
            if self.board and picture is not None:
                self.board.add_image("val/truth_fbp_reconstruction", picture.cpu(), seen)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self.board:
            with writing(self.lines.parent):
                self.board.close()
