#!/usr/bin/env python3
"""Evaluate CvG-Diff: PSNR, SSIM and RMSE per sparsity level, for FBP, one-step and SPDPS side by side.

The same command resumes: slices already in OUT/results.csv are not done again.
"""

import argparse
import csv
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.slices import find_slices, fingerprint, read_slices
from models.checkpoint import denoiser, load_checkpoint, trained_dc
from models.consistency import data_consistency
from models.degradation import FULL_VIEWS, Degradation, levels_for
from models.samplers import SAMPLERS
from utils.device import check_device, default_device
from utils.figures import comparison
from utils.files import atomic
from utils.metrics import measure
from utils.units import WINDOWS, hu_to_mu

SHIPPED = Path(__file__).parent / "models" / "tiny.safetensors"
COLUMNS = ("file", "method", "views", "width", "centre", "psnr", "ssim", "rmse_hu", "nfe", "seconds_per_slice")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.csv, summary.json and figures")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--views", type=int, nargs="+", default=[18, 36, 72])
    parser.add_argument("--methods", nargs="+", choices=list(SAMPLERS), default=["fbp", "one-step", "spdps"])
    parser.add_argument("--dc", type=int, help="iterations of data consistency after every network call; without it, "
                        "as many as the checkpoint was trained with; 0 gives the published samplers")
    parser.add_argument("--batch", type=int, default=4, help="slices at once; results do not depend on it")
    parser.add_argument("--limit", type=int, help="evaluate this many slices, evenly spread over the folder")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--protocol", choices=("cvg", "cvg-official"), default="cvg",
                        help="cvg-official: the published code's extra full-view pass in D, estimates not clipped")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slice instead of skipping it")
    args = parser.parse_args(argv)
    for n in args.views:
        if not 1 <= n <= FULL_VIEWS:
            parser.error(f"--views {n}: expected 1 to {FULL_VIEWS}, the views of the ground truth")
    if args.batch < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--batch and --limit take numbers of at least 1")
    if args.dc is not None and args.dc < 0:
        parser.error(f"--dc {args.dc}: expected 0 or more iterations")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def open_results(out: Path, run: dict) -> dict[tuple, list[dict]]:
    """Rows already in OUT/results.csv, by (file, method, views). Exits where OUT holds something else."""
    described = out / "run.json"
    if out.is_dir() and any(out.iterdir()):
        if not described.is_file():
            sys.exit(f"{out} is not empty and holds no results of test.py; give --out a new or empty folder.")
        before = json.loads(described.read_text())
        if before != json.loads(json.dumps(run)):
            wrong = ", ".join(k for k in run if before.get(k) != json.loads(json.dumps(run[k])))
            sys.exit(f"{out} holds results of another {wrong}; give --out a new folder, or the same options to resume.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic(described) as partial:
        partial.write_text(json.dumps(run, indent=1))
    done, table = {}, out / "results.csv"
    if table.is_file():
        with open(table, newline="") as file:
            for row in csv.DictReader(file):
                if row["seconds_per_slice"]:  # a killed run may leave half a line
                    done.setdefault((row["file"], row["method"], int(row["views"])), []).append(row)
    return {key: rows for key, rows in done.items() if len(rows) == len(WINDOWS)}


def write_results(out: Path, done: dict[tuple, list[dict]]) -> None:
    with atomic(out / "results.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for rows in done.values() for row in rows)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def reconstruct(method: str, y, size: int, denoise, degrade, iterations: int):
    """x0_hat (B, 1, size, size) and calls of each slice from measured sinograms of one view count."""
    dc = data_consistency(degrade, y, iterations)
    return SAMPLERS[method](denoise, degrade, degrade.fbp(y, size), levels_for(y[0].shape[-2]), dc=dc)


def evaluate_batch(method, x0, names, n_views, denoise, degrade, iterations, device) -> list[list[dict]]:
    """Rows (one a window) of each slice of a batch; the time is that of FBP and sampler, without loading."""
    y = degrade.project(x0, [n_views] * len(x0))
    synchronize(device)
    start = time.perf_counter()
    x0_hat, nfe = reconstruct(method, y, x0.shape[-1], denoise, degrade, iterations)
    synchronize(device)
    seconds = (time.perf_counter() - start) / len(x0)
    scores = [measure(x0_hat, x0, *w) for w in WINDOWS]
    return [[{"file": name, "method": method, "views": n_views, "width": w[0], "centre": w[1],
              **{k: repr(v[i].item()) for k, v in score.items()}, "nfe": nfe[i], "seconds_per_slice": f"{seconds:.5f}"}
             for w, score in zip(WINDOWS, scores, strict=True)] for i, name in enumerate(names)]


def summarize(done: dict[tuple, list[dict]], methods, views) -> list[dict]:
    """Means over slices, a row for each method, view count and window."""
    summary = []
    for n in views:
        for method in methods:
            chosen = [rows for (_, m, v), rows in done.items() if (m, v) == (method, n)]
            for i, w in enumerate(WINDOWS):
                mean = {k: float(np.mean([float(rows[i][k]) for rows in chosen]))
                        for k in ("psnr", "ssim", "rmse_hu", "nfe", "seconds_per_slice")}
                summary.append({"method": method, "views": n, "window": list(w), **mean, "slices": len(chosen)})
    return summary


def table(summary: list[dict]) -> str:
    """A Markdown table of the summary."""
    lines = ["| views | method | " + " | ".join(f"W{w}/L{c}: PSNR dB, SSIM x100, RMSE HU" for w, c in WINDOWS)
             + " | calls | s/slice |", "|" + "---|" * (len(WINDOWS) + 4)]
    for i in range(0, len(summary), len(WINDOWS)):
        rows = summary[i:i + len(WINDOWS)]
        cells = [f"{r['psnr']:.2f} / {100 * r['ssim']:.2f} / {r['rmse_hu']:.1f}" for r in rows]
        lines.append(f"| {rows[0]['views']} | {rows[0]['method']} | " + " | ".join(cells)
                     + f" | {rows[0]['nfe']:.1f} | {rows[0]['seconds_per_slice']:.2f} |")
    return "\n".join(lines)


def main(argv=None):
    args = parse(argv)
    network, header = load_checkpoint(args.checkpoint, args.device)
    files = find_slices(args.data, "test")
    if args.limit:
        spread = np.linspace(0, len(files) - 1, min(args.limit, len(files))).round().astype(int)
        files = [files[i] for i in spread]
    files, hu = read_slices(files, network.config.multiple, args.strict)
    names = [f.name for f in files]
    iterations = trained_dc(header) if args.dc is None else args.dc
    run = {"checkpoint": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:16], "data": fingerprint(files, hu),
           "methods": args.methods, "views": args.views, "dc": iterations, "batch": args.batch,
           "protocol": args.protocol, "device": args.device}
    done = open_results(args.out, run)
    print(f"{len(names)} slices of {hu.shape[1]} x {hu.shape[2]}, checkpoint {args.checkpoint.name} "
          f"({header.get('preset', 'unnamed')}), "
          f"{iterations} iterations of data consistency a call, {args.device}.")

    official = args.protocol == "cvg-official"
    degrade, denoise = Degradation(official=official), denoiser(network, clip=not official)
    mu = hu_to_mu(torch.from_numpy(hu))[:, None]
    starts = range(0, len(names), args.batch)
    bar = tqdm(total=len(starts) * len(args.views) * len(args.methods), unit="batch", disable=None)
    truths, warm = {}, set()
    for n in args.views:
        for method in args.methods:
            for i in starts:
                batch = names[i:i + args.batch]
                if not all((name, method, n) in done for name in batch):
                    if i not in truths:
                        truths[i] = degrade.full(mu[i:i + args.batch].to(args.device))
                    x0 = truths[i]
                    if (method, n, len(batch)) not in warm:
                        warm.add((method, n, len(batch)))
                        denoise(degrade(x0, n), [n] * len(x0))
                    rows = evaluate_batch(method, x0, batch, n, denoise, degrade, iterations, args.device)
                    done.update({(name, method, n): r for name, r in zip(batch, rows, strict=True)})
                    write_results(args.out, done)
                bar.update()
    bar.close()

    done = {(name, method, n): done[name, method, n] for n in args.views for method in args.methods for name in names}
    write_results(args.out, done)
    summary = summarize(done, args.methods, args.views)
    with atomic(args.out / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=1))
    middle = len(names) // 2
    x0 = degrade.full(mu[middle:middle + 1].to(args.device))
    for n in args.views:
        figure = args.out / f"comparison_{n}views.png"
        if not figure.is_file():
            y = degrade.project(x0, [n])
            images = {m: reconstruct(m, y, x0.shape[-1], denoise, degrade, iterations)[0] for m in args.methods}
            comparison(figure, x0, images, f"{names[middle]}, {n} views")
    print(table(summary))
    print(f"Written: results.csv, summary.json and a figure a level in {args.out}.")


if __name__ == "__main__":
    main()
