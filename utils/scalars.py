"""Training curves: metrics.jsonl always, TensorBoard where it is installed."""

import json
import time
from pathlib import Path

import torch


class Scalars:
    """Collects losses without waiting for the device; `flush` writes their means, once every hundred images or so."""

    def __init__(self, out: Path, seen: int):
        self.lines, self.pending, self.since, self.seen = out / "metrics.jsonl", [], time.perf_counter(), seen
        self.at = seen
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out), purge_step=seen)
        except ImportError:
            print("TensorBoard is not installed: its logging is off, metrics.jsonl has the same numbers.")
            self.board = None

    def train(self, seen: int, losses: list[torch.Tensor], norms: list[torch.Tensor], lr: float) -> None:
        """Remember one batch: the loss of its restore input and of each composed one, gradient norms, rate."""
        self.at = seen
        self.pending.append((losses, norms, lr))

    def flush(self) -> dict[str, str]:
        """Write the means since the last call; return what a status line shows."""
        mean = lambda values: torch.stack(values).mean().item()  # noqa: E731
        values = {"loss/restore": mean([losses[0] for losses, _, _ in self.pending]),
                  "gradient_norm": mean([norm for _, norms, _ in self.pending for norm in norms]),
                  "lr": self.pending[-1][2],
                  "images_per_second": (self.at - self.seen) / (time.perf_counter() - self.since)}
        composed = [loss for losses, _, _ in self.pending for loss in losses[1:]]
        if composed:
            values["loss/compose"] = mean(composed)
        self.pending, self.since, self.seen = [], time.perf_counter(), self.at
        self._write(values)
        return {"loss": f"{values['loss/restore']:.2e}", "lr": f"{values['lr']:.1e}"}

    def validation(self, seen: int, scores: dict[str, float], picture: torch.Tensor) -> None:
        """Write validation scores and a picture (1, H, W) in [0, 1]."""
        self.at = seen
        self._write(scores)
        if self.board:
            self.board.add_image("val/truth_fbp_reconstruction", picture.cpu(), seen)

    def _write(self, values: dict[str, float]) -> None:
        with open(self.lines, "a") as file:
            file.write(json.dumps({"images": self.at, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, self.at)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self.board:
            self.board.close()
