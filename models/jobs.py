"""What reconstruct.py reconstructs: slices of which views are simulated, or a measured scan."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from datasets.archive import find_series
from datasets.counts import Counts, estimate_photons, mend
from datasets.formats import ARRAYS, NIFTI, read_hu
from datasets.plausible import doubt
from datasets.series import Refused
from datasets.sinograms import read_sinograms
from datasets.write_volume import Place, anonymous, centred, place_of
from models.baselines import BASELINES
from models.levels import FULL_VIEWS
from utils.errors import InputError
from utils.files import hash16

SCAN = "the scan"  # what report.csv calls a measured INPUT, whose name is often the patient's


@dataclass(frozen=True)
class Job:
    """What to reconstruct, slice by slice."""

    names: list[str]                       # of the slices, for messages
    places: list[Place]
    size: int                              # pixels of a reconstructed side
    views: int
    read: Callable                         # slice -> (its image in HU, or its sinogram in 1/cm x pixels; warnings)
    measure: Callable                      # (reconstructor, a batch of those (B, ., .)) -> sinograms (B, 1, n, bins)
    scanner: object = None                 # a Scanner; None: the published one, simulated
    photons: float | None = None           # of a ray without the object, where known or estimated
    noise: str = ""                        # what was found out about them, for the user
    original: str | None = None            # DICOM file whose study the output joins
    patient: str = "unknown"               # pseudonym
    problems: tuple[tuple[str, str, str], ...] = ()  # (file, status, reason)
    source: str = ""                       # hash of names and contents of the input's files
    checks: dict = field(default_factory=dict)       # of a measured scan, for run.json


def originals_of(args, count: int) -> list:
    """Slices of --original, as many as the input has, or none. Raises InputError."""
    if args.original is None:
        return []
    slices, _, _ = find_series(args.original, args.out, derived=args.derived)
    if slices[0].path.lower().endswith(NIFTI + ARRAYS):
        raise InputError(f"--original {args.original} is no DICOM series.")
    if len(slices) != count:
        raise InputError(f"--original holds {len(slices)} slices, {args.input} {count}; expected as many.")
    return slices


def simulated(args) -> Job:
    """Views of images, as if the slices themselves had been measured by CvG-Diff's scanner."""
    if args.views is None or not 1 <= args.views <= FULL_VIEWS:
        raise InputError(f"{args.input} holds images: say by --views how many to simulate, 1 to {FULL_VIEWS}. (For a "
                         "measured sinogram, describe its scanner by --geometry.)")
    slices, names, problems = find_series(args.input, args.out, args.series, args.derived, args.trust_hu)
    located = originals_of(args, len(slices)) or slices
    size = args.size or (slices[0].size if set(args.method) <= set(BASELINES) else 256)

    def read(i):
        hu = read_hu(slices[i], size, args.trust_hu)
        odd = None if args.trust_hu else doubt(hu)
        return hu, [odd[1]] if odd else []

    return Job(
        names=names,
        places=[place_of(one, size, i) for i, one in enumerate(located)],
        size=size,
        views=args.views,
        read=read,
        measure=lambda reconstructor, hu: reconstructor.simulate(hu, args.views),
        original=None if located[0].path.lower().endswith(NIFTI + ARRAYS) else located[0].path,
        patient=anonymous(located[0]),
        problems=tuple(problems),
        source=fingerprint((one.path, one.frame) for one in slices),
    )


def read_scan(args):
    """(sinograms (N, views, bins), their scanner, which of them are near its plane, photons or None, what is refused).

    Raises InputError.
    """
    from models.geometry import check_axes, in_degrees, near_plane, read_in_mm, take_photons
    from models.scanner import make_scanner

    geometry = read_in_mm(args.geometry) if args.geometry else {}
    try:
        lines, told = read_sinograms(args.input, args.dataset, axes=args.axes, angles=args.angles, flat=args.flat,
                                     dark=args.dark, position=args.position)
    except Refused as error:
        raise InputError(f"{args.input} {error}.") from error
    found, rows, far = near_plane(in_degrees(told | geometry), len(lines))
    photons = take_photons(found)
    scanner = make_scanner(found)
    check_axes(scanner, lines.shape)
    return lines, scanner, rows, photons, far


def measured(args) -> Job:
    """A measured scan: its own geometry is that of the FBP, of every D and of data consistency. Raises InputError."""
    import torch

    from models import alarms
    from models.scanner import merged_bins, scanner_warnings, to_pixels
    from utils.device import chosen_device

    device = chosen_device(args.device)
    lines, whole, rows, told, far = read_scan(args)
    names = [f"slice {row + 1} of {SCAN}" for row in rows]

    def values(i):
        """(line integrals (views, bins), warnings) of a slice."""
        row = np.asarray(lines[rows[i]], np.float32)
        row, filled = mend(row) if isinstance(lines, Counts) else (row, "")
        return row, [*filter(None, [filled]), *alarms.check_values(row, whole)]

    middle, (row, odd) = first_readable(values, names)
    if args.find_centre:
        whole = centred_scanner(whole, row)
    scanner, chosen = whole.thinned(len(whole.angles) if args.views is None else args.views)
    size = args.size or scanner.size
    fine, (scanner, merged) = scanner, merged_bins(scanner, row[chosen], size)
    bins = scanner.detector_pitch_mm / fine.detector_pitch_mm  # of a merged one, which counts the photons of them all
    photons, noise = (told, "") if told else estimated(row, merged, bins)
    residual, said = named(names[middle], alarms.check_scan, row, whole, size, device)
    said = odd + said
    located, spacing = originals_of(args, len(rows)), scanner.field_of_view_mm / size

    def read(i):
        row, warnings = values(i)
        return to_pixels(*merged_bins(fine, row[chosen], size), size), warnings

    return Job(
        names=names,
        places=[place_of(located[i], size, i, spacing) if located
                else centred(spacing, size, scanner.first_slice_mm + i * scanner.slice_spacing_mm)
                for i in range(len(rows))],
        size=size,
        views=len(chosen),
        read=read,
        measure=lambda reconstructor, y: torch.from_numpy(y)[:, None].to(reconstructor.device),
        scanner=scanner,
        photons=photons and bins * photons,
        noise=noise,
        original=located[0].path if located else None,
        patient=anonymous(located[0]) if located else "unknown",
        problems=(*((SCAN, "warning", one) for one in scanner_warnings(scanner)),
                  *((names[middle], "warning", one) for one in said),
                  *((SCAN, "refused", one) for one in [far] if one)),
        source=fingerprint([(str(args.input), repr((scanner, args.dataset, args.axes, args.angles, args.flat,
                                                    args.dark, told)))]),
        checks={"residual": round(residual, 4), "alarms": said, "photons": "none" if photons == np.inf else photons},
    )


def estimated(lines: np.ndarray, merged: np.ndarray, bins: float) -> tuple[float | None, str]:
    """(photons of a bin of a scan that does not tell them, what is said about it).

    By the noise of its merged lines, as they are reconstructed: that of a real detector's neighbours goes together, so
    merging takes less of it away than the photons say. Where these show none, by that of single bins.
    """
    photons = estimate_photons(merged)
    photons = float(f"{photons / bins:.3g}") if photons else estimate_photons(lines)
    found = (f"The noise of this scan is that of {photons:.2g} photons a ray" if photons
             else "This scan shows no noise, and is taken for one without")
    return photons, f"{found}; if you know better, give photons in the geometry."


def centred_scanner(scanner, lines: np.ndarray):
    """The scanner with the detector_offset_mm that fits best, which is printed."""
    from models.centre import find_centre

    found, best, before = find_centre(scanner, lines)
    print(f"The centre: detector_offset_mm {found.detector_offset_mm:.4g} leaves {best:.1%} of the measurement "
          f"unexplained, {scanner.detector_offset_mm:.4g} {before:.1%}.")
    return found if best < before else scanner


def first_readable(read, names: list[str]):
    """(index, what `read` gives) of the slice nearest the middle that can be read. Raises InputError if none."""
    for i in sorted(range(len(names)), key=lambda i: abs(i - len(names) // 2)):
        try:
            return i, named(names[i], read, i)
        except InputError as error:
            reason = error
    raise reason


def named(name: str, function, *given):
    """What a function gives; its InputError says of which slice it speaks."""
    try:
        return function(*given)
    except InputError as error:
        raise InputError(f"{name} {error}") from error


def fingerprint(files) -> str:
    """Hash of the names and contents of files, or of the files in a folder, and of what comes with each."""
    content = cache(lambda path: [(file.name, hash16(file)) for file in sorted((path, *path.glob("[!.]*")))
                                  if file.is_file()])
    text = "\n".join(f"{content(Path(path))} {more}" for path, more in files)
    return hash16(text.encode(errors="backslashreplace"))
