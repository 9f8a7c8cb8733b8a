#!/usr/bin/env python3
"""Reconstruct one's own scan.

INPUT is a series of slices (DICOM, NIfTI, HU .npy, 16-bit PNG), of which N views are simulated, or a measured sinogram:
a folder of DICOM-CT-PD projections, or .npy, HDF5, .mat or TIFF with the scanner described by --geometry
(docs/scans.md). OUT gets a DICOM series (slice_0001.dcm, ... in the study of the original), volume.nii.gz or
volume.npy, run.json, preview.png, and report.csv, which names every file that was not used; with several methods each
has a folder of its own in OUT. The same command again does only what is missing. Exit status 1 when something was
refused. Not for diagnosis.
"""

import re
import sys
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import numpy as np
from pydicom.uid import generate_uid

from datasets import write_volume
from datasets.ctpd import POSITIONS
from datasets.sinograms import is_measured
from models.baselines import BASELINES
from models.jobs import Job, fingerprint, measured, simulated
from models.methods import LABELS, METHODS
from models.weights import find_checkpoint
from utils.cli import Parser, script
from utils.errors import InputError, Stopped
from utils.files import atomic, hash16, write_table
from utils.preview import write_preview
from utils.progress import Progress
from utils.run_folder import claim, lock
from utils.units import HU_RANGE, WINDOWS

MISSING = np.int16(-32768)  # in the working file: not done yet; no HU is that low
PREVIEW = "preview.png"
VOLUMES = {"nifti": (".nii.gz", write_volume.write_nifti), "npy": (".npy", write_volume.write_npy)}
IMAGE, UNSEEN, WIDTH = "volume", "undetermined", "half_width"  # what is written, HU: the last two by --trust
WORDS = {IMAGE: "", UNSEEN: ", undetermined share", WIDTH: ", half width (90 %)"}
HINTS = {"trust": "it was begun with another --trust, or with another error network beside the checkpoint. Give --out "
                  "a new folder, or put back what was there."}
WINDOWS_OF = {UNSEEN: (800, 0), WIDTH: (200, 100)}  # in the preview; an image has the headline window


def arguments() -> Parser:
    """The flags of reconstruct.py."""
    parser = Parser("reconstruct.py", __doc__)
    parser.add_argument("input", metavar="INPUT", type=Path, help="a file or folder with one series or sinogram")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="folder for the reconstruction")
    parser.add_argument("--views", type=int, help="views to simulate, or to use of those measured (default: all)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["spdps"], help="one or several; the baselines "
                        "need no checkpoint")
    parser.add_argument("--checkpoint", default="tiny", help="as of test.py")
    parser.add_argument("--dc", type=int, help="iterations of data consistency after every network call "
                        "(default: 24, and 0 for weights that were trained without)")
    parser.add_argument("--geometry", type=Path, help="the scanner of a measured sinogram, JSON or YAML (default: "
                        "INPUT is a series of slices, or says it itself)")
    parser.add_argument("--dataset", help="which array of an HDF5 or .mat file (default: its only one, or "
                        "exchange/data)")
    parser.add_argument("--axes", help="what the axes of the array are: views and bins in their order, and slices or "
                        "rows (of a cone beam) where there are three (default: slices,views,bins; views,rows,bins of "
                        "exchange/data)")
    parser.add_argument("--angles", metavar="FILE", help="the views' angles: a file, or an array of INPUT (default: "
                        "the geometry's, or exchange/theta)")
    parser.add_argument("--flat", metavar="FILE", help="INPUT holds counts, and this those without the object: a file, "
                        "an array of INPUT or a number (default: exchange/data_white, else INPUT holds line integrals)")
    parser.add_argument("--dark", metavar="FILE", help="counts without the beam, told as --flat (default: "
                        "exchange/data_dark, else 0)")
    parser.add_argument("--position", choices=POSITIONS, help="how the patient of DICOM-CT-PD projections lay, where "
                        "they do not say (default: their PatientPosition)")
    parser.add_argument("--find-centre", action="store_true", help="look for the detector_offset_mm that fits the "
                        "measurement best (default: the geometry's)")
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
    parser.add_argument("--trust", action="store_true", help="beside each image of a network, the share of it that "
                        "the measurement does not determine, and the half width of a 90 %% interval for each pixel "
                        "(docs/scans.md)")
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
    if args.trust and args.median_z > 1:
        parser.error(f"--trust is about single slices, which --median-z {args.median_z} mixes; leave one away")
    if args.trust and set(args.method) <= set(BASELINES):
        parser.error(f"--trust is about the images of a network, and {', '.join(args.method)} needs none")
    if args.size is not None and not 8 <= args.size <= 4096:
        parser.error(f"--size {args.size}: expected 8 to 4096")
    if not args.input.exists():
        parser.error(f"{args.input} does not exist")
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file; expected a folder")
    return args


def open_work(path: Path, kinds: int, count: int, size: int) -> np.memmap:
    """The working file, (kinds, count, size, size) int16 HU or MISSING: what a stopped run has done is in it."""
    with suppress(Exception):  # there is none, or it is damaged in whatever way
        work = np.load(path, mmap_mode="r+")
        if (work.shape, work.dtype) == ((kinds, count, size, size), np.int16):
            return work
    with atomic(path) as partial, open(partial, "wb") as file:
        write_volume.write_header(file, (kinds, count, size, size))
        for _ in range(kinds * count):
            file.write(np.full((size, size), MISSING, "<i2").tobytes())
    return np.load(path, mmap_mode="r+")


def reconstruct_slices(job: Job, solve, work: np.ndarray, wanted: list[int], batch: int) -> list[tuple]:
    """Fill in the wanted slices of the working file that are missing; (name, status, reason) of those that fail or may
    be wrong.

    solve: a batch of what job.read gives -> HU (B, kinds, size, size).
    """
    todo = [i for i in wanted if (work[:, i] == MISSING).any()]  # any: a killed run may leave half a slice
    failed = []
    with Progress(total=len(todo), desc="Reconstructing", unit="slice") as bar:
        for start in range(0, len(todo), batch):
            read = {}
            for i in todo[start:start + batch]:
                try:
                    read[i], warnings = job.read(i)
                    failed += [(job.names[i], "warning", warning) for warning in warnings]
                except InputError as error:
                    failed.append((job.names[i], "refused", str(error)))
            if read:
                for i, image in zip(read, solve(np.stack(list(read.values()))), strict=True):
                    work[:, i] = image
            bar.update(len(todo[start:start + batch]))
    return failed


def smoothed(work: np.ndarray, done: np.ndarray, index: int, k: int) -> np.ndarray:
    """Median of the k slices about `index` of those that are done; (size, size) int16 HU."""
    near = [j for j in around(index, k, len(work)) if done[j]]
    return np.rint(np.median(work[near], axis=0)).astype(np.int16) if len(near) > 1 else work[index]


def around(index: int, k: int, count: int) -> range:
    """The k slices about `index`, fewer at the ends."""
    return range(max(0, index - k // 2), min(count, index + k // 2 + 1))


def write_output(args, job: Job, work: np.ndarray, done: np.ndarray, targets: list[Path], header) -> list[tuple]:
    """A finished volume in the chosen format; of DICOM the files that are not there yet. header: theirs.

    A volume that lacks slices is not written: the problem is given back.
    """
    if args.format not in VOLUMES:
        for i, target in enumerate(Progress(targets, desc="Writing")):
            if done[i] and not target.is_file():
                write_volume.write_dicom(target, header, smoothed(work, done, i, args.median_z), job.places[i], i)
    elif not targets[0].is_file():  # else only the preview was missing
        if not done.all():
            return [(targets[0].name, "refused", f"is not written, as {(~done).sum()} of {len(done)} slices are "
                     "missing: put the input right and give --out a new folder, or choose --format dicom, which leaves "
                     "them out")]
        final = (smoothed(work, done, i, args.median_z) for i in Progress(range(len(work)), desc="Writing"))
        VOLUMES[args.format][1](targets[0], final, job.places, job.size)
    return []


def describe(args, method: str, job: Job, reconstructor) -> dict:
    """What run.json says: everything that the images depend on."""
    network = method not in BASELINES
    official = {"protocol": reconstructor.protocol} if network and reconstructor.protocol != "cvg" else {}
    return {"source": job.source, "original": job.original and fingerprint([(job.original, "")]),
            "method": method, "views": job.views, "size": job.size,
            "weights": hash16(reconstructor.path) if network else None, "dc": reconstructor.dc if network else 0,
            **({"mirror": True} if network and reconstructor.mirror else {}),
            "levels": list(reconstructor.chain(job.views)) if network else None, "format": args.format,
            "median_z": args.median_z, "deidentify": args.deidentify, **official,
            **trusted(args, method, reconstructor)}


def trusted(args, method: str, reconstructor) -> dict:
    """What run.json says of --trust: the error network, if there is one."""
    from models.trust import beside

    if not args.trust or method in BASELINES:
        return {}
    return {"trust": hash16(beside(reconstructor.path)) if reconstructor.error_network else "undetermined"}


def about(args, job: Job, run: dict) -> str:
    """How the images were made, for their DICOM header."""
    text = f"CvG-Diff {run['method']}, {job.views} views; {'measured' if job.scanner else 'simulated from images'}"
    if run["weights"]:
        text += f"; weights {run['weights']}, data consistency {run['dc']}"
    if args.median_z > 1:
        text += f"; median of {args.median_z} slices"
    return text + "; not for diagnosis"


def make_reconstructor(args, job: Job):
    """The scan's scanner and, if a method needs one, the checkpoint's network. Raises InputError."""
    from models.reconstructor import Reconstructor
    from models.scanner import PublishedScanner
    from utils.device import chosen_device

    scanner = job.scanner or PublishedScanner()
    if set(args.method) <= set(BASELINES):
        return Reconstructor(scanner=scanner, device=chosen_device(args.device))
    reconstructor = Reconstructor.from_checkpoint(args.checkpoint, device=args.device, dc=args.dc, scanner=scanner)
    for method in args.method:
        reconstructor.check(method)
    if args.trust:
        say_of_trust(args, job, reconstructor)
    if job.size % reconstructor.multiple:
        raise InputError(f"The network takes sizes divisible by {reconstructor.multiple}, not {job.size}; choose "
                         "another --size.")
    if job.scanner and not reconstructor.header.get("training", {}).get("preset", {}).get("scanner_share"):
        print("The network was trained on the views of one simulated scanner; how well it does on this one is unknown: "
              "compare with --method fbp.")
    if job.noise and (args.trust or reconstructor.dc or reconstructor.network.config.told_photons):
        print(job.noise)
    return reconstructor


def say_of_trust(args, job: Job, reconstructor) -> None:
    """Print what the volumes of --trust will not tell. Raises InputError for a wrong error network."""
    from models.trust import uncalibrated

    if not reconstructor.error_network:
        return print(f"No error network lies beside {reconstructor.path}: no intervals are written, only the "
                     "undetermined share. python -m models.train_trust makes one.")
    for method in args.method:
        other = "" if method in BASELINES else uncalibrated(reconstructor.error_network[1], method, reconstructor.dc,
                                                            job.views, job.size, job.scanner)
        if other:
            print(f"The 90 % intervals of {method} were not calibrated for {other}: how often they hold is unknown.")


def kinds_of(run: dict) -> list[str]:
    """The volumes that a run writes, by its run.json."""
    return [IMAGE] + [UNSEEN] * ("trust" in run) + [WIDTH] * (run.get("trust", UNSEEN) != UNSEEN)


def targets_of(args, out: Path, kind: str, count: int) -> list[Path]:
    """The file of each slice of a volume: the same one, or for DICOM its own."""
    if args.format in VOLUMES:
        return [out / (kind + VOLUMES[args.format][0])] * count
    return [(out if kind == IMAGE else out / kind) / f"slice_{i + 1:04d}.dcm" for i in range(count)]


def header_of(header, kind: str):
    """The DICOM header of the volumes beside the image: a series of their own."""
    if kind == IMAGE:
        return header
    other = deepcopy(header)
    other.SeriesInstanceUID = generate_uid(entropy_srcs=[header.SeriesInstanceUID, kind])
    other.SeriesNumber += 1 + (kind == WIDTH)
    other.WindowWidth, other.WindowCenter = WINDOWS_OF[kind]
    what = {UNSEEN: "undetermined share", WIDTH: "half width of the 90% interval"}[kind]
    other.SeriesDescription = f"{what}, {header.SeriesDescription}"[:64]
    other.DerivationDescription = f"{what}, HU, of: {header.DerivationDescription}"[:1024]
    return other


def reconstruct(args, job: Job, reconstructor, run: dict, out: Path, header) -> tuple:
    """All that is missing in OUT, by the method of its run.json: (problems, the slice to show, {kind: its HU})."""
    def solve(batch: np.ndarray) -> np.ndarray:
        return to_hu(reconstructor, run["method"], job, batch, kinds)

    kinds, count, hidden = kinds_of(run), len(job.names), out / ".slices.npy"
    targets = {kind: targets_of(args, out, kind, count) for kind in kinds}
    # The working file outlives a run in which a slice failed: the next run tries that one again.
    again = args.format in VOLUMES and hidden.is_file()
    missing = [i for i in range(count) if again or not all(files[i].is_file() for files in targets.values())]
    if not missing and not (args.out / PREVIEW).is_file():
        missing = [count // 2]
    wanted = sorted({j for i in missing for j in around(i, args.median_z, count)})
    print(f"{count} slices of {job.size} x {job.size}, {len(missing)} of them to do, from {job.views} "
          f"{'measured' if job.scanner else 'simulated'} views by {run['method']}.")
    if not missing:
        return [], None, {}
    try:
        work = open_work(hidden, len(kinds), count, job.size)
        problems = reconstruct_slices(job, solve, work, wanted, args.batch)
        done = np.array([not (work[:, i] == MISSING).any() for i in range(count)])
        for volume, (kind, files) in zip(work, targets.items(), strict=True):
            files[0].parent.mkdir(exist_ok=True)
            problems += write_output(args, job, volume, done, files, header_of(header, kind))
    except KeyboardInterrupt:
        raise Stopped("Stopped by Ctrl-C. What is done is kept; the same command does the rest.") from None
    shown = min(np.flatnonzero(done).tolist(), key=lambda i: abs(i - count // 2), default=None)
    images = {} if shown is None else {kind: smoothed(volume, done, shown, args.median_z).copy()
                                       for kind, volume in zip(kinds, work, strict=True)}
    if done[wanted].all():
        hidden.unlink()
    return problems, shown, images


def to_hu(reconstructor, method: str, job: Job, batch: np.ndarray, kinds: list[str]) -> np.ndarray:
    """HU (B, kinds, size, size) int16 by a method from a batch of what job.read gives."""
    import torch

    from models.trust import undetermined
    from utils.units import MU_WATER, mu_to_hu

    x0_hat, _ = reconstructor.run(method, job.measure(reconstructor, batch), job.size, photons=job.photons)
    found = [mu_to_hu(x0_hat).round()]
    if UNSEEN in kinds:
        found.append((undetermined(reconstructor.degrade, x0_hat, job.views) * (1000 / MU_WATER)).round())
    if WIDTH in kinds:  # rounded up: less would promise too much
        found.append((reconstructor.half_width(x0_hat, job.views, job.photons) * (1000 / MU_WATER)).ceil())
    return torch.cat(found, dim=1).clamp(*HU_RANGE).short().cpu().numpy()


def report(args, job: Job, problems: list[tuple]) -> int:
    """Print what became of the slices, what was refused, and last what may be wrong; the exit status."""
    refused = dict.fromkeys((name, reason) for name, status, reason in problems if status == "refused")
    print(f"{args.out}: {len(job.names) - len({name for name, _ in refused} & set(job.names))} of {len(job.names)} "
          "slices.")
    for name, reason in refused:
        print(f"Refused: {name} {reason}.", file=sys.stderr)
    alike = {}  # warnings that differ in their numbers alone: they may be those of every slice
    for name, status, reason in problems:
        if status == "warning":
            alike.setdefault(re.sub(r"[\d.]+", "#", reason), {})[name] = reason
    for warned in alike.values():
        name, reason = next(iter(warned.items()))
        more = f" (and {len(warned) - 1} more: report.csv)" if len(warned) > 1 else ""
        print(f"Warning: {name} {reason}{more}.", file=sys.stderr)
    return int(bool(refused))


@script
def main(argv=None) -> int:
    args = parse(argv)
    if not set(args.method) <= set(BASELINES):
        args.checkpoint = find_checkpoint(args.checkpoint)
    lock(args.out)
    job = (measured if args.geometry or is_measured(args.input) else simulated)(args)
    if args.format == "nifti":
        write_volume.nifti_affine(job.places)  # refuses uneven steps, before the work
    original = write_volume.read_original(job.original) if job.original else None
    outs = {method: args.out / method if len(args.method) > 1 else args.out for method in args.method}
    reconstructor = make_reconstructor(args, job)
    runs = {method: claim(out, describe(args, method, job, reconstructor), "reconstruction", hints=HINTS,
                          once={"series_uid": generate_uid(), **job.checks}) for method, out in outs.items()}
    if job.checks:
        print(f"The best image leaves {job.checks['residual']:.1%} of the measurement unexplained; 1% is usual.")
    problems, images, position = list(job.problems), {}, getattr(job.scanner, "patient_position", "HFS")
    for method, out in outs.items():
        header, odd = write_volume.series_header(about(args, job, runs[method]), runs[method]["series_uid"], original,
                                                 job.patient, args.deidentify, position)
        name = "the original" if args.original else job.names[0]
        problems += [(name, "warning", text) for text in odd if args.format == "dicom"]
        found, shown, volumes = reconstruct(args, job, reconstructor, runs[method], out, header)
        write_table(out / "report.csv", ("file", "status", "reason"), dict.fromkeys([*problems, *found]))
        problems += found
        for kind, image in volumes.items():
            images[LABELS[method] + WORDS[kind]] = image, WINDOWS_OF.get(kind, WINDOWS[0])
    if images.keys() >= {LABELS[method] for method in outs}:
        if "fbp" not in outs:
            fbp = to_hu(reconstructor, "fbp", job, np.stack([job.read(shown)[0]]), [IMAGE])[0, 0]
            images = {LABELS["fbp"]: (fbp, WINDOWS[0])} | images
        write_preview(args.out / PREVIEW, images,
                      f"slice {shown + 1} of {len(job.names)}, {job.views} views")
    return report(args, job, problems)


if __name__ == "__main__":
    sys.exit(main())
