"""Series geometry: which slices make one volume, and what uneven ones get."""

from dataclasses import replace

import pytest

from datasets.series import Slice, order_series, split_series


def series(positions, first=1, **fields):
    """Slices at these positions, numbered from `first`."""
    known = {"patient": "P", "series": "1.2", "size": 16, "spacing": 0.8}
    return [Slice(f"{i}", position=z, number=i, uid=f"u{i}", corner=(0, 0, z), **known | fields)
            for i, z in enumerate(positions, first)]


def volumes(slices):
    """Positions of each volume, from feet to head, and all problems."""
    found = [order_series(part) for part in split_series(slices)]
    return [[one.position for one in kept] for kept, _ in found], [problem for _, more in found for problem in more]


GRID = [0, 2, 4, 6]


@pytest.mark.parametrize("other", [{"kernel": "B70f"}, {"spacing": 0.4}, {"size": 32}, {"acquisition": "2"},
                                   {"orientation": (1, 0, 0, 0, 0.996, -0.087)}])
@pytest.mark.parametrize("shift", [0, 1, 0.02])
def test_two_volumes_of_one_series_are_told_apart(other, shift):
    both = series(GRID) + [replace(one, **other) for one in series([z + shift for z in GRID], 5)]
    assert volumes(both) == ([GRID, [z + shift for z in GRID]], [])
    parts = split_series(both)
    assert [{one.series for one in part} for part in parts] == [{"1.2"}, {"1.2 part 2"}]


@pytest.mark.parametrize("shift", [0, 0.02])
@pytest.mark.parametrize("by_place", [False, True])
def test_phases_are_told_apart_by_place_and_number(shift, by_place):
    want = [[z + k * shift for z in GRID] for k in range(3)]
    order = [(i, k) for i in range(4) for k in range(3)]
    numbers = {(i, k): n for n, (i, k) in enumerate(sorted(order, key=lambda at: at if by_place else at[::-1]))}
    slices = [one for (i, k), n in numbers.items() for one in series([want[k][i]], n)]
    found, problems = volumes(slices)
    assert found == want and not problems
    assert [{one.number for one in part} for part in split_series(slices)] == [
        {numbers[i, k] for i in range(4)} for k in range(3)]


def test_a_phase_that_lacks_a_slice_does_not_take_it_from_another():
    found, problems = volumes(series(GRID) + series([0, 4, 6], 5) + series(GRID, 8))
    assert found == [GRID, [0, 4, 6], GRID] and "steps are 2 to 4 mm" in problems[0][2]


def test_copies_and_single_repeats_are_left_out():
    copies = [replace(one, path=f"copy/{one.path}") for one in series(GRID)]
    found, problems = volumes(series(GRID) + copies)
    assert found == [GRID] and [status for _, status, _ in problems] == ["left out"] * 4
    found, problems = volumes(series([*GRID, 4]))
    assert found == [GRID] and problems[0][:2] == ("5", "left out")


def test_a_single_slice_that_is_unlike_the_others_is_refused():
    found, problems = volumes(series(GRID) + series([8], 5, kernel="B70f"))
    assert found == [GRID] and problems == [
        ("5", "refused", "has another reconstruction kernel, unlike most of its series")]


def test_acquisitions_one_after_the_other_are_one_scan():
    steps = [replace(one, acquisition=str(i // 2)) for i, one in enumerate(series(range(8)))]
    assert volumes(steps) == ([list(range(8))], [])


@pytest.mark.parametrize("positions, worst", [
    ([0, 3, 6, 9, 12, 15, 22, 29, 36, 43, 50, 57], 15), ([0, 1, 2.2, 3], 2.2)])
def test_uneven_steps_are_told(positions, worst):
    (found,), ((path, status, reason),) = volumes(series(positions))
    assert found == positions and status == "warning" and "steps are" in reason
    assert path == str(positions.index(worst) + 1)


def test_sideways_steps_are_uneven_and_rounded_positions_are_not():
    sideways = [replace(one, corner=(70.0 * (i % 2), 0, one.position)) for i, one in enumerate(series(GRID))]
    assert "lies" in volumes(sideways)[1][0][2]
    tilted = [replace(one, corner=(0, 0.3 * one.position, one.position)) for one in series(GRID)]
    assert not volumes(tilted)[1]
    assert not volumes(series([round(0.625 * i, 1) for i in range(40)]))[1]
    assert not volumes(series([0.15 * i for i in range(40)]))[1]


def test_a_large_gap_does_not_merge_places():
    positions = [*range(10), *range(209, 219)]
    (found,), problems = volumes(series(positions))
    assert found == positions and len(problems) == 1 and "gap of 200 mm where 1 mm" in problems[0][2]
