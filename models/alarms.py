"""What tells that a measured scan or its geometry is wrong, each as sentences: InputError for what cannot be right,
lists of warnings for what may be wrong. A sentence goes on from the name of a slice."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
from scipy.ndimage import median_filter

from models.centre import find_centre
from models.consistency import relative_residual
from models.degradation import Degradation
from models.scanner import Scanner, merged_bins, to_pixels
from utils.errors import InputError
from utils.units import HU_RANGE, MU_WATER, mu_to_hu

RESIDUAL = 0.03    # good scans leave 0.002 to 0.011, a centre or direction that is wrong 0.08 to 0.1
HOPELESS = 0.5     # counts, a transposed sinogram
VIEWS = 360        # at most so many are looked at


def check_values(lines: np.ndarray, scanner: Scanner) -> list[str]:
    """Warnings about line integrals (views, bins) as measured. Raises InputError."""
    if bad := (~np.isfinite(lines)).sum():
        view, place = np.argwhere(~np.isfinite(lines))[0] + 1
        raise InputError(f"holds {bad} values that are NaN or infinite, the first in view {view}, bin {place}; "
                         "expected finite line integrals")
    low, middle, high = np.percentile(lines, (1, 50, 95))
    falls = np.median(lines[:, [0, -1]]) > 0.9 * high > np.median(lines)  # bright beside the object, dark behind it
    denser = max(1, scanner.water_per_cm / MU_WATER)
    if middle > 20 * denser or high > 60 * denser:
        what = "counts: give --flat (and --dark), a file or the number of counts without the object" if falls else \
            "scaled integers: divide them by their scale"
        raise InputError(f"holds values up to {lines.max():.4g}, half of them above {middle:.3g}; line integrals, "
                         f"-ln(I/I0), are 0 to about 12. They look like {what}")
    if falls and low >= 0 and 0.3 < high < 1.5:
        raise InputError(f"holds values from {low:.2g} to {high:.2g} that fall where the object is: a transmission "
                         "I/I0, not line integrals -ln(I/I0); give --flat 1")
    found = []
    if middle < -0.05 or low < -1:
        found.append(f"has line integrals down to {low:.2g}, half of them below {middle:.2g}, where none is expected: "
                     "do the flat and dark fields belong to this scan?")
    return found + _dead(lines) + _truncated(lines, scanner)


def _dead(lines: np.ndarray) -> list[str]:
    """Bins that do not change from view to view while their neighbours do, and views that are the same everywhere."""
    if not np.ptp(lines):
        return [f"is {lines.flat[0]:g} everywhere"]
    found, small = [], 1e-6 * np.abs(lines).max()
    still = np.ptp(lines, axis=0) <= small
    moving = np.flatnonzero(~still)
    if len(moving) and len(bins := np.flatnonzero(still[moving[0]:moving[-1]]) + moving[0] + 1):
        found.append(f"has {len(bins)} bins that are the same in every view, such as bin {bins[0]}: dead ones make "
                     "rings; replace them, or leave them out of the counts by a flat field of 0 there")
    if len(views := np.flatnonzero(np.ptp(lines, axis=1) <= small) + 1):
        found.append(f"has {len(views)} views that are the same in every bin, such as view {views[0]}")
    return found


def _truncated(lines: np.ndarray, scanner: Scanner) -> list[str]:
    ends = np.percentile([lines[:, :2].mean(axis=1), lines[:, -2:].mean(axis=1)], 90, axis=1)
    half = (scanner.detector_count - 1) / 2 * scanner.detector_pitch_mm
    place = np.array([-half, half]) + scanner.detector_offset_mm
    whole_turn = np.ptp(scanner.angles) > 300  # opposite views then see what the shorter side misses
    looked_at = np.abs(place) > (0.9 * np.abs(place).max() if whole_turn else 0)
    if (ends[looked_at] > 0.05 * np.percentile(lines, 95)).any():
        return ["is truncated: the object reaches beyond the detector, so values are too high towards the edge of the "
                "image and everywhere a little"]
    return []


def check_image(hu: np.ndarray, water_per_cm: float) -> list[str]:
    """Warnings about the FBP (H, H) of a slice, in which so much attenuation is 0 HU."""
    at = np.linspace(-1, 1, len(hu))
    values = hu[np.add.outer(at**2, at**2) < 1]
    mu = values + 1000
    body = np.median(values[mu > np.percentile(mu, 99) / 3])
    above = (values >= HU_RANGE[1]).mean()
    hint = f"with water_per_cm {water_per_cm * (body / 1000 + 1):.3g} in the geometry it would be near 0 HU"
    if above > 0.01:
        return [f"has {above:.0%} of the field at {HU_RANGE[1]} HU or more: the object is denser than water; {hint}"]
    if abs(body) > 400:
        return [f"has an object of {body:.0f} HU where a body is near 0: {hint}, or a length or the unit of the line "
                "integrals is wrong"]
    return []


def check_scan(lines: np.ndarray, scanner: Scanner, size: int, device: str) -> tuple[float, list[str]]:
    """(relative residual, warnings) of line integrals (views, bins) of one slice. Raises InputError."""
    left, found = check_geometry(lines, scanner, size, device)
    scanner, lines = merged_bins(scanner, lines, size)
    mu = Degradation(scanner).fbp(to_pixels(scanner, lines, size)[None, None].to(device), size)
    return left, found + check_image(mu_to_hu(mu)[0, 0].cpu().numpy(), scanner.water_per_cm)


def check_geometry(lines: np.ndarray, scanner: Scanner, size: int, device: str) -> tuple[float, list[str]]:
    """(relative residual of `models.consistency`, warnings) of line integrals (views, bins). Raises InputError.

    What noise leaves is not held against the geometry: it is read from the differences between neighbouring bins.
    """
    def reduced(lines):
        few, chosen = scanner.thinned(min(VIEWS, len(lines)))
        return merged_bins(few, lines[chosen], size)

    def residual(scanner, lines):
        y = to_pixels(scanner, lines, size)[None, None].to(device)
        return relative_residual(Degradation(scanner), y, size).item()

    few, part = reduced(lines)
    left = residual(few, part)
    if max(left**2 - noise(part) ** 2, 0) ** 0.5 <= RESIDUAL:
        return left, []
    turned = "cw" if scanner.direction == "ccw" else "ccw"
    others = {f'"direction": "{turned}"': residual(replace(few, direction=turned), part)}
    if lines.shape[0] == lines.shape[1]:
        others["--axes bins,views"] = residual(*reduced(lines.T))
    with suppress(InputError):
        moved, found, _ = find_centre(scanner, lines)
        others[f'"detector_offset_mm": {moved.detector_offset_mm:.4g} (--find-centre)'] = found
    better = min(others, key=others.get)
    hint = f"; with {better} it would be {others[better]:.1%}" if others[better] < left / 2 else ""
    said = (f"does not fit its geometry: the best image leaves {left:.1%} of the measurement unexplained, where 1% is "
            f"usual{hint}")
    if left > HOPELESS:
        raise InputError(f"{said}. The axes may be in another order (--axes), or these are no line integrals")
    return left, [f"{said}. Usual causes: the centre of rotation (detector_offset_mm, --find-centre), the direction or "
                  "flip_detector, angles, dead bins, distances"]


def noise(lines: np.ndarray) -> float:
    """The share of noise in line integrals (views, bins), |noise| / |lines|, from second differences along bins."""
    second = np.abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2)
    sigma = median_filter(np.median(second, axis=0) / 0.6745 / 1.5**0.5, 9)  # of 9, so that a dead bin is no noise
    return float(np.sqrt((sigma**2).mean() * lines.size) / max(np.linalg.norm(lines), 1e-30))
