"""View counts: levels, how a network is told a count, and the levels of a chain."""

import numpy as np
import pytest

from models.levels import LEVELS, chain_levels, condition, level_of, levels_for, multiples
from models.scanner import PublishedScanner

OTHERS = (360, 120, 40)  # levels of some other network


def test_levels():
    assert [level_of(n) for n in LEVELS] == list(range(8))
    assert levels_for(18) == LEVELS and levels_for(72) == (288, 234, 180, 126, 72) and levels_for(300) == (300,)
    assert levels_for(24)[-2:] == (36, 24) and level_of(24) == 7 and level_of(60) == 5


def test_a_network_with_levels_of_its_own_is_told_those():
    assert [level_of(n, OTHERS) for n in (720, 360, 120, 100, 40, 18)] == [0, 0, 1, 1, 2, 2]
    assert [condition(n, "log-views", OTHERS) for n in (720, *OTHERS, 18)] == [0, 0, 1, 2, 2]
    assert condition(100, "level", OTHERS) == 1.0
    assert condition(np.sqrt(120 * 40), "log-views", OTHERS) == pytest.approx(1.5)
    assert levels_for(60, OTHERS) == (360, 120, 60) and levels_for(40, OTHERS) == OTHERS
    assert levels_for(60, (60, 40, 120, 120)) == (120, 60), "in any order, each once"
    assert chain_levels(60, "level", 0, OTHERS) == chain_levels(60, "log-views", 0, OTHERS) == (360, 120, 60)
    assert chain_levels(60, "log-views", 8, OTHERS) == multiples(60)


def test_conditioning_on_log_views_runs_through_the_levels_and_tells_counts_apart():
    """Halfway between two levels in log views lies halfway between their t; beyond the ends it stays."""
    assert [condition(n, "log-views") for n in LEVELS] == list(range(8))
    assert condition(30, "level") == condition(36, "level") == 6.0
    assert condition(108, "log-views") == pytest.approx(3 + np.log(126 / 108) / np.log(126 / 72))
    assert condition(6, "log-views") == 7 and condition(720, "log-views") == 0


@pytest.mark.parametrize("n", [1, 9, 18, 20, 24, 36, 48, 72, 97, 144, 200, 287, 288, 360, 720])
def test_multiples_contain_the_measured_views(n):
    levels, scanner = multiples(n), PublishedScanner(0.3)
    assert levels[-1] == n and list(levels) == sorted(set(levels), reverse=True) and len(levels) <= 8
    assert 288 <= max(levels) <= 720 and (n > 72 or max(levels) < 288 + n)
    shared = [set(np.round(scanner.theta(level), 9)) >= set(np.round(scanner.theta(n), 9)) for level in levels]
    assert all(shared)


def test_multiples_of_18_views_are_the_published_levels():
    assert multiples(18) == LEVELS
    assert multiples(24) == (288, 240, 192, 144, 96, 72, 48, 24) and multiples(72) == (288, 216, 144, 72)
    assert multiples(200) == (600, 400, 200) and multiples(500) == (500,)
    assert chain_levels(24, "log-views", 8) == multiples(24)
    assert chain_levels(24, "log-views", 0) == chain_levels(24, "level", 8) == levels_for(24)
