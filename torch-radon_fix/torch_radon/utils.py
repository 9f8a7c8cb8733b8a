"""Shapes as upstream's operators see them: one leading dimension, whatever the caller's are. And files of arrays."""

import functools
import os

import numpy as np
import torch


def _normalize_shape(x: torch.Tensor, d: int) -> tuple[torch.Tensor, torch.Size]:
    """x (..., its last d dimensions) as (B, its last d dimensions), and the leading dimensions it had."""
    return x.reshape(-1, *x.shape[x.ndim - d:]), x.shape[:x.ndim - d]


def _unnormalize_shape(y, old_shape):
    """The leading dimensions back: y is (B, ...), or a list or tuple of such."""
    if isinstance(y, torch.Tensor):
        return y.reshape(*old_shape, *y.shape[1:])
    return type(y)(_unnormalize_shape(part, old_shape) for part in y)


def normalize_shape(d: int):
    """Decorator of a method f(self, x, ...) that is written for x of one leading dimension and d others."""
    def wrap(f):
        @functools.wraps(f)
        def wrapped(self, x, *args, **kwargs):
            x, old_shape = _normalize_shape(x, d)
            return _unnormalize_shape(f(self, x, *args, **kwargs), old_shape)

        return wrapped

    return wrap


def save_arrays(path, **arrays):
    """Write an .npz file under a temporary name and rename it; like NumPy, add .npz to a path without it."""
    path = os.fspath(path)
    path = path if path.endswith(".npz") else f"{path}.npz"
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)
