"""What a slice is, what makes a file unusable, and the order of a series. Plain data: no file format is known here."""

import statistics
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from utils.errors import InputError

Problem = tuple[str, str, str]  # path; refused, left out or warning; reason, a sentence whose subject is the file


class Refused(InputError):
    """The file cannot become HU slices; the message is the reason of a Problem."""

    verdict = "refused"


class LeftOut(Refused):
    """The file is sound but is not an original CT slice (a localiser, a derived image)."""

    verdict = "left out"


@dataclass(frozen=True)
class Slice:
    """One slice of one file: where it is and what is known of it before its pixels are read."""

    path: str
    frame: int = 0                   # index within the file
    patient: str = ""
    series: str = ""
    position: float | None = None    # mm along the normal, growing towards the head; None where the file does not say
    number: int = 0                  # instance number: orders what position cannot
    size: int = 0                    # side in pixels
    spacing: float | None = None     # mm between pixel centres
    kernel: str = ""
    description: str = ""            # of the series; free text, never written
    names: tuple[str, ...] = ()      # words that identify the patient, of a name and IDs
    warning: str = ""
    slope: float = 1.0
    intercept: float = 0.0
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)
    corner: tuple[float, ...] | None = None  # ImagePositionPatient: mm of the first pixel's centre as stored


@contextmanager
def refuse_on_error(reason: str):
    """Turns anything that the block, or the function it decorates, raises into Refused(reason).

    Damaged bytes make decoders raise almost anything. Only its type is told: the message may quote a patient's field.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{reason} ({type(error).__name__})") from error


def order_series(slices: list[Slice]) -> tuple[list[Slice], list[Problem]]:
    """The slices of one series from feet to head, and what is wrong with it.

    A slice of another size than most is refused, one at a position that is already taken is left out (the lowest
    instance number stays), a gap is a warning. Slices without positions are ordered by number and not compared.
    """
    ordered = sorted(slices, key=lambda one: (one.position or 0.0, one.number, one.path, one.frame))
    if any(one.position is None for one in ordered):
        return ordered, []
    kept, problems = [], []
    size = Counter(one.size for one in ordered).most_common(1)[0][0]
    for one in ordered:
        if one.size != size:
            problems.append((one.path, "refused", f"has {one.size} pixels a side where most of its series has {size}"))
        elif kept and one.position - kept[-1].position < 0.01:
            problems.append((one.path, "left out", f"repeats position {one.position:g} mm of its series; the lowest "
                             "instance number is used"))
        else:
            kept.append(one)
    steps = [after.position - before.position for before, after in pairwise(kept)]
    usual = statistics.median(steps or [0])
    return kept, problems + [
        (one.path, "warning", f"is followed by a gap of {step:g} mm where {usual:g} mm is usual: slices are missing")
        for one, step in zip(kept, steps, strict=False) if step > 1.5 * usual]
