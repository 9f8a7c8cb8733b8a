"""D, the merged level shift and their options."""

import math

import numpy as np
import pytest
import torch

from models.degradation import (
    LEVELS,
    Degradation,
    _shift_views,
    chain_levels,
    equal_angles,
    level_of,
    levels_for,
    multiples,
    projector,
)


@pytest.fixture(scope="module")
def image():
    x = torch.nn.functional.interpolate(torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(1)), size=64)
    return x * 0.3


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_degrade_is_fbp_of_the_projection(image):
    radon = projector(64, tuple(2 * np.pi * np.arange(36) / 36))
    steps = radon.backprojection(radon.filter_sinogram(radon.forward(image)))
    assert relative(Degradation()(image, 36), steps) <= 2e-5


@pytest.mark.parametrize(("n_t", "n_s"), [(36, 54), (18, 36), (18, 288), (20, 72), (54, 126)])
def test_merged_shift_is_the_two_degradations(image, n_t, n_s):
    degrade, x_t = Degradation(), torch.rand_like(image)
    expected = x_t - degrade(image, n_t) + degrade(image, n_s)
    assert relative(degrade.shift(x_t, image, [n_t] * 3, [n_s] * 3), expected) <= 2e-5


def test_merged_views():
    assert len(_shift_views(36, 54, 0.0)[0]) == 72
    assert len(_shift_views(234, 288, 0.0)[0]) == 504
    assert math.isclose(sum(_shift_views(36, 54, 0.0)[1]), 0, abs_tol=1e-9)


def test_view_counts_of_their_own_for_each_slice(image):
    degrade = Degradation(start=0.3)
    mixed = degrade(image, [18, 72, 18])
    for i, n in enumerate([18, 72, 18]):
        assert relative(mixed[i:i + 1], degrade(image[i:i + 1], n)) <= 2e-6
    shifted = degrade.shift(image, image, [18, 72, 36], [36, 72, 54])
    assert torch.equal(shifted[1], image[1]), "a shift to the same level changes nothing"


def test_official_protocol_degrades_the_full_view_reconstruction(image):
    plain, official = Degradation(), Degradation(official=True)
    assert relative(official(image, 36), plain(plain.full(image), 36)) <= 1e-6


def test_quarter_turns_commute_with_d_where_the_views_allow(image):
    turned = torch.rot90(image, 1, (-2, -1))
    assert relative(Degradation()(turned, 36), torch.rot90(Degradation()(image, 36), 1, (-2, -1))) <= 2e-5
    assert relative(Degradation()(turned, 18), torch.rot90(Degradation()(image, 18), 1, (-2, -1))) > 1e-2


def test_levels():
    assert [level_of(n) for n in LEVELS] == list(range(8))
    assert levels_for(18) == LEVELS and levels_for(72) == (288, 234, 180, 126, 72) and levels_for(300) == (300,)
    assert levels_for(24)[-2:] == (36, 24) and level_of(24) == 7 and level_of(60) == 5


@pytest.mark.parametrize("n", [1, 9, 18, 20, 24, 36, 48, 72, 97, 144, 200, 287, 288, 360, 720])
def test_multiples_contain_the_measured_views(n):
    levels = multiples(n)
    assert levels[-1] == n and list(levels) == sorted(set(levels), reverse=True) and len(levels) <= 8
    assert 288 <= max(levels) <= 720 and (n > 72 or max(levels) < 288 + n)
    shared = [set(np.round(equal_angles(level, 0.3), 9)) >= set(np.round(equal_angles(n, 0.3), 9)) for level in levels]
    assert all(shared)


def test_multiples_of_18_views_are_the_published_levels():
    assert multiples(18) == LEVELS
    assert multiples(24) == (288, 240, 192, 144, 96, 72, 48, 24) and multiples(72) == (288, 216, 144, 72)
    assert multiples(200) == (600, 400, 200) and multiples(500) == (500,)
    assert chain_levels(24, "log-views", 8) == multiples(24)
    assert chain_levels(24, "log-views", 0) == chain_levels(24, "level", 8) == levels_for(24)
