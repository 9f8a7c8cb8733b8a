"""How much each measured ray counts in FBP where a rotation or a detector is not whole.

A line through the image is measured by the ray (theta, gamma) and by its conjugate (theta + 180 - 2 gamma, -gamma),
gamma = arctan(u / R), or 0 in a parallel beam, where the conjugate has -u. With a smooth coverage c of the rays,

    w = 2 c / (c + c_conj)

adds up to 2 over the rays of every measured line, as w = 1 does in a whole rotation. c is the product of what the views
cover, falling to 0 over TAPER degrees at the ends of an arc, and of what the detector covers, falling to 0 towards its
short side. So one formula serves short scans (Parker, Med. Phys. 9, 1982; any arc: Noo et al., Phys. Med. Biol. 47,
2002) and detectors off the axis, in a fan beam or a parallel one (Wang, Med. Phys. 29, 2002). Angles are in degrees.
"""

import numpy as np

TAPER = 15.0


def view_shares(angles: np.ndarray, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Degrees that each view stands for, (views,), and the arcs that they cover, (arcs, 2): start and length.

    Views that lie at one angle share it. A gap belongs to no view where it is over TAPER / 2 and over twice the ninth
    decile of all gaps: an arc ends half such a decile after its last view then. No arc at all: there is no such gap.
    (Random views have gaps as wide: FBP is better where their neighbours stand for these.)
    """
    places, index, count = np.unique(np.mod(angles, period).round(3) % period, return_inverse=True, return_counts=True)
    gaps = np.diff(places, append=places[0] + period)
    usual = np.sort(gaps)[9 * (len(gaps) - 1) // 10]
    is_open = gaps > max(2 * usual, TAPER / 2)
    starts, ends = places[np.roll(is_open, 1)] - usual / 2, places[is_open] + usual / 2
    if len(ends) and ends[0] < starts[0]:
        ends = np.roll(ends, -1)
    gaps = np.where(is_open, usual, gaps)
    return ((gaps + np.roll(gaps, 1)) / 2 / count)[index], np.stack([starts, np.mod(ends - starts, period)], 1)


def view_coverage(angles: np.ndarray, arcs: np.ndarray) -> np.ndarray:
    """Coverage of rays by the arcs of a rotation, 0 to 1, in the shape of their angles; 1 where there are no arcs."""
    covered = np.zeros(angles.shape)
    for start, length in arcs:
        behind = np.mod(angles - start, 360)
        covered = np.maximum(covered, _rise(np.minimum(behind, length - behind) / min(TAPER, length / 2)))
    return covered if len(arcs) else np.ones(angles.shape)


def detector_coverage(u: np.ndarray, low: float, high: float) -> np.ndarray:
    """Coverage of the bins at u by a detector from low to high, 0 to 1.

    It rises from the end of the short side over the bins that see lines twice, or over fewer where the detector is
    nearly centred: the more it is so, the nearer the weights come to 1.
    """
    short, long = sorted((-low, high))
    return _rise(((u if high > -low else -u) + short) / min(2 * short, 2 * (long - short)))


def ray_coverage(angles: np.ndarray, gamma: np.ndarray, u: np.ndarray, arcs: np.ndarray, ends) -> np.ndarray:
    """c and c_conj, (2, views, bins), of the views at `angles` and the bins at `u`, whose rays are turned by `gamma`.

    ends: low and high of a detector with a short side, or None.
    """
    angles = angles[:, None]
    c, conjugate = view_coverage(angles + 0 * gamma, arcs), view_coverage(angles + 180 - 2 * gamma, arcs)
    if ends is not None:
        c, conjugate = c * detector_coverage(u, *ends), conjugate * detector_coverage(-u, *ends)
    return np.stack([c, conjugate])


def ray_weights(coverage: np.ndarray) -> np.ndarray:
    """w = 2 c / (c + c_conj), (views, bins), 0 where no ray is."""
    c, total = coverage[0], coverage.sum(0)
    return np.divide(2 * c, total, out=np.zeros_like(c), where=total > 0)


def _rise(x: np.ndarray) -> np.ndarray:
    return np.sin(np.pi / 2 * np.clip(x, 0, 1)) ** 2
