"""The inner loops of datasets/rebin.py, compiled by Numba: threads call `project` and `gather`, each for some views.

m, L, lam and middle, half are those of rays and planes there, (states, columns).
"""

import math

import numpy as np
from numba import njit

LEAST = 1e-6  # weight of a ray from beside the plane


@njit(nogil=True)
def keys(f):
    """Weights of the values at -1, 0, 1, 2 for the place f in [0, 1]: cubic convolution (Keys 1981, a = -1/2)."""
    return (((2 - f) * f - 1) * f / 2, ((3 * f - 5) * f * f + 2) / 2, ((4 - 3 * f) * f + 1) * f / 2,
            (f - 1) * f * f / 2)


@njit(nogil=True)
def project(lines, slots, state, heights, ring, z_s, dz, dv, cy, m, L):
    """lines (views, columns): the rays of views in the ring that pass through the plane z_s."""
    rows = ring.shape[1]
    for v in range(len(slots)):
        s, view = state[v], ring[slots[v]]
        for j in range(lines.shape[1]):
            k = cy - (z_s - heights[v] - dz[s] * (1 - m[s, j] / L[s, j])) * L[s, j] / (m[s, j] * dv)  # from 1
            k = min(max(k, 1.0), float(rows))
            row = min(int(k) - 1, max(rows - 2, 0))
            value = view[row, j]
            if rows > 1:
                value += (k - 1 - row) * (view[row + 1, j] - value)
            slant = (cy - k) * dv - dz[s]
            lines[v, j] = value * L[s, j] / math.sqrt(L[s, j] * L[s, j] + slant * slant)


@njit(nogil=True)
def turns(angle, lines, j, phi, heights, z_s, middle, half):
    """(mean of the turns at an angle of column j, its weight): cubic between views, cos^2 in height."""
    total, norm, nearest, outer, last = 0.0, 0.0, np.inf, 0.0, len(phi) - 1
    step = (phi[last] - phi[0]) / last
    angle += 2 * math.pi * math.ceil((phi[0] - angle) / (2 * math.pi))
    while angle <= phi[last]:
        i = min(int((angle - phi[0]) / step), last - 1)
        while phi[i] > angle:
            i -= 1
        while phi[i + 1] < angle:
            i += 1
        f = (angle - phi[i]) / (phi[i + 1] - phi[i])
        q = abs(z_s - heights[i] - f * (heights[i + 1] - heights[i]) - middle) / half
        w = 1.0 if q < 0.5 else math.cos(math.pi * (q - 0.5)) ** 2 if q < 1 else 0.0
        if w > 0 or q < nearest:
            value = 0.0
            for tap, share in enumerate(keys(f)):
                value += share * lines[min(max(i + tap - 1, 0), last), j]
            total += w * value
            norm += w
            if q < nearest:
                nearest, outer = q, value
        angle += 2 * math.pi
    if norm < LEAST:  # the plane is beside the detector in every turn: the nearest one's outer row
        return outer, LEAST
    return total / norm, norm


@njit(nogil=True)
def interpolate(out, bins, x, y, cell):
    """out: a row of nodes y at x by cubics with the slopes of modified Akima interpolation, at the bins."""
    n = len(x)
    d, slope = np.zeros(n + 3), np.empty(n)  # of the gaps, two more to each side
    for i in range(n - 1):
        d[i + 2] = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
    for i in range(n):
        w1 = abs(d[i + 3] - d[i + 2]) + abs(d[i + 3] + d[i + 2]) / 2
        w2 = abs(d[i + 1] - d[i]) + abs(d[i + 1] + d[i]) / 2
        slope[i] = (w1 * d[i + 1] + w2 * d[i + 2]) / (w1 + w2) if w1 + w2 > 0 else 0.0
    for b in range(len(bins)):
        i = cell[b]
        h = x[i + 1] - x[i]
        t = min(max((bins[b] - x[i]) / h, 0.0), 1.0)
        out[b] = (1 - t) ** 2 * ((1 + 2 * t) * y[i] + t * h * slope[i]) + t * t * (
            (3 - 2 * t) * y[i + 1] - (1 - t) * h * slope[i + 1])


@njit(nogil=True)
def gather(out, lams, bins, lines, phi, heights, first, z_s, lam, middle, half, node, place, places, cell):
    """out (lams, bins): the ideal fan's views at angles lams, from lines of views ordered by state.

    phi, heights: of the views; first: where each state begins. node, place, cell: of `merged`, one set for either
    way, with so many places.
    """
    states, values, weights = len(middle), np.empty(len(bins)), np.empty(len(bins))
    for t in range(len(lams)):
        for way in range(2):  # the rays themselves, and where no turn has them well inside, those that run back
            total, norm = np.zeros(places[way]), np.zeros(places[way])
            for s in range(states):
                own = slice(first[s], first[s + 1])
                for j in range(lam.shape[1]):
                    value, weight = turns(lams[t] - lam[way * states + s, j], lines[own], j, phi[own], heights[own],
                                          z_s, middle[s, j], half[s, j])
                    total[node[way * states + s, j]] += weight * value
                    norm[node[way * states + s, j]] += weight
            at = place[way, :places[way]]
            interpolate(values, bins, at, total / norm, cell[way])
            for b in range(len(bins)):
                i = cell[way, b]
                f = min(max((bins[b] - at[i]) / (at[i + 1] - at[i]), 0.0), 1.0)
                w = (1 - f) * norm[i] + f * norm[i + 1]
                if way == 0:
                    out[t, b], weights[b] = values[b], w
                else:
                    w *= max(0.0, 1 - weights[b])
                    out[t, b] = (weights[b] * out[t, b] + w * values[b]) / (weights[b] + w)
