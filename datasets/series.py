"""What a slice is, what makes a file unusable, and the order of a series. Plain data: no file format is known here."""

import math
import statistics
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from utils.errors import InputError

Problem = tuple[str, str, str]  # path; refused, left out or warning; reason, a sentence whose subject is the file


class Refused(InputError):
    """The file cannot become HU slices; the message is the reason of a Problem."""

    verdict = "refused"
    whose: tuple[str, tuple[str, ...]] | None = None  # patient and names, of a file that says them all the same


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
    acquisition: str = ""            # what tells apart scans of one place
    uid: str = ""                    # the same for a copy of the slice
    description: str = ""            # of the series; free text, never written
    names: tuple[str, ...] = ()      # words that identify the patient, of a name and IDs
    warning: str = ""
    slope: float = 1.0
    intercept: float = 0.0
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)
    content: str = ""                # hash of the file's bytes
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


def difference(one: Slice, usual: Slice) -> str:
    """What keeps a slice out of the volume of another one, in words; empty where nothing does."""
    turned = max(abs(a - b) for a, b in zip(one.orientation, usual.orientation, strict=True)) > 0.01
    return next((text for text, differs in (
        (f"{one.size} pixels a side", one.size != usual.size),
        (f"pixels of {one.spacing} mm", not math.isclose(one.spacing or 0, usual.spacing or 0, rel_tol=0.01)),
        ("another reconstruction kernel", one.kernel != usual.kernel),
        ("another ImageOrientationPatient", turned)) if differs), "")


def split_series(slices: list[Slice]) -> list[list[Slice]]:
    """The volumes that one series holds: reconstructions, fields of view, acquisitions or phases of one place.

    A single slice that is unlike the others stays with most of them: `order_series` refuses it. Every volume but the
    first gets a series of its own.
    """
    if any(one.position is None for one in slices):
        return [slices]
    alike: list[list[Slice]] = []
    for one in sorted(slices, key=lambda one: (one.number, one.position, one.path, one.frame)):
        part = next((part for part in alike if not difference(one, part[0])), None)
        if part is None:
            alike.append(part := [])
        part.append(one)
    most = max(alike, key=len)
    single = [part for part in alike if len(part) == 1 < len(most)]
    parts = [phase for part in alike if part not in single for scan in _acquisitions(part) for phase in _phases(scan)]
    next(part for part in parts if most[0] in part).extend(one for part in single for one in part)
    return [parts[0], *([replace(one, series=f"{one.series} part {number}") for one in part]
                        for number, part in enumerate(parts[1:], 2))]


def _acquisitions(slices):
    # A scan may take many acquisitions, one after the other. Those that alternate along the axis are several scans.
    ordered = sorted(slices, key=lambda one: (one.position, one.number))
    scans = {one.acquisition: [] for one in slices}
    if sum(after.acquisition != before.acquisition for before, after in pairwise(ordered)) < len(scans):
        return [slices]
    for one in slices:
        scans[one.acquisition].append(one)
    return list(scans.values())


def _phases(slices):
    # Where most places are taken more than once, by slices that are no copies, the series holds phases. Its numbers
    # run from place to place within each phase, or from phase to phase at each place; else it is left as it is.
    ordered = sorted(slices, key=lambda one: one.position)
    tolerance, place = same_place(ordered), {ordered[0]: 0}
    for before, after in pairwise(ordered):
        place[after] = place[before] + (after.position - before.position >= tolerance)
    unique = {one.uid or one: one for one in reversed(slices)}
    at, phases, copies = defaultdict(list), [{}], []
    for one in slices:
        if unique[one.uid or one] is not one:
            copies.append(one)
            continue
        at[place[one]].append(one)
        if place[one] in phases[-1]:
            phases.append({})
        phases[-1][place[one]] = one
    counts = [len(found) for found in at.values()]
    if len(at) == 1 or sum(count > 1 for count in counts) <= len(at) / 2:
        return [slices]
    if len(phases) == max(counts):
        found = [list(phase.values()) for phase in phases]
    elif len(set(counts)) == 1:
        found = [list(phase) for phase in zip(*at.values(), strict=True)]
    else:
        return [slices]
    return [found[0] + copies, *found[1:]]


def same_place(ordered: list[Slice]) -> float:
    """Slices of a series, sorted by position, that are nearer than this lie at one place, mm: a twentieth of a step.

    The step is the largest but for a tenth: side by side, phases make most steps small; missing slices make some large.
    """
    steps = sorted(after.position - before.position for before, after in pairwise(ordered)) or [0.0]
    return min(max(0.01, 0.05 * steps[int(0.9 * (len(steps) - 1))]), 0.25)


def uneven(points: list[tuple[float, ...]]) -> tuple[int, str] | None:
    """Which of the corners in mm, feet to head, lies furthest off an even line from first to last, and a sentence.

    None where that is a tenth of a step or 0.1 mm at most: positions are rounded numbers.
    """
    line = np.linspace(points[0], points[-1], len(points))
    step = np.linalg.norm(line[-1] - line[0]) / max(1, len(points) - 1)
    off = np.linalg.norm(line - points, axis=1)
    worst = int(off.argmax())
    if off[worst] <= 0.1 * max(1, step):
        return None
    return worst, f"lies {off[worst]:.3g} mm from where even steps of {step:.3g} mm would put it"


def order_series(slices: list[Slice]) -> tuple[list[Slice], list[Problem]]:
    """The slices of one series from feet to head, and what is wrong with it.

    A slice of another size, spacing, kernel or orientation than most is refused, one at a position that is already
    taken is left out (the lowest instance number stays), gaps and uneven steps are warnings. Slices without positions
    are ordered by number and not compared.
    """
    ordered = sorted(slices, key=lambda one: (one.position or 0.0, one.number, one.path, one.frame))
    if any(one.position is None for one in ordered):
        return ordered, []
    kept, problems, tolerance = [], [], same_place(ordered)
    kinds = [(one.size, one.spacing, one.kernel, one.orientation) for one in ordered]
    usual = ordered[kinds.index(Counter(kinds).most_common(1)[0][0])]
    for one in ordered:
        if text := difference(one, usual):
            problems.append((one.path, "refused", f"has {text}, unlike most of its series"))
        elif kept and one.position - kept[-1].position < tolerance:
            problems.append((one.path, "left out", f"repeats position {one.position:g} mm of its series; the lowest "
                             "instance number is used"))
        else:
            kept.append(one)
    steps = [after.position - before.position for before, after in pairwise(kept)]
    median = statistics.median(steps or [0])
    gaps = [(one.path, "warning", f"is followed by a gap of {step:g} mm where {median:g} mm is usual: slices are "
             "missing") for one, step in zip(kept, steps, strict=False) if step > 1.5 * median]
    if not gaps and (found := uneven([one.corner or (0, 0, one.position) for one in kept])):
        worst, text = found
        gaps = [(kept[worst].path, "warning", f"{text}; steps are {min(steps):.3g} to {max(steps):.3g} mm")]
    return kept, problems + gaps
