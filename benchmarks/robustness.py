"""Reconstruction from measurements that its own projector did not make, with data consistency and without.

`python -m benchmarks.robustness --data DATA --out DIR` reconstructs the same slices, otherwise by the protocol of
test.py, from the sinograms of

    simulated     our projector: the protocol of all other tables
    strip, line   astra-toolbox's strip_fanflat and line_fanflat
    fine          our projector at twice the pixels (interpolated) and twice the bins, pairs of bins averaged
    photons-N     our projector with Poisson noise, N photons a ray

How far data consistency (`+ dc`) goes is decided by the measurement alone: --dc iterations, fewer where the number of
photons is known and what is left is noise. DIR gets a folder of rows for each measurement, table.md (mean PSNR over
slices, W3000/L500) and robustness.csv. The same command resumes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import avg_pool1d, interpolate

from datasets.slices import evenly_spaced, find_slices, fingerprint, patients_of, read_slices
from models.consistency import ITERATIONS
from models.degradation import Degradation
from models.evaluation import Noise, score_rows, simulate_measurement
from models.reconstructor import Reconstructor
from models.samplers import SAMPLERS
from utils.cli import Parser, script
from utils.device import chosen_device
from utils.files import atomic, hash16
from utils.progress import Progress
from utils.results import append, open_results, write_rows
from utils.statistics import summarize
from utils.units import WINDOWS, hu_to_mu

try:
    from benchmarks.astra_projector import Astra
except ImportError:
    Astra = None

DC = " + dc"


def by_astra(kind: str, x0: torch.Tensor, n_views: int) -> torch.Tensor:
    """Sinograms (B, 1, n, bins) of slices (B, 1, H, H) by a projector of astra-toolbox."""
    radon = Degradation().operator(x0.shape[-1], n_views)
    return Astra(radon, kind).forward(x0[:, 0].cpu().contiguous())[:, None].to(x0.device)


def by_finer_pixels(x0: torch.Tensor, n_views: int) -> torch.Tensor:
    """Sinograms (B, 1, n, bins) of slices (B, 1, H, H) projected at twice their pixels and bins, in units of H pixels.
    """
    fine = interpolate(x0, scale_factor=2, mode="bicubic", align_corners=False)
    return avg_pool1d(Degradation().project(fine, n_views).flatten(0, 2), 2).reshape(len(x0), 1, n_views, -1) / 2


def measurements(photons: list[float], seed: int) -> dict[str, tuple[Callable, float | None]]:
    """Name -> (sinograms of slices x0 (B, 1, H, H) with this view count and these names, photons a ray if noisy)."""
    def scanner(photons):
        return partial(simulate_measurement, degrade=Degradation(), noise=Noise(photons, seed=seed))

    return {"simulated": (scanner(None), None),
            **{kind: (lambda x0, n_views, names, kind=kind: by_astra(f"{kind}_fanflat", x0, n_views), None)
               for kind in ("strip", "line")},
            "fine": (lambda x0, n_views, names: by_finer_pixels(x0, n_views), None),
            **{f"photons-{count:g}": (scanner(count), count) for count in photons}}


def parse(argv=None):
    parser = Parser("python -m benchmarks.robustness", __doc__)
    parser.add_argument("--data", required=True, help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables")
    parser.add_argument("--checkpoint", default="tiny", help="as test.py takes it")
    parser.add_argument("--views", type=int, nargs="+", default=[18, 36, 72], help="sparsity levels")
    parser.add_argument("--methods", nargs="+", choices=SAMPLERS, default=["one-step", "sequential", "spdps"],
                        help="samplers, each without and with data consistency")
    parser.add_argument("--photons", type=float, nargs="*", default=[1e6, 1e5, 1e4], help="I0 of noisy measurements")
    parser.add_argument("--dc", type=int, default=ITERATIONS, help="iterations at most")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--limit", type=int, help="this many slices, evenly spread over the folder (default: all)")
    parser.add_argument("--batch", type=int, default=4, help="slices at once")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network alone")
    parser.add_device()
    args = parser.parse_args(argv)
    parser.at_least(args, {"views": 1, "photons": 1, "dc": 1, "seed": 0, "limit": 1, "batch": 1})
    if Astra is None:
        parser.error("two of the measurements are astra-toolbox's; run `pip install astra-toolbox`")
    args.device = chosen_device(args.device)
    return args


def table(summary: list[dict], methods: list[str], notes: list[str]) -> str:
    """Markdown: a row for each measurement and view count, a column for each method, and what dc gains at least."""
    lines = ["| measurement | views | " + " | ".join(methods) + " |", "|" + "---|" * (2 + len(methods))]
    cells = {}
    for row in summary:
        cells.setdefault((row["measurement"], row["views"]), {})[row["method"]] = row["psnr"]
    lines += [f"| {name} | {n} | " + " | ".join(f"{psnr[m]:.2f}" for m in methods) + " |"
              for (name, n), psnr in cells.items()]
    least, where = min((psnr[m] - psnr[m.removesuffix(DC)], f"{m.removesuffix(DC)}, {name}, {n} views")
                       for (name, n), psnr in cells.items() for m in methods if m.endswith(DC))
    return "\n".join([*lines, "", *notes, f"Data consistency changes PSNR by {least:+.2f} dB or more ({where})."])


def reconstructors(args) -> dict[str, tuple[Reconstructor, str]]:
    """Method of the table -> (what reconstructs, its sampler), FBP first, each sampler without and with consistency."""
    plain, consistent = (Reconstructor.from_checkpoint(args.checkpoint, device=args.device, precision=args.precision,
                                                       dc=dc) for dc in (0, args.dc))
    return {"fbp": (plain, "fbp"), **{m + suffix: (reconstructor, m) for m in args.methods
                                      for suffix, reconstructor in (("", plain), (DC, consistent))}}


def evaluate(args, name: str, measurement, done, x0, names, patients, methods, bar) -> None:
    """Add the rows of one measurement that are not done."""
    measure, photons = measurement
    todo = [(n, first) for n in args.views for first in range(0, len(names), args.batch)]
    for n, first in todo:
        part, y = slice(first, first + args.batch), None
        for method, (reconstructor, sampler) in methods.items():
            if not all((file, method, n) in done for file in names[part]):
                y = measure(x0[part], n, names=names[part]) if y is None else y
                x0_hat, calls = reconstructor.run(sampler, y, x0.shape[-1], photons=photons)
                append(args.out / name, 0, score_rows(x0_hat, x0[part], WINDOWS[:1], [
                    {"file": file, "patient": patients[first + i], "method": method, "views": n, "nfe": calls[i],
                     "seconds_per_slice": "nan", "peak_gib": "nan"} for i, file in enumerate(names[part])]))
            bar.update(len(names[part]))


@script
def main(argv=None):
    args = parse(argv)
    methods = reconstructors(args)
    plain = methods["fbp"][0]
    files = find_slices(args.data, "test")
    files, hu = read_slices([files[i] for i in evenly_spaced(len(files), args.limit)], plain.multiple)
    names, patients = [f.name for f in files], patients_of(files)
    run = {"checkpoint": hash16(plain.path), "data": fingerprint(files, hu), "methods": list(methods),
           "windows": WINDOWS[:1], "slices": len(names), "mirror": methods[args.methods[0] + DC][0].mirror,
           "levels": {f"{n}{suffix}": methods[args.methods[0] + suffix][0].chain(n)
                      for n in args.views for suffix in ("", DC)},
           **{k: getattr(args, k) for k in ("views", "dc", "seed", "batch", "precision", "device")}}
    scanners = measurements(args.photons, args.seed)
    done = {name: open_results(args.out / name, run)[1] for name in scanners}
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(hu))[:, None].to(args.device))
    total = len(scanners) * len(args.views) * len(methods) * len(names)
    with Progress(total=total, desc="Methods", unit="slice") as bar:
        for name, measurement in scanners.items():
            evaluate(args, name, measurement, done[name], x0, names, patients, methods, bar)
    columns = ("views", "method", "psnr", "ssim", "rmse_hu", "vif", "nfe")
    summary = [{"measurement": name, **{k: row[k] for k in columns}} for name in scanners
               for row in summarize(open_results(args.out / name, run)[1], patients, list(methods), args.views)]
    write_rows(args.out / "robustness.csv", summary)
    notes = [f"Mean PSNR in dB over {len(names)} slices of {len(set(patients))} patient(s), W{WINDOWS[0][0]}/"
             f"L{WINDOWS[0][1]}, checkpoint {plain.path.name}, dc: {args.dc} iterations at most."]
    text = table(summary, list(methods), notes)
    with atomic(args.out / "table.md") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
