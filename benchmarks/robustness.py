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

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import avg_pool1d, interpolate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from datasets.slices import find_slices, fingerprint, patients_of, read_slices, spread  # noqa: E402
from models.checkpoint import denoiser, find_checkpoint, load_checkpoint, placed  # noqa: E402
from models.consistency import ITERATIONS  # noqa: E402
from models.degradation import Degradation, equal_angles, projector  # noqa: E402
from models.samplers import SAMPLERS, chain_of  # noqa: E402
from test import measured, reconstruct, rows_of  # noqa: E402
from utils.device import check_device, default_device  # noqa: E402
from utils.files import atomic  # noqa: E402
from utils.results import append, open_results, write_csv  # noqa: E402
from utils.statistics import summarize  # noqa: E402
from utils.units import WINDOWS, hu_to_mu  # noqa: E402

try:
    from benchmarks.astra_projector import Astra
except ImportError:
    Astra = None

DC = " + dc"


def by_astra(kind: str, x0: torch.Tensor, n_views: int) -> list[torch.Tensor]:
    """Sinograms (1, n, bins) of slices (B, 1, H, W) by a projector of astra-toolbox."""
    radon = projector(x0.shape[-1], equal_angles(n_views))
    return list(Astra(radon, kind).forward(x0[:, 0].cpu().contiguous())[:, None].to(x0.device))


def by_finer_pixels(x0: torch.Tensor, n_views: int) -> list[torch.Tensor]:
    """Sinograms (1, n, bins) of slices (B, 1, H, W) projected at twice their pixels and bins, in units of H pixels."""
    fine = interpolate(x0, scale_factor=2, mode="bicubic", align_corners=False)
    return [avg_pool1d(y, 2) / 2 for y in Degradation().project(fine, [n_views] * len(x0))]


def measurements(photons: list[float], seed: int) -> dict[str, tuple[Callable, float | None]]:
    """Name -> (sinograms of slices x0 (B, 1, H, W) with these names and view count, photons a ray if noisy)."""
    def scanner(photons):
        given = argparse.Namespace(photons=photons, electronic=0.0, seed=seed)
        return lambda x0, n_views, names: measured(x0, n_views, names, Degradation(), given)

    return {"simulated": (scanner(None), None),
            **{kind: (lambda x0, n_views, names, kind=kind: by_astra(f"{kind}_fanflat", x0, n_views), None)
               for kind in ("strip", "line")},
            "fine": (lambda x0, n_views, names: by_finer_pixels(x0, n_views), None),
            **{f"photons-{count:g}": (scanner(count), count) for count in photons}}


def parse(argv=None):
    parser = argparse.ArgumentParser("python -m benchmarks.robustness", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables")
    parser.add_argument("--checkpoint", default="tiny", help="as test.py takes it")
    parser.add_argument("--views", type=int, nargs="+", default=[18, 36, 72])
    parser.add_argument("--methods", nargs="+", choices=SAMPLERS, default=["one-step", "sequential", "spdps"])
    parser.add_argument("--photons", type=float, nargs="*", default=[1e6, 1e5, 1e4],
                        help="I0 of the noisy measurements (default 1e6 1e5 1e4)")
    parser.add_argument("--dc", type=int, default=ITERATIONS, help=f"iterations at most (default {ITERATIONS})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--limit", type=int, help="this many slices, evenly spread over the folder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network alone")
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args(argv)
    for name, least in {"views": 1, "photons": 1, "dc": 1, "seed": 0, "limit": 1, "batch": 1}.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [least if values is None else values]:
            if not least <= value < float("inf"):
                parser.error(f"--{name} {value}: expected a number of at least {least}")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if Astra is None:
        parser.error("two of the measurements are astra-toolbox's; run `pip install astra-toolbox`")
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


def main(argv=None):
    args = parse(argv)
    checkpoint = find_checkpoint(args.checkpoint)
    network, header = load_checkpoint(checkpoint, args.device)
    files = find_slices(args.data, "test")
    files, hu = read_slices([files[i] for i in spread(len(files), args.limit)], network.config.multiple)
    names, patients = [f.name for f in files], patients_of(files)
    official = header.get("protocol") == "cvg-official"
    degrade = Degradation(official=official)
    denoise = denoiser(placed(network, args.device, args.precision), not official, args.precision)
    methods = ["fbp", *(m + suffix for m in args.methods for suffix in ("", DC))]
    run = {"checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16], "data": fingerprint(files, hu),
           "methods": methods, "windows": WINDOWS[:1], "slices": len(names),
           "levels": [chain_of(network.config, n, dc)["levels"] for n in args.views for dc in (0, args.dc)],
           **{k: getattr(args, k) for k in ("views", "dc", "seed", "batch", "precision", "device")}}
    scanners = measurements(args.photons, args.seed)
    done = {name: open_results(args.out / name, run) for name in scanners}
    x0 = degrade.full(hu_to_mu(torch.from_numpy(hu))[:, None].to(args.device))
    seen = degrade.full(x0) if official else x0
    bar = tqdm(total=len(scanners) * len(args.views) * len(methods) * len(names), unit="slice", disable=None)
    for name, (measure, photons) in scanners.items():
        for n in args.views:
            for first in range(0, len(names), args.batch):
                batch, y = names[first:first + args.batch], None
                for method in methods:
                    if not all((file, method, n) in done[name] for file in batch):
                        part = slice(first, first + args.batch)
                        y = measure(seen[part], n, batch) if y is None else y
                        iterations = args.dc if method.endswith(DC) else 0
                        chain = {} if method == "fbp" else chain_of(network.config, n, iterations)
                        x0_hat, nfe = reconstruct(method.removesuffix(DC), y, x0.shape[-1], denoise, degrade,
                                                  iterations, {"photons": photons}, **chain)
                        rows = rows_of(x0_hat, x0[part], WINDOWS[:1], [
                            {"file": file, "patient": patients[first + i], "method": method, "views": n, "nfe": nfe[i],
                             "seconds_per_slice": "nan", "peak_gib": "nan"} for i, file in enumerate(batch)])
                        append(args.out / name, 0, [row for slice_rows in rows for row in slice_rows])
                    bar.update(len(batch))
    bar.close()
    columns = ("views", "method", "psnr", "ssim", "rmse_hu", "vif", "nfe")
    summary = [{"measurement": name, **{k: row[k] for k in columns}} for name in scanners
               for row in summarize(open_results(args.out / name, run), patients, methods, args.views)]
    write_csv(args.out / "robustness.csv", summary)
    notes = [f"Mean PSNR in dB over {len(names)} slices of {len(set(patients))} patient(s), W{WINDOWS[0][0]}/"
             f"L{WINDOWS[0][1]}, checkpoint {checkpoint.name}, dc: {args.dc} iterations at most."]
    text = table(summary, methods, notes)
    with atomic(args.out / "table.md") as partial:
        partial.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
