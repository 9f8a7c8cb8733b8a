"""Exact symmetries of a scan: views that one view and a rotated or mirrored image stand for.

g = (k, s) acts on angles as g(phi) = k * 90 deg + s * phi. View g(phi) of an image I is view phi of the image I_g with
I_g(p) = I(rho^k sigma^s p), rho(x, y) = (y, -x), sigma(x, y) = (-x, y), its bins reversed where s = -1. Rays of one
view of up to eight such copies share every coordinate and weight, so the copies lie side by side in memory.
"""

from dataclasses import dataclass

import numpy as np

from .geometry import Geometry

TOLERANCE = 1e-6  # radians; angles are float32, so equal ones differ by up to 5e-7
FASTEST = 2000  # bins a radian that a pixel may cross: 1e-5 of the result at float32's rounding of the angles

GROUPS = (
    ((0, 1), (1, 1), (2, 1), (3, 1), (0, -1), (1, -1), (2, -1), (3, -1)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((0, 1), (2, 1), (0, -1), (2, -1)),
    ((0, 1), (2, 1)),
    ((0, 1), (0, -1)),
    ((0, 1),),
)


@dataclass(frozen=True)
class Reduction:
    """`views[i, j]`: the view that angle `angles[i]` under element `group[j]` is, or -1."""

    group: tuple[tuple[int, int], ...]
    angles: np.ndarray  # (representatives,) float64
    views: np.ndarray   # (representatives, len(group)) int64


def reduce_views(angles: np.ndarray, group: tuple, merge_on_axis: bool = True) -> Reduction:
    """Assign every angle to a representative and a group element; duplicated angles get representatives of their own.

    `merge_on_axis=False` leaves views within TOLERANCE of an axis as they are.
    """
    turn = np.array([k for k, _ in group]) * (np.pi / 2)
    sign = np.array([s for _, s in group])
    orbit = (sign * (np.asarray(angles, np.float64)[:, None] - turn)) % (2 * np.pi)
    orbit[orbit > 2 * np.pi - TOLERANCE] -= 2 * np.pi
    lowest = orbit.min(axis=1)
    representatives, views = [], []

    def start(a, element):
        representatives.append(orbit[a, element])
        views.append(np.full(len(group), -1, np.int64))
        views[-1][element] = a

    order = np.argsort(lowest, kind="stable")
    alone = np.abs((np.asarray(angles) + np.pi / 4) % (np.pi / 2) - np.pi / 4) < (0 if merge_on_axis else TOLERANCE)
    for a in order[alone[order]]:
        start(a, group.index((0, 1)))
    kept = len(views)
    for a in order[~alone[order]]:
        elements = np.flatnonzero(orbit[a] - lowest[a] <= TOLERANCE)
        near = [i for i in range(max(kept, len(views) - 2), len(views)) if lowest[a] - representatives[i] <= TOLERANCE]
        free = [(i, g) for i in near for g in elements if views[i][g] < 0]
        if free:
            views[free[0][0]][free[0][1]] = a
        else:
            start(a, elements[0])
    views = np.array(views)
    # The middle of the merged angles: half of float32's rounding is the most that any of them moves.
    middle = [orbit[v[v >= 0], np.flatnonzero(v >= 0)].mean() for v in views]
    return Reduction(group, np.array(middle), views)


def bins_per_radian(geometry: Geometry) -> float:
    """How fast the shadow of a corner pixel crosses the detector where it does so fastest: next to the source."""
    r = np.hypot(geometry.height - 1, geometry.width - 1) / 2
    if not geometry.fan:
        return r / geometry.det_spacing
    if geometry.source_inside:
        return np.inf
    near, span = geometry.source_distance, geometry.source_distance + geometry.det_distance
    return r * span * near / (near - r) ** 2 / geometry.det_spacing


def choose(geometry: Geometry, lanes: int) -> Reduction:
    """The reduction that is cheapest for one image and for each of `lanes` images, both counted.

    One image costs its representatives, each of many these times the lanes that its copies take; packing a copy costs
    about as much as a representative. Whatever the batch, the choice is one: else its images would differ in their last
    bits from what they are alone, and long chains of operators magnify that a thousandfold.
    """
    square, even = geometry.height == geometry.width, geometry.det_offset == 0
    groups = GROUPS if bins_per_radian(geometry) <= FASTEST else GROUPS[-1:]  # merging moves angles by their rounding
    # A ray along an axis is a whole number of pixels long: ceil(L) jumps there with the last bit of its angle.
    merge_on_axis = geometry.fan and np.abs(geometry.bins).min() > 1e-3
    candidates = [reduce_views(geometry.angles, group, merge_on_axis) for group in groups
                  if (square or all(k % 2 == 0 for k, _ in group)) and (even or all(s > 0 for _, s in group))]
    return min(candidates, key=lambda r: len(r.angles) * (1 + len(r.group) / lanes) + 2 * len(r.group))


def pixel_map(element: tuple[int, int], height: int, width: int) -> tuple[int, int, int]:
    """(offset, row step, column step) of the flat index in I of the pixel that I_g holds at (row, column)."""
    k, s = element
    matrix = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), k) @ np.diag([s, 1])
    (xx, xy), (yx, yy) = matrix
    centre = np.array([width - 1, height - 1]) / 2
    column, row = centre - matrix @ centre  # source coordinates of pixel (0, 0)
    return int(round(row * width + column)), int(yy * width + xy), int(yx * width + xx)
