"""Dropout that depends on the slice alone, not on what else is in its batch or on how many processes share it."""

import numpy as np
import torch
import torch.nn as nn


class Dropout(nn.Dropout):
    """nn.Dropout; with `generators`, one a slice, each slice's mask is drawn from its own."""

    generators = None

    def forward(self, x):
        if self.generators is None or not self.training or self.p == 0:
            return super().forward(x)
        return x * self.masks(x).to(x.dtype) / (1 - self.p)

    def masks(self, x):
        mask = torch.empty_like(x, dtype=torch.float32)  # in the layout of x
        for one, generator in zip(mask, self.generators, strict=True):
            one.bernoulli_(1 - self.p, generator=generator)
        return mask


def seed_dropout(network: nn.Module, keys) -> None:
    """Before a call in training mode: the masks of slice i become a function of the integers keys[i]."""
    layers = [module for module in network.modules() if isinstance(module, Dropout) and module.p > 0]
    if layers:
        device = next(network.parameters()).device
        seeds = [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        for layer in layers:
            layer.generators = generators
