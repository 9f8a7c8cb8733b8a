"""Reconstruct one's own scan: `python -m utils.reconstruct INPUT --out OUT --views N` (a script: nothing imports it).

INPUT is a series of slices (DICOM, NIfTI, HU .npy, 16-bit PNG), of which N views are simulated, or a measured sinogram:
a folder of DICOM-CT-PD projections, or .npy or .h5 with the scanner described by --geometry (datasets/scanner.py).
OUT gets a DICOM series (slice_0001.dcm, ... in the study of the original), volume.nii.gz or volume.npy, run.json and
report.csv, which names every file that was not used. The same command again does only what is missing. Exit status 1
when something was refused.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydicom.uid import generate_uid
from tqdm import tqdm

from datasets.dicom import Refused
from datasets.formats import ARRAYS, NIFTI, load, resize_hu
from datasets.prepare import write_table
from datasets.scanner import check_shape, fbp, make_scanner, read_geometry, to_pixels
from datasets.series import find_series
from datasets.sinograms import is_projections, read_sinograms
from datasets.write_volume import (
    Place,
    anonymous,
    centred,
    place_of,
    read_original,
    series_header,
    write_dicom,
    write_nifti,
    write_npy,
)
from models.checkpoint import check_methods, default_dc, denoiser, find_checkpoint, load_checkpoint
from models.consistency import ITERATIONS, data_consistency
from models.degradation import FULL_VIEWS, Degradation
from models.measured import MeasuredDegradation, measured_consistency
from models.samplers import SAMPLERS, chain_of
from utils.device import check_device, default_device
from utils.files import atomic
from utils.units import HU_RANGE, hu_to_mu, mu_to_hu

MISSING = np.int16(-32768)  # in the working file: not done yet; no HU is that low
VOLUMES = {"nifti": ("volume.nii.gz", write_nifti), "npy": ("volume.npy", write_npy)}


@dataclass(frozen=True)
class Job:
    """What to reconstruct, slice by slice."""

    names: list[str]                                 # of the slices, for messages
    places: list[Place]
    size: int                                        # pixels of a reconstructed side
    views: int
    read: Callable[[int], np.ndarray | torch.Tensor]  # slice -> its image in HU, or its sinogram
    solve: Callable[[torch.Tensor], torch.Tensor]    # a batch of those, (B, 1, ., .) -> mu (B, 1, size, size)
    original: str | None                             # DICOM file whose study the output joins
    patient: str                                     # pseudonym
    problems: list[tuple[str, str, str]]             # (file, status, reason)
    source: str                                      # hash of names and sizes of the input's files


def parse(argv=None):
    parser = argparse.ArgumentParser("python -m utils.reconstruct", description=__doc__.split("\n\n")[1],
                                     allow_abbrev=False)
    parser.add_argument("input", metavar="INPUT", type=Path, help="a file or folder with one series or sinogram")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True)
    parser.add_argument("--views", type=int, help="views to simulate, or to use of those measured (default: all)")
    parser.add_argument("--method", choices=["fbp", *SAMPLERS], default="spdps")
    parser.add_argument("--checkpoint", default="tiny", help="as of test.py (default: the shipped one)")
    parser.add_argument("--dc", type=int, help="iterations of data consistency after every network call; default: "
                        f"{ITERATIONS}, and 0 for weights that were trained without")
    parser.add_argument("--geometry", type=Path, help="the scanner of a measured sinogram, JSON or YAML")
    parser.add_argument("--dataset", help="which array of an HDF5 file")
    parser.add_argument("--series", type=int, help="which of several series, from 1")
    parser.add_argument("--size", type=int, help="side in pixels (default: the input's for fbp, else 256, as trained; "
                        "of a measurement the geometry's)")
    parser.add_argument("--format", choices=("dicom", *VOLUMES), default="dicom")
    parser.add_argument("--original", type=Path, help="the DICOM series that an INPUT of another format came from: its "
                        "patient, study and place go into the output")
    parser.add_argument("--deidentify", action="store_true", help="no patient, study or institution in the output")
    parser.add_argument("--median-z", metavar="K", type=int, default=1,
                        help="median over K neighbouring slices, odd, for consistency across them (default: off)")
    parser.add_argument("--batch", type=int, default=4, help="slices at once")
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args(argv)
    if args.median_z < 1 or args.median_z % 2 == 0:
        parser.error(f"--median-z {args.median_z}: expected an odd number, 1 for none")
    if args.batch < 1 or (args.dc is not None and args.dc < 0):
        parser.error("--batch takes a number of at least 1 and --dc of at least 0")
    if args.size is not None and not 8 <= args.size <= 4096:
        parser.error(f"--size {args.size}: expected 8 to 4096")
    if not args.input.exists():
        parser.error(f"{args.input} does not exist")
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file; expected a folder")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def originals_of(args) -> list:
    """Slices of --original, or none."""
    if args.original is None:
        return []
    slices, _, _ = find_series(args.original, args.out)
    if slices[0].path.lower().endswith(NIFTI + ARRAYS):
        sys.exit(f"--original {args.original} is no DICOM series.")
    return slices


def sample(method, network, degrade, x_T, n_views, iterations, dc) -> torch.Tensor:
    """The method's estimate from the FBP x_T (B, 1, H, W) of n_views views; dc: of so many iterations."""
    if method == "fbp":
        return x_T
    return SAMPLERS[method](denoiser(network), degrade, x_T, dc=dc, **chain_of(network.config, n_views, iterations))[0]


def simulated(args, network, iterations) -> Job:
    """Views of images: x_T = D(x, n), as if the slice itself had been measured by CvG-Diff's scanner."""
    if args.views is None or not 1 <= args.views <= FULL_VIEWS:
        sys.exit(f"{args.input} holds images: say by --views how many to simulate, 1 to {FULL_VIEWS}. (For a measured "
                 "sinogram, describe its scanner by --geometry.)")
    slices, names, problems = find_series(args.input, args.out, args.series)
    located = originals_of(args) or slices
    if len(located) != len(slices):
        sys.exit(f"--original holds {len(located)} slices, {args.input} {len(slices)}; expected as many.")
    size = args.size or (slices[0].size if args.method == "fbp" else 256)
    degrade = Degradation()

    def solve(hu):
        mu = hu_to_mu(hu.float())
        y = degrade.project(mu, [args.views] * len(mu)) if iterations else []
        return sample(args.method, network, degrade, degrade(mu, args.views), args.views, iterations,
                      data_consistency(degrade, y, iterations))

    return Job(
        names=names,
        places=[place_of(one, size, i) for i, one in enumerate(located)],
        size=size,
        views=args.views,
        read=lambda i: torch.from_numpy(resize_hu(load(slices[i].path)[slices[i].frame], size)),
        solve=solve,
        original=None if located[0].path.lower().endswith(NIFTI + ARRAYS) else located[0].path,
        patient=anonymous(located[0]),
        problems=problems,
        source=fingerprint((one.path, one.frame) for one in slices),
    )


def measured(args, network, iterations) -> Job:
    """A measured sinogram: x_T is its FBP in its own geometry, which is also that of every D and of the consistency."""
    try:
        lines, told = read_sinograms(args.input, args.dataset)
        scanner = make_scanner(told | (read_geometry(args.geometry) if args.geometry else {}))
        check_shape(scanner, lines.shape)
        scanner, chosen = scanner.thinned(len(scanner.angles) if args.views is None else args.views)
        size = args.size or scanner.size
    except Refused as error:
        sys.exit(f"{args.input} {error}.")
    except ValueError as error:
        sys.exit(f"{error}.")
    located, spacing = originals_of(args), scanner.field_of_view_mm / size
    if located and len(located) != len(lines):
        sys.exit(f"--original holds {len(located)} slices, {args.input} {len(lines)}; expected as many.")
    degrade = MeasuredDegradation(scanner)

    def solve(y):
        return sample(args.method, network, degrade, fbp(scanner, y, size), len(chosen), iterations,
                      measured_consistency(scanner, y, iterations))

    return Job(
        names=[f"slice {i + 1} of {args.input.name}" for i in range(len(lines))],
        places=[place_of(located[i], size, i, spacing) if located
                else centred(spacing, size, i * scanner.slice_spacing_mm) for i in range(len(lines))],
        size=size,
        views=len(chosen),
        read=lambda i: to_pixels(scanner, lines[i][chosen], size),
        solve=solve,
        original=located[0].path if located else None,
        patient=anonymous(located[0]) if located else "unknown",
        problems=[],
        source=fingerprint([(str(args.input), repr(scanner))]),
    )


def fingerprint(files) -> str:
    """Hash of files' names and sizes and what comes with each."""
    text = "\n".join(f"{Path(path).name} {os.path.getsize(path)} {more}" for path, more in files)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


def open_run(out: Path, settings: dict) -> dict:
    """OUT/run.json: the settings and the UID of the new series. Exits where OUT holds something else."""
    record = out / "run.json"
    if record.is_file():
        before = json.loads(record.read_text())
        if wrong := [key for key, value in settings.items() if before.get(key) != value]:
            sys.exit(f"{out} was made with another {', '.join(wrong)}; repeat those options, or choose another --out.")
        return before
    if out.is_dir() and any(out.iterdir()):
        sys.exit(f"{out} is not empty and holds no reconstruction; give --out a new or empty folder.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic(record) as partial:
        partial.write_text(json.dumps(settings | {"series_uid": generate_uid()}, indent=1))
    return json.loads(record.read_text())


def open_work(path: Path, count: int, size: int) -> np.memmap:
    """The working file, (count, size, size) int16 HU or MISSING: what a stopped run has done is in it."""
    if not path.is_file():
        with atomic(path) as partial:
            work = np.lib.format.open_memmap(partial, "w+", np.int16, (count, size, size))
            for image in work:
                image[:] = MISSING
            work.flush()
    return np.load(path, mmap_mode="r+")


def reconstruct_slices(job: Job, work: np.ndarray, wanted: list[int], batch: int, device: str) -> list[tuple]:
    """Fill in the wanted slices of the working file that are missing; (name, status, reason) of those that fail."""
    todo = {i for i in wanted if (work[i] == MISSING).any()}  # any: a killed run may leave half a slice
    failed = []
    with tqdm(total=len(todo), unit="slice", disable=None) as bar:
        for start in range(0, len(work), batch):
            members = range(start, min(start + batch, len(work)))
            if todo.isdisjoint(members):
                continue
            read = {}  # always the whole batch: rounding depends on the company a slice is in
            for i in members:
                try:
                    read[i] = job.read(i)
                except ValueError as error:
                    failed += [(job.names[i], "refused", str(error))] * (i in todo)
            if not todo.isdisjoint(read):
                with torch.no_grad():
                    mu = job.solve(torch.stack(list(read.values()))[:, None].to(device))
                hu = mu_to_hu(mu).clamp(*HU_RANGE).round().to(torch.int16).cpu().numpy()
                for i, image in zip(read, hu[:, 0], strict=True):
                    if i in todo:
                        work[i] = image
            bar.update(len(todo.intersection(members)))
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


def write_output(args, job: Job, work: np.ndarray, done: np.ndarray, targets: list[Path], about: str, uid: str) -> None:
    """The finished volume in the chosen format; of DICOM the files that are not there yet. uid: of the new series."""
    if args.format in VOLUMES:
        final = (smoothed(work, done, i, args.median_z) for i in tqdm(range(len(work)), desc="Writing", disable=None))
        return VOLUMES[args.format][1](targets[0], final, job.places, job.size)
    original = read_original(job.original) if job.original else None
    header = series_header(about, uid, original, job.patient, args.deidentify)
    for i, target in enumerate(tqdm(targets, desc="Writing", disable=None)):
        if done[i] and not target.is_file():
            write_dicom(target, header, smoothed(work, done, i, args.median_z), job.places[i], i)


def main(argv=None) -> int:
    args = parse(argv)
    network, iterations, weights, multiple = None, 0, None, 1
    if args.method != "fbp":
        checkpoint = find_checkpoint(args.checkpoint)
        network, header = load_checkpoint(checkpoint, args.device)
        check_methods([args.method], network, checkpoint)
        iterations = default_dc(header) if args.dc is None else args.dc
        weights, multiple = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16], network.config.multiple
    is_measured = args.geometry is not None or is_projections(args.input)
    job = (measured if is_measured else simulated)(args, network, iterations)
    if job.size % multiple:
        sys.exit(f"The network takes sizes divisible by {multiple}, not {job.size}; choose another --size.")
    run = open_run(args.out, {
        "source": job.source, "original": job.original and fingerprint([(job.original, "")]), "method": args.method,
        "views": job.views, "size": job.size, "weights": weights, "dc": iterations,
        "levels": list(chain_of(network.config, job.views, iterations)["levels"]) if network else None,
        "format": args.format, "median_z": args.median_z, "deidentify": args.deidentify})

    count, hidden = len(job.names), args.out / ".slices.npy"
    targets = [args.out / (VOLUMES[args.format][0] if args.format in VOLUMES else f"slice_{i + 1:04d}.dcm")
               for i in range(count)]
    # The working file outlives a run in which a slice failed: the next run tries that one again.
    again = args.format in VOLUMES and hidden.is_file()
    missing = [i for i in range(count) if again or not targets[i].is_file()]
    wanted = sorted({j for i in missing for j in around(i, args.median_z, count)})
    print(f"{count} slices of {job.size} x {job.size}, {len(missing)} of them to do, from {job.views} "
          f"{'measured' if is_measured else 'simulated'} views by {args.method} on {args.device}.")
    if is_measured and network is not None:
        print("The network was trained on the views of one simulated scanner; how well it does on this one is unknown: "
              "compare with --method fbp.")
    about = (f"CvG-Diff {args.method}, {job.views} views; " + ("measured" if is_measured else "simulated from images")
             + (f"; weights {weights}, data consistency {iterations}" if weights else "")
             + (f"; median of {args.median_z} slices" if args.median_z > 1 else "") + "; not for diagnosis")
    problems = job.problems
    if missing:
        try:
            work = open_work(hidden, count, job.size)
            problems = problems + reconstruct_slices(job, work, wanted, args.batch, args.device)
            done = np.array([not (image == MISSING).any() for image in work])
            write_output(args, job, work, done, targets, about, run["series_uid"])
        except (KeyboardInterrupt, OSError) as error:  # an OSError is a full disk: readers raise Refused
            sys.exit(f"Stopped ({error!r}). What is done is kept; the same command does the rest.")
        if done[wanted].all():
            hidden.unlink()
    write_table(args.out / "report.csv", ("file", "status", "reason"), problems)
    refused = [(name, reason) for name, status, reason in problems if status == "refused"]
    for name, reason in refused:
        print(f"Refused: {name} {reason}.", file=sys.stderr)
    print(f"{args.out}: {count - sum(name in job.names for name, _ in refused)} of {count} slices.")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
