"""Optimizer steps whose loss or gradient is not finite: counted without making the device wait."""

import torch

from utils.scalars import Step


class NonFinite:
    """The optimizer skips such a step by itself (its `found_inf`); this counts them and notes which slices were in."""

    def __init__(self, patience: int, total: int = 0):
        self.patience, self.total, self.in_a_row, self.pending = patience, total, 0, []
        self.blamed, self.present = set(), set()

    def record(self, step: Step) -> None:
        self.pending.append(step)

    def check(self) -> bool:
        """Whether `patience` steps in a row were skipped. `blamed` then holds the slices of that row whose loss was not
        finite here, `present` all of them."""
        steps, self.pending = self.pending, []
        for step, bad in zip(steps, torch.stack([step.skipped for step in steps]).tolist(), strict=True):
            if not bad:
                self.in_a_row, self.blamed, self.present = 0, set(), set()
                continue
            self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
            self.present.update(step.slices)
            self.blamed.update(step.slices[i] for i in (~step.losses.isfinite()).nonzero())
            if self.in_a_row == self.patience:
                return True
        return False
