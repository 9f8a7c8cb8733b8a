#!/usr/bin/env python3
"""Reconstruct one's own scan.

INPUT is a series of slices (DICOM, NIfTI, HU .npy, 16-bit PNG), of which N views are simulated, or a measured sinogram:
a folder of DICOM-CT-PD projections, or .npy or .h5 with the scanner described by --geometry (docs/scans.md).
OUT gets a DICOM series (slice_0001.dcm, ... in the study of the original), volume.nii.gz or volume.npy, run.json and
report.csv, which names every file that was not used. The same command again does only what is missing. Exit status 1
when something was refused. Not for diagnosis.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from pydicom.uid import generate_uid

from datasets import write_volume
from datasets.archive import find_series
from datasets.formats import ARRAYS, NIFTI, read_hu
from datasets.plausible import doubt
from datasets.series import Refused
from datasets.sinograms import is_projections, read_sinograms
from datasets.write_volume import Place, anonymous, centred, place_of
from models.baselines import BASELINES
from models.levels import FULL_VIEWS
from models.methods import METHODS
from models.weights import find_checkpoint
from utils.cli import Parser, script
from utils.errors import InputError, Stopped
from utils.files import atomic, hash16, write_table
from utils.progress import Progress
from utils.run_folder import claim, lock
from utils.units import HU_RANGE

MISSING = np.int16(-32768)  # in the working file: not done yet; no HU is that low
VOLUMES = {"nifti": ("volume.nii.gz", write_volume.write_nifti), "npy": ("volume.npy", write_volume.write_npy)}


@dataclass(frozen=True)
class Job:
    """What to reconstruct, slice by slice."""

    names: list[str]                       # of the slices, for messages
    places: list[Place]
    size: int                              # pixels of a reconstructed side
    views: int
    read: Callable[[int], np.ndarray]      # slice -> its image in HU, or its sinogram in 1/cm x pixels
    measure: Callable                      # (reconstructor, a batch of those (B, ., .)) -> sinograms (B, 1, n, bins)
    scanner: object = None                 # a Scanner; None: the published one, simulated
    original: str | None = None            # DICOM file whose study the output joins
    patient: str = "unknown"               # pseudonym
    problems: tuple[tuple[str, str, str], ...] = ()  # (file, status, reason)
    source: str = ""                       # hash of names and contents of the input's files


def arguments() -> Parser:
    """The flags of reconstruct.py."""
    parser = Parser("reconstruct.py", __doc__)
    parser.add_argument("input", metavar="INPUT", type=Path, help="a file or folder with one series or sinogram")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="folder for the reconstruction")
    parser.add_argument("--views", type=int, help="views to simulate, or to use of those measured (default: all)")
    parser.add_argument("--method", choices=METHODS, default="spdps", help="the baselines need no checkpoint")
    parser.add_argument("--checkpoint", default="tiny", help="as of test.py")
    parser.add_argument("--dc", type=int, help="iterations of data consistency after every network call "
                        "(default: 16, and 0 for weights that were trained without)")
    parser.add_argument("--geometry", type=Path, help="the scanner of a measured sinogram, JSON or YAML (default: "
                        "INPUT is a series of slices, or says it itself)")
    parser.add_argument("--dataset", help="which array of an HDF5 file (default: its only one)")
    parser.add_argument("--series", type=int, help="which of several series, from 1 (default: the only one)")
    parser.add_argument("--derived", action="store_true", help="DERIVED and SECONDARY images too: reformatted, or made "
                        "by a program (default: left out)")
    parser.add_argument("--trust-hu", action="store_true", help="values are HU even where they do not look so")
    parser.add_argument("--size", type=int, help="side in pixels (default: of a measurement the geometry's; else 256, "
                        "as trained, and for baselines the input's)")
    parser.add_argument("--format", choices=("dicom", *VOLUMES), default="dicom", help="of the output")
    parser.add_argument("--original", type=Path, help="the DICOM series that an INPUT of another format came from: its "
                        "patient, study and place go into the output (default: none)")
    parser.add_argument("--deidentify", action="store_true", help="no patient, study or institution in the output")
    parser.add_argument("--median-z", metavar="K", type=int, default=1,
                        help="median over K neighbouring slices, odd, for consistency across them; 1: off")
    parser.add_argument("--batch", type=int, default=4, help="slices at once")
    parser.add_device()
    return parser


def parse(argv=None):
    """The arguments of a command line, checked as far as it goes without data."""
    parser = arguments()
    args = parser.parse_args(argv)
    parser.at_least(args, {"median_z": 1, "batch": 1, "dc": 0, "series": 1, "views": 1})
    if args.median_z % 2 == 0:
        parser.error(f"--median-z {args.median_z}: expected an odd number, 1 for none")
    if args.size is not None and not 8 <= args.size <= 4096:
        parser.error(f"--size {args.size}: expected 8 to 4096")
    if not args.input.exists():
        parser.error(f"{args.input} does not exist")
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file; expected a folder")
    return args


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
    size = args.size or (slices[0].size if args.method in BASELINES else 256)
    return Job(
        names=names,
        places=[place_of(one, size, i) for i, one in enumerate(located)],
        size=size,
        views=args.views,
        read=lambda i: read_hu(slices[i], size, args.trust_hu),
        measure=lambda reconstructor, hu: reconstructor.simulate(hu, args.views),
        original=None if located[0].path.lower().endswith(NIFTI + ARRAYS) else located[0].path,
        patient=anonymous(located[0]),
        problems=tuple(problems),
        source=fingerprint((one.path, one.frame) for one in slices),
    )


def measured(args) -> Job:
    """A measured sinogram: its own geometry is that of the FBP, of every D and of data consistency."""
    import torch

    from models.scanner import check_shape, make_scanner, read_geometry, to_pixels

    try:
        lines, told = read_sinograms(args.input, args.dataset)
    except Refused as error:
        raise InputError(f"{args.input} {error}.") from error
    scanner = make_scanner(told | (read_geometry(args.geometry) if args.geometry else {}))
    check_shape(scanner, lines.shape)
    scanner, chosen = scanner.thinned(len(scanner.angles) if args.views is None else args.views)
    size = args.size or scanner.size
    located, spacing = originals_of(args, len(lines)), scanner.field_of_view_mm / size
    return Job(
        names=[f"slice {i + 1} of {args.input.name}" for i in range(len(lines))],
        places=[place_of(located[i], size, i, spacing) if located
                else centred(spacing, size, i * scanner.slice_spacing_mm) for i in range(len(lines))],
        size=size,
        views=len(chosen),
        read=lambda i: to_pixels(scanner, lines[i][chosen], size),
        measure=lambda reconstructor, y: torch.from_numpy(y)[:, None].to(reconstructor.device),
        scanner=scanner,
        original=located[0].path if located else None,
        patient=anonymous(located[0]) if located else "unknown",
        source=fingerprint([(str(args.input), repr(scanner))]),
    )


def fingerprint(files) -> str:
    """Hash of the names and contents of files, or of the files in a folder, and of what comes with each."""
    content = cache(lambda path: [(file.name, hash16(file)) for file in sorted((path, *path.glob("[!.]*")))
                                  if file.is_file()])
    text = "\n".join(f"{content(Path(path))} {more}" for path, more in files)
    return hash16(text.encode(errors="backslashreplace"))


def open_work(path: Path, count: int, size: int) -> np.memmap:
    """The working file, (count, size, size) int16 HU or MISSING: what a stopped run has done is in it."""
    with suppress(Exception):  # there is none, or it is damaged in whatever way
        work = np.load(path, mmap_mode="r+")
        if (work.shape, work.dtype) == ((count, size, size), np.int16):
            return work
    with atomic(path) as partial, open(partial, "wb") as file:
        write_volume.write_header(file, (count, size, size))
        for _ in range(count):
            file.write(np.full((size, size), MISSING, "<i2").tobytes())
    return np.load(path, mmap_mode="r+")


def reconstruct_slices(job: Job, solve, work: np.ndarray, wanted: list[int], batch: int,
                       trust: bool = False) -> list[tuple]:
    """Fill in the wanted slices of the working file that are missing; (name, status, reason) of those that fail or,
    unless `trust`, may not be HU.

    solve: a batch of what job.read gives -> HU (B, size, size).
    """
    todo = [i for i in wanted if (work[i] == MISSING).any()]  # any: a killed run may leave half a slice
    failed = []
    with Progress(total=len(todo), desc="Reconstructing", unit="slice") as bar:
        for start in range(0, len(todo), batch):
            read = {}
            for i in todo[start:start + batch]:
                try:
                    read[i] = job.read(i)
                    if job.scanner is None and not trust and (odd := doubt(read[i])):
                        failed.append((job.names[i], "warning", odd[1]))
                except InputError as error:
                    failed.append((job.names[i], "refused", str(error)))
            if read:
                for i, image in zip(read, solve(np.stack(list(read.values()))), strict=True):
                    work[i] = image
            bar.update(len(todo[start:start + batch]))
    return failed


def smoothed(work: np.ndarray, done: np.ndarray, index: int, k: int) -> np.ndarray:
    """Median of the k slices about `index` of those that are done; (size, size) int16 HU. Air where it is not."""
    if not done[index]:
        return np.full(work.shape[1:], HU_RANGE[0], np.int16)
    near = [j for j in around(index, k, len(work)) if done[j]]
    return np.rint(np.median(work[near], axis=0)).astype(np.int16) if len(near) > 1 else work[index]


def around(index: int, k: int, count: int) -> range:
    """The k slices about `index`, fewer at the ends."""
    return range(max(0, index - k // 2), min(count, index + k // 2 + 1))


def write_output(args, job: Job, work: np.ndarray, done: np.ndarray, targets: list[Path], header) -> None:
    """The finished volume in the chosen format; of DICOM the files that are not there yet. header: theirs."""
    if args.format in VOLUMES:
        final = (smoothed(work, done, i, args.median_z) for i in Progress(range(len(work)), desc="Writing"))
        return VOLUMES[args.format][1](targets[0], final, job.places, job.size)
    for i, target in enumerate(Progress(targets, desc="Writing")):
        if done[i] and not target.is_file():
            write_volume.write_dicom(target, header, smoothed(work, done, i, args.median_z), job.places[i], i)


def describe(args, job: Job, reconstructor) -> dict:
    """What run.json says: everything that the images depend on."""
    network = reconstructor.network
    official = {"protocol": reconstructor.protocol} if reconstructor.protocol != "cvg" else {}
    return {"source": job.source, "original": job.original and fingerprint([(job.original, "")]),
            "method": args.method, "views": job.views, "size": job.size,
            "weights": hash16(reconstructor.path) if network else None, "dc": reconstructor.dc,
            "levels": list(reconstructor.chain(job.views)) if network else None, "format": args.format,
            "median_z": args.median_z, "deidentify": args.deidentify, **official}


def about(args, job: Job, run: dict) -> str:
    """How the images were made, for their DICOM header."""
    text = f"CvG-Diff {args.method}, {job.views} views; {'measured' if job.scanner else 'simulated from images'}"
    if run["weights"]:
        text += f"; weights {run['weights']}, data consistency {run['dc']}"
    if args.median_z > 1:
        text += f"; median of {args.median_z} slices"
    return text + "; not for diagnosis"


def make_reconstructor(args, job: Job):
    """The checkpoint's network and the scan's scanner; no network for a baseline."""
    from models.reconstructor import Reconstructor
    from models.scanner import PublishedScanner
    from utils.device import chosen_device

    scanner = job.scanner or PublishedScanner()
    if args.method in BASELINES:
        return Reconstructor(scanner=scanner, device=chosen_device(args.device))
    reconstructor = Reconstructor.from_checkpoint(args.checkpoint, device=args.device, dc=args.dc, scanner=scanner)
    reconstructor.check(args.method)
    if job.size % reconstructor.multiple:
        raise InputError(f"The network takes sizes divisible by {reconstructor.multiple}, not {job.size}; choose "
                         "another --size.")
    if job.scanner:
        print("The network was trained on the views of one simulated scanner; how well it does on this one is unknown: "
              "compare with --method fbp.")
    return reconstructor


@script
def main(argv=None) -> int:
    args = parse(argv)
    if args.method not in BASELINES:
        args.checkpoint = find_checkpoint(args.checkpoint)
    lock(args.out)
    is_measured = args.geometry is not None or is_projections(args.input)
    job = (measured if is_measured else simulated)(args)
    if args.format == "nifti":
        write_volume.nifti_affine(job.places)  # refuses uneven steps, before the work
    original = write_volume.read_original(job.original) if job.original else None
    reconstructor = make_reconstructor(args, job)
    run = claim(args.out, describe(args, job, reconstructor), "reconstruction", once={"series_uid": generate_uid()})

    def solve(batch: np.ndarray) -> np.ndarray:
        from utils.units import mu_to_hu

        x0_hat, _ = reconstructor.run(args.method, job.measure(reconstructor, batch), job.size)
        return mu_to_hu(x0_hat).clamp(*HU_RANGE).round().short().cpu().numpy()[:, 0]

    count, hidden = len(job.names), args.out / ".slices.npy"
    targets = [args.out / (VOLUMES[args.format][0] if args.format in VOLUMES else f"slice_{i + 1:04d}.dcm")
               for i in range(count)]
    # The working file outlives a run in which a slice failed: the next run tries that one again.
    again = args.format in VOLUMES and hidden.is_file()
    missing = [i for i in range(count) if again or not targets[i].is_file()]
    wanted = sorted({j for i in missing for j in around(i, args.median_z, count)})
    print(f"{count} slices of {job.size} x {job.size}, {len(missing)} of them to do, from {job.views} "
          f"{'measured' if is_measured else 'simulated'} views by {args.method}.")
    header, odd = write_volume.series_header(about(args, job, run), run["series_uid"], original, job.patient,
                                             args.deidentify)
    name = "the original" if args.original else job.names[0]
    problems = [*job.problems, *((name, "warning", text) for text in odd if args.format == "dicom")]
    if missing:
        try:
            work = open_work(hidden, count, job.size)
            problems += reconstruct_slices(job, solve, work, wanted, args.batch, args.trust_hu)
            done = np.array([not (image == MISSING).any() for image in work])
            write_output(args, job, work, done, targets, header)
        except KeyboardInterrupt:
            raise Stopped("Stopped by Ctrl-C. What is done is kept; the same command does the rest.") from None
        if done[wanted].all():
            hidden.unlink()
    write_table(args.out / "report.csv", ("file", "status", "reason"), problems)
    warned = {reason: name for name, status, reason in reversed(problems) if status == "warning"}
    for reason, name in reversed(warned.items()):  # each reason once: it may be that of every slice
        print(f"Warning: {name} {reason}.", file=sys.stderr)
    refused = [(name, reason) for name, status, reason in problems if status == "refused"]
    for name, reason in refused:
        print(f"Refused: {name} {reason}.", file=sys.stderr)
    print(f"{args.out}: {count - sum(name in job.names for name, _ in refused)} of {count} slices.")
    if odd := [(name, reason) for name, status, reason in problems if status == "warning" and name in job.names]:
        print(f"Warning: {len(odd)} of {count} slices may not be what they should: {odd[0][0]} {odd[0][1]}.",
              file=sys.stderr)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
