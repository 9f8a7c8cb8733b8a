"""The axis of rotation, found in the measurement itself: where the residual of least squares is smallest."""

from dataclasses import replace

import numpy as np

from models.consistency import relative_residual
from models.degradation import Degradation
from models.scanner import Scanner, merged_bins, to_pixels
from utils.errors import InputError

SIZE, VIEWS = 128, 120  # pixels and views at most, while searching


def find_centre(scanner: Scanner, lines: np.ndarray) -> tuple[Scanner, float, float]:
    """(the scanner with the detector_offset_mm that fits best, its relative residual, that of the scanner as given).

    lines: one sinogram (views, bins) as measured. Offsets are tried up to an eighth of the detector to either side of
    the given one; each round of nine looks about the best so far, four times as closely, down to a tenth of a bin. Both
    residuals are of a reduced size and number of views. A turn of the whole scan is not found: it turns the image, and
    leaves the same residual. Raises InputError where the best offset is at the end of the range.
    """
    few, chosen = scanner.thinned(min(VIEWS, len(scanner.angles)))
    size = min(SIZE, scanner.size)
    few, lines = merged_bins(replace(few, size=size), np.asarray(lines)[chosen], size)
    dropped = few.detector_offset_mm - scanner.detector_offset_mm  # of the middle, where not all bins are merged

    def residual(offset: float) -> float:
        moved = replace(few, detector_offset_mm=offset + dropped)
        y = to_pixels(moved, lines, size)[None, None]
        return relative_residual(Degradation(moved), y, size).item()

    pitch, given = scanner.detector_pitch_mm, scanner.detector_offset_mm
    found, half = {given: residual(given)}, max(scanner.detector_count / 8, 4) * pitch
    low, high = given - half, given + half
    while half > 0.1 * pitch:
        middle = min(found, key=found.get)
        for offset in np.linspace(middle - half, middle + half, 9):
            if low <= offset <= high and offset not in found:
                found[float(offset)] = residual(float(offset))
        half /= 4
    best = min(found, key=found.get)
    if best in (low, high):
        raise InputError(f"The residual is smallest at detector_offset_mm {best:.4g}, the end of what was searched "
                         f"({low:.4g} to {high:.4g}); give a detector_offset_mm nearer to the right one")
    return replace(scanner, detector_offset_mm=best), found[best], found[given]
