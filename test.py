#!/usr/bin/env python3
"""Evaluate CvG-Diff beside baselines: PSNR, SSIM, RMSE and VIF at every sparsity level, with statistics and figures.

The same command resumes: slices already in OUT are not done again. Under torchrun the slices are shared out.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch_radon import transmission_noise
from tqdm import tqdm

from datasets.slices import find_slices, fingerprint, patients_of, read_slices, spread
from models.baselines import BASELINES, TV_WEIGHT, sirt
from models.checkpoint import check_methods, default_dc, denoiser, find_checkpoint, load_checkpoint, placed
from models.consistency import ITERATIONS, data_consistency
from models.degradation import FULL_VIEWS, Degradation, levels_for
from models.samplers import SAMPLERS, chain_of
from utils import distributed, figures
from utils.device import check_device, default_device, forget_peak, peak_memory
from utils.files import atomic
from utils.metrics import measure, vif
from utils.results import append, open_results, table, write_csv
from utils.statistics import compare, number, summarize
from utils.units import WINDOWS, hu_to_mu, mu_to_hu, pixel_cm

METHODS = [*BASELINES, *SAMPLERS]


def window(text: str) -> tuple[float, float]:
    """WIDTH,CENTRE in HU."""
    try:
        width, centre = (number(v) for v in text.split(","))
    except ValueError:
        width = centre = math.nan
    if not (0 < width < math.inf and math.isfinite(centre)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected WIDTH,CENTRE in HU, such as 3000,500")
    return width, centre


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables and figures")
    parser.add_argument("--checkpoint", default="tiny", help="a .safetensors file, a published CvG-Diff .pkl, "
                        "hf://owner/repository/file, or a known name: tiny (shipped), cvg-diff (published)")
    parser.add_argument("--views", type=int, nargs="+", default=[18, 36, 72])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fbp", "one-step", "sequential", "spdps"])
    parser.add_argument("--windows", type=window, nargs="+", default=WINDOWS, metavar="WIDTH,CENTRE",
                        help="HU windows of the metrics, the headline first (default 3000,500 500,50 2000,0)")
    parser.add_argument("--levels", type=int, nargs="+",
                        help="view counts that chains pass through, where denser than the measurement (default: the "
                        "published ones, or with data consistency multiples of the measured)")
    parser.add_argument("--start", type=float, default=0.0, help="angle of the first view, radians")
    parser.add_argument("--dc", type=int, help="iterations of data consistency after every network call; 0 gives the "
                        f"published samplers (default: {ITERATIONS}, and 0 for weights that were trained without)")
    parser.add_argument("--dc-pull", type=float, default=0.0,
                        help="weight of a quadratic pull of data consistency towards the network's estimate")
    parser.add_argument("--dc-weighted", action="store_true", help="weigh rays by their noise (with --photons)")
    parser.add_argument("--semantic-budget", type=int,
                        help="spdps: n (default 2 below 72 views, 1 from there on and with data consistency)")
    parser.add_argument("--refine-steps", type=int, default=4, help="spdps: m, network calls of the detail phase")
    parser.add_argument("--tau", type=float, default=0.97, help="spdps: SSIM at which anatomy counts as settled")
    parser.add_argument("--tv-weight", type=float, default=TV_WEIGHT,
                        help="tv: weight of the total variation, for 256 pixels")
    parser.add_argument("--photons", type=float, help="I0: Poisson noise of so many photons a ray (default: none)")
    parser.add_argument("--electronic", type=float, default=0.0, help="standard deviation of electronic noise, counts")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the bootstrap")
    parser.add_argument("--batch", type=int, default=4, help="slices at once; results do not depend on it")
    parser.add_argument("--limit", type=int, help="evaluate this many slices, evenly spread over the folder")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network alone")
    parser.add_argument("--protocol", choices=("cvg", "cvg-official"),
                        help="cvg-official: the published code's extra full-view pass in D, estimates not clipped; "
                             "without it, the checkpoint's: cvg-official for a published file")
    parser.add_argument("--save-images", action="store_true", help="write reconstructions as HU .npy to OUT/images")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slice instead of skipping it")
    args = parser.parse_args(argv)
    for name in ("views", "methods", "windows"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    for n in args.views:
        if not 1 <= n <= FULL_VIEWS:
            parser.error(f"--views {n}: expected 1 to {FULL_VIEWS}, the views of the ground truth")
    for n in args.levels or ():
        if not 1 <= n <= FULL_VIEWS:
            parser.error(f"--levels {n}: expected 1 to {FULL_VIEWS}")
    for name, least in {"batch": 1, "limit": 1, "dc": 0, "dc_pull": 0, "semantic_budget": 1, "refine_steps": 1,
                        "seed": 0, "electronic": 0, "tv_weight": 0, "photons": 1}.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number of at least {least}")
    if (args.electronic or args.dc_weighted) and not args.photons:
        parser.error("--electronic and --dc-weighted are about noise of photon counts; give --photons too")
    if not math.isfinite(args.start):
        parser.error(f"--start {args.start}: expected an angle in radians")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def measured(x0, n_views: int, names, degrade, args) -> list[torch.Tensor]:
    """What the scanner gives of each slice: sinograms (1, n, bins), with noise that seed, name and views determine.

    It is drawn on the CPU, so that it does not depend on the device.
    """
    y = degrade.project(x0, [n_views] * len(x0))
    if args.photons is None:
        return y
    noisy = []
    for sinogram, name in zip(y, names, strict=True):
        digest = hashlib.sha256(f"{args.seed}/{name}/{n_views}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noisy.append(transmission_noise(sinogram.cpu(), args.photons, pixel_cm(x0.shape[-1]), args.electronic,
                                        generator).to(sinogram.device))
    return noisy


@torch.no_grad()
def reconstruct(method: str, y, size: int, denoise, degrade, iterations: int, consistency=None, **options):
    """x0_hat (B, 1, size, size) and calls of each slice from measured sinograms of one view count, nothing else.

    iterations, consistency: of `data_consistency`, and its options; options: the method's, a sampler's
    levels among them.
    """
    if method in BASELINES:
        return BASELINES[method](degrade, y, size, **options), [0] * len(y)
    dc = data_consistency(degrade, y, iterations, **(consistency or {}))
    return SAMPLERS[method](denoise, degrade, degrade.fbp(y, size), dc=dc, **options)


def warm_up(y, size, denoise, degrade, iterations, chain) -> None:
    """Compile kernels, build tables and let libraries choose algorithms before anything is timed."""
    reconstruct("sequential", y, size, lambda x, views: x[:, :1], degrade, iterations, **chain)
    reconstruct("one-step", y, size, denoise, degrade, 0, **chain)
    sirt(degrade, y, size, iterations=1)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def rows_of(x0_hat, x0, windows, about: list[dict]) -> list[list[dict]]:
    """Result rows of each slice, one a window. about: what the rows of a slice have in common."""
    scores = [measure(x0_hat, x0, *w) for w in windows]
    scores[0]["vif"] = vif(x0_hat, x0, *windows[0])  # slow, and reported in the headline window alone
    return [[{**common, "width": w[0], "centre": w[1], **{k: repr(v[i].item()) for k, v in score.items()}}
             for w, score in zip(windows, scores, strict=True)] for i, common in enumerate(about)]


def save_image(path: Path, x0_hat) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial, open(partial, "wb") as file:
        np.save(file, mu_to_hu(x0_hat[0]).cpu().numpy())


def draw(out: Path, name, x0, degrade, reconstruction, args, summary) -> None:
    """A comparison and the error along the chain at each level for one slice; curves of the means over all slices."""
    for n in args.views:
        if (out / f"comparison_{n}views.png").is_file():
            continue
        y, images, chains = measured(x0, n, [name], degrade, args), {}, {}
        for method in args.methods:
            errors = []

            def watch(slices, views, x0_hat, errors=errors):
                errors.append(measure(x0_hat, x0, *args.windows[0])["psnr"].item())

            images[method], _ = reconstruction(method, y, callback=watch)
            if len(errors) > 1:
                chains[method] = list(zip(range(1, len(errors) + 1), errors, strict=True))
        if chains:
            figures.curves(out / f"chain_{n}views.png", chains, "network call", f"{name}, {n} views")
        figures.comparison(out / f"comparison_{n}views.png", x0, images, f"{name}, {n} views")
    headline = [row for row in summary if row["window"] == list(args.windows[0])]
    if len(args.views) > 1:
        figures.curves(out / "psnr_views.png", {m: sorted((r["views"], r["psnr"]) for r in headline if r["method"] == m)
                                                for m in args.methods}, "views", "mean over slices", log=True)
    figures.curves(out / "psnr_calls.png", {f"{n} views": sorted((r["nfe"], r["psnr"]) for r in headline
                                                                 if r["views"] == n) for n in args.views},
                   "network calls a slice", ", ".join(args.methods), joined=False)


def write_tables(done, patients, run, args) -> list[dict]:
    """results.csv, summary.json, comparisons.csv and table.md, which is printed too; the summary."""
    write_csv(args.out / "results.csv", [row for rows in done.values() for row in rows])
    summary = summarize(done, patients, args.methods, args.views, args.seed)
    with atomic(args.out / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=1))
    if len(args.methods) > 1:
        write_csv(args.out / "comparisons.csv", compare(done, args.methods, args.views))
    noise = f", {args.photons:g} photons a ray" if args.photons else ""
    notes = [f"{len(patients)} slices, {len(set(patients))} patient(s), protocol {run['protocol']}, {run['dc']} "
             f"iterations of data consistency a call{noise}."]
    if "tv" in args.methods:
        chosen = ", chosen on validation slices" if args.tv_weight == TV_WEIGHT else ""
        notes.append(f"tv: weight {args.tv_weight:g}{chosen}.")
    kind = "main memory a process" if args.device == "cpu" else "GPU memory for tensors"
    notes.append(f"At most {max(row['peak_gib'] for row in summary):.2f} GiB of {kind}.")
    text = table(summary, notes)
    with atomic(args.out / "table.md") as partial:
        partial.write_text(text + "\n")
    print(text)
    return summary


def main(argv=None):
    args = parse(argv)
    checkpoint = find_checkpoint(args.checkpoint)
    network, header = load_checkpoint(checkpoint)
    check_methods(args.methods, network, checkpoint)
    files = find_slices(args.data, "test")
    files = [files[i] for i in spread(len(files), args.limit)]
    files, hu = read_slices(files, network.config.multiple, args.strict)
    names, patients = [f.name for f in files], patients_of(files)
    iterations = default_dc(header) if args.dc is None else args.dc
    official = (args.protocol or header.get("protocol")) == "cvg-official"
    options = {"spdps": {"semantic_budget": args.semantic_budget, "refine_steps": args.refine_steps, "tau": args.tau},
               "tv": {"weight": args.tv_weight}}
    chains = {n: chain_of(network.config, n, iterations) for n in args.views}
    if args.levels:
        chains = {n: chain | {"levels": levels_for(n, args.levels)} for n, chain in chains.items()}
    run = {"checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16], "data": fingerprint(files, hu),
           "protocol": "cvg-official" if official else "cvg", "dc": iterations,
           **{k: getattr(args, k) for k in ("methods", "views", "windows", "start", "dc_pull", "dc_weighted",
                                            "photons", "electronic", "seed", "batch", "precision", "device")},
           "levels": {n: chain["levels"] for n, chain in chains.items()},
           **{k: v for k, v in options.items() if k in args.methods}}
    rank, processes, device = distributed.start(args.device)
    done = distributed.gather(open_results(args.out, run) if rank == 0 else None)[0]
    print(f"{len(names)} slices of {hu.shape[1]} x {hu.shape[2]}, checkpoint {checkpoint.name} "
          f"({header.get('preset', 'unnamed')}), protocol {run['protocol']}, {iterations} iterations of data "
          f"consistency a call, {args.device}.")

    degrade = Degradation(start=args.start, official=official)
    denoise = denoiser(placed(network, device, args.precision), clip=not official, precision=args.precision)
    consistency = {"photons": args.photons, "electronic": args.electronic, "pull": args.dc_pull,
                   "weighted": args.dc_weighted}

    def reconstruction(method, y, callback=None):
        given = options.get(method, {})
        if method in SAMPLERS:
            given = given | chains[y[0].shape[-2]] | {"callback": callback}
        return reconstruct(method, y, hu.shape[-1], denoise, degrade, iterations, consistency, **given)

    def image(method, n, name):
        return args.out / "images" / f"{method}_{n}views" / name

    def is_done(name, method, n):
        return (name, method, n) in done and (not args.save_images or image(method, n, name).is_file())

    mu = hu_to_mu(torch.from_numpy(hu))[:, None]
    starts = range(rank * args.batch, len(names), processes * args.batch)
    bar = tqdm(total=len(starts) * len(args.views) * len(args.methods), unit="batch", disable=rank > 0 or None)
    truths, warm = {}, set()
    for n in args.views:
        for method in args.methods:
            for i in starts:
                batch = names[i:i + args.batch]
                if not all(is_done(name, method, n) for name in batch):
                    if i not in truths:
                        truths[i] = degrade.full(mu[i:i + args.batch].to(device)).cpu()
                    x0 = truths[i].to(device)
                    y = measured(x0, n, batch, degrade, args)
                    if (n, len(batch)) not in warm:
                        warm.add((n, len(batch)))
                        warm_up(y, hu.shape[-1], denoise, degrade, iterations, chains[n])
                    forget_peak(device)
                    synchronize(device)
                    start = time.perf_counter()
                    x0_hat, nfe = reconstruction(method, y)
                    synchronize(device)
                    seconds = (time.perf_counter() - start) / len(batch)
                    gib = peak_memory(device)
                    if args.save_images:
                        for name, x in zip(batch, x0_hat, strict=True):
                            save_image(image(method, n, name), x)
                    rows = rows_of(x0_hat, x0, args.windows, [
                        {"file": name, "patient": patients[i + j], "method": method, "views": n, "nfe": nfe[j],
                         "seconds_per_slice": f"{seconds:.5f}", "peak_gib": f"{gib:.3f}"}
                        for j, name in enumerate(batch)])
                    append(args.out, rank, [row for slice_rows in rows for row in slice_rows])
                bar.update()
    bar.close()
    distributed.gather(rank)
    if rank == 0:
        done = open_results(args.out, run)
        done = {(name, method, n): done[name, method, n] for n in args.views for method in args.methods
                for name in names}
        summary = write_tables(done, patients, run, args)
        middle = len(names) // 2
        draw(args.out, names[middle], degrade.full(mu[middle:middle + 1].to(device)), degrade, reconstruction, args,
             summary)
        print(f"Written: tables and figures in {args.out}.")
    distributed.gather(rank)
    distributed.finish()


if __name__ == "__main__":
    main()
