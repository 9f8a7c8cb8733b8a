"""Batches and augmentation: random by sample index alone, and compatible with the physics."""

import pytest
import torch

from datasets.loader import flip_and_turn, load_batch, prefetch
from models.degradation import Degradation
from models.presets import PRESETS


def disc(x: float, y: float, size: int = 64) -> torch.Tensor:
    yy, xx = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    return 0.2 * ((xx - x) ** 2 + (yy - y) ** 2 < 0.04).float()[None, None]


def test_symmetries_commute_with_the_full_view_scan():
    x, full = disc(0.3, -0.2) + disc(-0.4, 0.1), Degradation().full
    for g in range(8):
        error = full(flip_and_turn(x, [g])) - flip_and_turn(full(x), [g])
        assert error.norm() < 1e-3 * x.norm()


def test_one_draw_a_batch_is_that_of_the_batch_on_every_process():
    mu = torch.rand(9, 1, 8, 8)
    load = lambda rank: load_batch(mu, (9, 18), 3, PRESETS["paper"], rank, 2)  # noqa: E731
    (_, (first,), _), (_, (second,), _) = load(0), load(1)
    assert {tuple(u) for part in (first, second) for u in part.uniform} == {tuple(first.uniform[0])}
    assert sorted(first.slices + second.slices) == list(range(9))
    assert torch.equal(first.x, mu[first.slices])


def test_prefetching_keeps_order_and_errors():
    assert list(prefetch(lambda i: i * i, range(5))) == [0, 1, 4, 9, 16] and list(prefetch(abs, [])) == []
    made = prefetch(lambda i: 1 / (2 - i), range(5))
    assert [next(made), next(made)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(made)
