"""What can be CT in HU and what cannot: values that are in other units, label maps, files that are no data at all."""

import os
import re
from contextlib import suppress

import numpy as np

from utils.units import HU_RANGE

ALL_THE_SAME = "; --trust-hu takes it all the same"


def doubt(hu: np.ndarray) -> tuple[str, str] | None:
    """Why the values of a slice or a volume are hardly HU: (left out, refused or warning; the reason), else None.

    A slice of a patient holds air near -1000 HU and fat near -100. So one without a value below 0 is in other units,
    and one without air may be. What lies below -1024 is the outside of a scan circle and says nothing.
    """
    hu = np.asarray(hu)
    above, below = (hu >= HU_RANGE[1]).mean(), (hu < HU_RANGE[0] - 200).mean()
    inside = hu[hu >= HU_RANGE[0]]
    low, high = (float(inside.min()) + 0.0, float(inside.max())) if inside.size else HU_RANGE[:1] * 2
    told = f"from {low:g} to {high:g}"
    if above > 0.25 or below > 0.6:
        share, limit = (above, f"at or above {HU_RANGE[1]}") if above > 0.25 else (below, f"below {HU_RANGE[0] - 200}")
        return "refused", f"has {share:.0%} of its values {limit}: these are no HU"
    if low == high:
        return "warning" if low < -500 else "left out", f"is {low:g} HU everywhere"
    if low >= 0 and high <= 255 and (inside == np.rint(inside)).all():
        return "left out", f"holds whole numbers {told}: a label map or an 8-bit image, not HU"
    if low > -500 and high - low < 50:
        return "refused", f"holds values {told}: attenuation or grey in [0, 1], not HU"
    if low >= 0 or low > -500 and (inside > 700).mean() > 0.15:
        return "refused", f"holds values {told}: HU + 1024 or stored values, not HU, which are near -1000 in air"
    if low > -500:
        return "warning", f"has no air, its smallest value is {low:g}: is it in HU?"
    if high < -200:
        return "warning", f"has nothing denser than {high:g} HU"
    return None


def not_data(path) -> str | None:
    """What a file is that stands where data should: a Git LFS pointer or a web page. None for anything else."""
    head = b""
    if os.path.isfile(path):  # a pipe would never end
        with suppress(OSError), open(path, "rb") as file:
            head = file.read(512).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data: fetch them by `git lfs pull`"
    if re.match(rb"(\xef\xbb\xbf)?<(!doctype|html|head|\?xml[^>]*>\s*<!doctype html)", head):
        return "is a web page (HTML), not data: the download went wrong, repeat it"
    return None
