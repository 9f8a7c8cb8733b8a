"""One set of weights on other scanners: what it gains over FBP there, beside the published scanner.

`python -m benchmarks.scanners --data DATA --out DIR` measures the same ground truths x0 = R(slice) by each scanner's
own projector and reconstructs them in its geometry. DIR gets a folder of rows for each scanner, table.md (mean PSNR
over slices, W3000/L500, gain over FBP, and how far that is from the published scanner's gain) and scanners.csv. The
same command resumes.
"""

from pathlib import Path

import numpy as np
import torch

from datasets.slices import evenly_spaced, find_slices, fingerprint, patients_of, read_slices
from models.consistency import ITERATIONS
from models.degradation import Degradation
from models.evaluation import Noise, score_rows, simulate_measurement
from models.reconstructor import Reconstructor
from models.samplers import SAMPLERS
from models.scanner import PublishedScanner, Scanner, make_scanner, merged_bins
from utils.cli import Parser, script
from utils.device import chosen_device
from utils.files import atomic, hash16
from utils.progress import Progress
from utils.results import append, open_results, write_rows
from utils.statistics import summarize
from utils.units import FIELD_CM, WINDOWS, hu_to_mu

AAPM = {"source_distance_mm": 595.0, "detector_distance_mm": 490.6, "detector_count": 736, "detector_pitch_mm": 1.2858,
        "detector_shape": "curved"}
OTHERS = {  # degrees that the views cover, and fields of a geometry file
    "parallel": (180, {"beam": "parallel", "detector_count": 400, "detector_pitch_mm": 1.0}),
    "aapm": (360, AAPM),
    "short scan": (222, AAPM),
    "half fan": (360, {"source_distance_mm": 1000.0, "detector_distance_mm": 500.0, "detector_count": 1024,
                       "detector_pitch_mm": 0.388, "detector_offset_mm": 148.0}),
    "micro-CT": (360, {"source_distance_mm": 410.66, "detector_distance_mm": 143.08, "detector_count": 560,
                       "detector_pitch_mm": 0.2, "field_of_view_mm": 70.0, "water_per_cm": 0.5}),
}


def scanners(size: int, n_views: int) -> dict[str, PublishedScanner | Scanner]:
    """By name, for slices of `size` pixels: the published one first, then OTHERS as reconstruct.py takes them."""
    found = {"published": PublishedScanner()}
    for name, (arc, fields) in OTHERS.items():
        scanner = make_scanner({"angles": {"start": 10.0, "step": arc / n_views, "count": n_views},
                                "field_of_view_mm": 10 * FIELD_CM, "size": size, **fields})
        found[name] = merged_bins(scanner, np.zeros((1, scanner.detector_count)), size)[0]
    return found


def parse(argv=None):
    parser = Parser("python -m benchmarks.scanners", __doc__)
    parser.add_argument("--data", required=True, help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables")
    parser.add_argument("--checkpoint", default="tiny", help="as test.py takes it")
    parser.add_argument("--views", type=int, default=36, help="of every scan")
    parser.add_argument("--methods", nargs="+", choices=SAMPLERS, default=["one-step", "sequential"], help="samplers")
    parser.add_argument("--photons", type=float, help="I0: Poisson noise of so many photons a ray (default: none)")
    parser.add_argument("--dc", type=int, default=ITERATIONS, help="iterations of data consistency at most")
    parser.add_argument("--limit", type=int, help="this many slices, evenly spread over the folder (default: all)")
    parser.add_argument("--batch", type=int, default=4, help="slices at once")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network alone")
    parser.add_device()
    args = parser.parse_args(argv)
    parser.at_least(args, {"views": 2, "photons": 1, "dc": 0, "limit": 1, "batch": 1})
    args.device = chosen_device(args.device)
    return args


def table(summary: list[dict], methods: list[str], notes: list[str]) -> str:
    """Markdown: a row for each scanner; of each method PSNR, gain over FBP, and that minus the published scanner's."""
    cells = {}
    for row in summary:
        cells.setdefault(row["scanner"], {})[row["method"]] = row["psnr"]
    gain = {name: {m: psnr[m] - psnr["fbp"] for m in methods} for name, psnr in cells.items()}
    lines = ["| scanner | fbp | " + " | ".join(f"{m} | gain | difference" for m in methods) + " |",
             "|" + "---|" * (2 + 3 * len(methods))]
    lines += [f"| {name} | {psnr['fbp']:.2f} | " + " | ".join(
        f"{psnr[m]:.2f} | {gain[name][m]:+.2f} | {gain[name][m] - gain['published'][m]:+.2f}" for m in methods) + " |"
        for name, psnr in cells.items()]
    return "\n".join([*lines, "", *notes])


def evaluate(args, name: str, reconstructor: Reconstructor, done: dict, x0, names, patients, bar) -> None:
    """Add the rows of one scanner that are not done."""
    degrade, size = reconstructor.degrade, x0.shape[-1]
    for first in range(0, len(names), args.batch):
        part = slice(first, first + args.batch)
        y = simulate_measurement(x0[part], args.views, names[part], degrade, Noise(args.photons))
        for method in ("fbp", *args.methods):
            if not all((file, method, args.views) in done for file in names[part]):
                x0_hat, calls = reconstructor.run(method, y, size, photons=args.photons if method != "fbp" else None)
                append(args.out / name, 0, score_rows(x0_hat, x0[part], WINDOWS[:1], [
                    {"file": file, "patient": patients[first + i], "method": method, "views": args.views,
                     "nfe": calls[i], "seconds_per_slice": "nan", "peak_gib": "nan"}
                    for i, file in enumerate(names[part])]))
            bar.update(len(names[part]))


@script
def main(argv=None):
    args = parse(argv)
    plain = Reconstructor.from_checkpoint(args.checkpoint, device=args.device, precision=args.precision, dc=args.dc)
    files = find_slices(args.data, "test")
    files, hu = read_slices([files[i] for i in evenly_spaced(len(files), args.limit)], plain.multiple)
    names, patients = [f.name for f in files], patients_of(files)
    methods, found = ["fbp", *args.methods], scanners(hu.shape[-1], args.views)
    run = {"checkpoint": hash16(plain.path), "data": fingerprint(files, hu), "methods": methods, "windows": WINDOWS[:1],
           "slices": len(names),
           "views": [args.views], "levels": {str(args.views): plain.chain(args.views)},
           "mirror": plain.mirror,
           **{k: getattr(args, k) for k in ("photons", "dc", "batch", "precision", "device")}}
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(hu))[:, None].to(args.device))
    summary = []
    with Progress(total=len(found) * len(methods) * len(names), desc="Scanners", unit="slice") as bar:
        for name, scanner in found.items():
            one = run | {"scanner": repr(scanner)}
            done = open_results(args.out / name, one)[1]
            reconstructor = Reconstructor(plain.network, scanner, args.device, args.precision, dc=args.dc,
                                          mirror=plain.mirror)
            evaluate(args, name, reconstructor, done, x0, names, patients, bar)
            rows = summarize(open_results(args.out / name, one)[1], patients, methods, [args.views])
            summary += [{"scanner": name, **{k: row[k] for k in ("views", "method", "psnr", "ssim", "rmse_hu", "nfe")}}
                        for row in rows]
    write_rows(args.out / "scanners.csv", summary)
    noise = f"{args.photons:g} photons a ray" if args.photons else "no noise"
    notes = [f"Mean PSNR in dB over {len(names)} slices of {len(set(patients))} patient(s), W{WINDOWS[0][0]}/"
             f"L{WINDOWS[0][1]}, {args.views} views, {noise}, checkpoint {plain.path.name}, dc: {args.dc} iterations "
             "at most. gain: over FBP; difference: from the published scanner's gain."]
    text = table(summary, args.methods, notes)
    with atomic(args.out / "table.md") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
