"""Counts of a detector to line integrals, -ln((I - dark) / (flat - dark)), flat measured without the object; and how
many photons there were.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from datasets.arrays import Stack
from datasets.series import Refused

QUARTILES = (0.10153, 1.32330)  # of the chi-squared distribution with one degree of freedom
AGREE = 1.5          # times as many photons may follow from the lower one as from the upper one
MOST_PHOTONS = 1e7   # noise of more is taken for none
ENOUGH = 2**20       # values that an estimate looks at


@dataclass(frozen=True, eq=False)
class Counts:
    """A stack of counts (N, views, bins) that is read as line integrals, NaN where a value tells nothing."""

    counts: Stack | np.ndarray
    flat: np.ndarray            # (1 or N, 1 or bins), the mean without the object
    dark: np.ndarray            # (1 or N, 1 or bins), the mean without the beam

    @property
    def shape(self) -> tuple[int, ...]:
        return self.counts.shape

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: int) -> np.ndarray:
        flat, dark = (field[min(i, len(field) - 1)] for field in (self.flat, self.dark))
        with np.errstate(all="ignore"):
            share = (self.counts[i] - dark) / (flat - dark)
            return -np.log(np.where((share > 0) & (flat > dark), share, np.nan)).astype(np.float32)


def mend(lines: np.ndarray) -> tuple[np.ndarray, str]:
    """(line integrals (views, bins) with NaN filled from the neighbouring bins, what was filled in words or "")."""
    bad = np.isnan(lines)
    if not bad.any() or bad.all(axis=1).any():  # a view without any value is left for `to_pixels` to refuse
        return lines, ""
    lines, bins = lines.copy(), np.arange(lines.shape[1])
    for row, gone in zip(lines, bad, strict=True):
        row[gone] = np.interp(bins[gone], bins[~gone], row[~gone])
    share = bad.mean(axis=0)
    worst = share.argmax()
    return lines, (f"has {bad.sum()} values without counts ({bad.mean():.2%}), filled in from neighbouring bins; most "
                   f"in bin {worst + 1}, {share[worst]:.0%} of its views")


def line_integrals(counts, flat, dark):
    """(`Counts`, photons of a ray without the object or None) from counts (N, views, bins) and the fields without the
    object and without the beam: each a number, or an array of one or several frames. Raises Refused.

    The photons are the square of the mean over the variance between frames, where there are enough of them to tell;
    else counts are taken for photons, unless they are so few that they must be something else, as a transmission is.
    """
    flat, dark = (_frames(field, len(counts), counts.shape[-1], name)
                  for field, name in ((flat, "flat"), (dark, "dark")))
    without = dark.mean(axis=0)
    mean = flat.mean(axis=0)
    if np.median(mean) <= np.median(without):
        raise Refused(f"has a flat field of {np.median(mean):g} and a dark field of {np.median(without):g}; expected "
                      "more without the object than without the beam")
    photons = np.median(mean - without)
    if len(flat) >= 8 and (spread := np.median(flat.var(axis=0, ddof=1))) > 0:
        photons = photons**2 / spread
    return Counts(counts, mean, without), float(photons) if photons > 100 else None


def estimate_photons(lines: np.ndarray) -> float | None:
    """Photons of a ray without the object, by the noise of line integrals p (views, bins); None where it shows none.

    Fourth differences along the detector leave the noise and little of the object. Their variance is
    sum c_j^2 exp(p_j) / photons. The lower quartile of their squares gives the photons: edges do not reach it. Where
    the upper quartile gives far fewer, the differences are structure. (Variance by differences: Hall, Kay and
    Titterington, Biometrika 77, 1990.)
    """
    if lines.shape[1] < 5:
        return None
    lines = lines[::max(1, lines.size // ENOUGH)].astype(np.float64)
    windows = sliding_window_view(lines, 5, axis=1)
    variance = np.exp(np.minimum(windows, 100)) @ np.array([1, 16, 36, 16, 1])
    squares = (np.diff(lines, 4) ** 2 / variance)[(windows != 0).all(axis=-1)]  # air that was cut off at 0 has no noise
    if len(squares) < 100:
        return None
    quartiles = np.quantile(squares, (0.25, 0.75))
    if not quartiles[0] > 0:
        return None
    low, high = QUARTILES / quartiles
    return float(f"{low:.3g}") if low < min(AGREE * high, MOST_PHOTONS) else None


def _frames(field, rows: int, bins: int, name: str) -> np.ndarray:
    """(frames, 1 or rows, 1 or bins) float32."""
    field = np.asarray(field, np.float32)
    field = field[:, None] if field.ndim == 2 and len(field) != rows else np.atleast_2d(field)
    field = field[None] if field.ndim == 2 else field
    if field.ndim != 3 or field.shape[1] not in (1, rows) or field.shape[2] not in (1, bins):
        raise Refused(f"has a {name} field of shape {field.shape}; expected a number or (bins), (rows, bins), "
                      f"(frames, bins) or (frames, rows, bins), of {rows} rows and {bins} bins")
    return field
