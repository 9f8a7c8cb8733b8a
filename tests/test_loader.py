"""Batches and augmentation: random by sample index alone, and compatible with the physics."""

import math

import torch

from datasets.loader import ahead, deform, flip_and_turn, load_batch, start_angle
from models.degradation import Degradation
from models.presets import PRESETS


def disc(x: float, y: float, size: int = 64) -> torch.Tensor:
    yy, xx = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    return 0.2 * ((xx - x) ** 2 + (yy - y) ** 2 < 0.04).float()[None, None]


def centre(image: torch.Tensor) -> tuple[float, float]:
    grid = (torch.arange(image.shape[-1]) + 0.5) / image.shape[-1] * 2 - 1
    return ((image[0, 0].sum(0) * grid).sum() / image.sum()).item(), ((image[0, 0].sum(1) * grid).sum() / image.sum()
                                                                       ).item()


def test_deformation_moves_a_disc_as_far_as_it_says():
    image, at, angles = disc(0.3, 0.0), (0.3, 0.0), []
    for index in range(6):
        x, y = centre(deform(image, [index], 7, rotate=30.0, zoom=0.0, translate=0.0))
        angles.append(math.degrees(math.atan2(y, x)))
        assert abs(math.hypot(x, y) - 0.3) < 0.01 and abs(angles[-1]) < 30.5
        x, y = centre(deform(image, [index], 7, rotate=0.0, zoom=0.0, translate=0.1))
        assert abs(x - at[0]) < 0.21 and abs(y - at[1]) < 0.21 and (abs(x - at[0]) > 0.005 or abs(y) > 0.005)
        grown = deform(image, [index], 7, rotate=0.0, zoom=0.2, translate=0.0).sum() / image.sum()
        assert 0.8**2 * 0.97 < grown < 1.2**2 * 1.03 and abs(grown - 1) > 1e-4
    assert max(angles) - min(angles) > 10
    torch.testing.assert_close(deform(image, [3], 7, 0.0, 0.0, 0.0), image, rtol=1e-4, atol=1e-5)


def test_deformation_is_a_function_of_seed_and_index():
    image = torch.rand(2, 1, 32, 32)
    both = deform(image, [4, 9], 1, 5.0, 0.05, 0.02)
    torch.testing.assert_close(deform(image[1:], [9], 1, 5.0, 0.05, 0.02), both[1:])
    assert not torch.allclose(deform(image[1:], [9], 2, 5.0, 0.05, 0.02), both[1:])


def test_symmetries_commute_with_the_full_view_scan():
    x, full = disc(0.3, -0.2) + disc(-0.4, 0.1), Degradation().full
    for g in range(8):
        error = full(flip_and_turn(x, [g])) - flip_and_turn(full(x), [g])
        assert error.norm() < 1e-3 * x.norm()


def test_start_angles_are_few_and_turn_the_streaks():
    angles = {start_angle(first, 1, 4) for first in range(100)}
    assert len(angles) == 4 and max(angles) < 2 * math.pi / 18 and start_angle(5, 1, 1) == 0
    x = disc(0.3, 0.0)
    assert (Degradation(max(angles))(x, 18) - Degradation()(x, 18)).norm() > 0.05 * x.norm()


def test_one_draw_a_batch_is_that_of_the_batch_on_every_process():
    mu = torch.rand(9, 1, 8, 8)
    load = lambda rank: load_batch(mu, (9, 18), 3, PRESETS["paper"], rank, 2)  # noqa: E731
    (_, (first,), _), (_, (second,), _) = load(0), load(1)
    assert {tuple(u) for part in (first, second) for u in part.uniform} == {tuple(first.uniform[0])}
    assert sorted(first.slices + second.slices) == list(range(9))
    assert torch.equal(first.x, mu[first.slices])


def test_loading_ahead_keeps_order_and_errors():
    assert list(ahead(lambda i: i * i, range(5))) == [0, 1, 4, 9, 16] and list(ahead(abs, [])) == []
