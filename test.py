#!/usr/bin/env python3
"""Evaluate CvG-Diff beside baselines: PSNR, SSIM, RMSE and VIF at every sparsity level, with statistics and figures.

DATA that datasets.rebin --truth wrote is evaluated on its measured sinograms: some of their views against the FBP of
all, and against the views that were not used. The same command resumes: slices already in OUT are not done again. Under
torchrun the slices are shared out.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean

from datasets.leakage import met_again, traces
from datasets.rebin import GEOMETRY
from datasets.slices import evenly_spaced, find_slices, fingerprint, patients_of, read_slices, remarks
from fig.flags import add_figure_flags, chosen_slice
from fig.latex import latex
from models.baselines import TV_WEIGHT
from models.levels import FULL_VIEWS
from models.methods import METHODS
from models.weights import find_checkpoint
from utils.cli import Parser, script
from utils.errors import InputError, printable
from utils.files import atomic, hash16
from utils.run_folder import lock
from utils.units import WINDOWS, hu_to_mu, number


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
    """The arguments of a command line, checked as far as it goes without data; options: {method: its own}."""
    parser = Parser("test.py", __doc__)
    parser.add_argument("--data", required=True, help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder for tables and figures")
    parser.add_argument("--checkpoint", default="tiny", help="a .safetensors file, a published CvG-Diff .pkl, "
                        "hf://owner/repository/file, or a known name: tiny (shipped), cvg-diff (published)")
    parser.add_argument("--views", type=int, nargs="+", default=[18, 36, 72], help="sparsity levels, 1 to 720")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fbp", "one-step", "sequential", "spdps"],
                        help="what to compare")
    parser.add_argument("--windows", type=window, nargs="+", default=WINDOWS, metavar="WIDTH,CENTRE",
                        help="HU windows of the metrics, the headline first (default 3000,500 500,50 2000,0)")
    parser.add_argument("--levels", type=int, nargs="+", help="view counts that chains pass through, where denser than "
                        "the measurement (default: the published ones, or with data consistency multiples of the "
                        "measured)")
    parser.add_argument("--start", type=float, default=0.0, help="angle of the first view, radians")
    parser.add_argument("--dc", type=int, help="iterations of data consistency after every network call; 0 gives the "
                        "published samplers (default: 24, and 0 for weights that were trained without)")
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, help="every second network call sees the "
                        "image mirrored (default: with data consistency, and weights that were trained with it)")
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
    parser.add_argument("--limit", type=int, help="evaluate this many slices, evenly spread over the folder (default: "
                        "all)")
    parser.add_device()
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network alone")
    parser.add_argument("--protocol", choices=("cvg", "cvg-official"), help="cvg-official: the published code's extra "
                        "full-view pass in D, estimates not clipped (default: the checkpoint's: cvg-official for a "
                        "published file)")
    parser.add_argument("--save-images", action="store_true", help="write reconstructions as HU .npy to OUT/images")
    add_figure_flags(parser, window)
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slice instead of skipping it")
    parser.add_argument("--trust-hu", action="store_true", help="values are HU even where they do not look so")
    args = parser.parse_args(argv)
    for name in ("views", "methods", "windows"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    for name in ("views", "levels"):
        for n in getattr(args, name) or ():
            if not 1 <= n <= FULL_VIEWS:
                parser.error(f"--{name} {n}: expected 1 to {FULL_VIEWS}, the views of the ground truth")
    parser.at_least(args, {"batch": 1, "limit": 1, "dc": 0, "semantic_budget": 1, "refine_steps": 1, "seed": 0,
                           "electronic": 0, "tv_weight": 0, "photons": 1})
    if args.electronic and not args.photons:
        parser.error("--electronic is about noise of photon counts; give --photons too")
    if not math.isfinite(args.start):
        parser.error(f"--start {args.start}: expected an angle in radians")
    args.options = {"spdps": {k: getattr(args, k) for k in ("semantic_budget", "refine_steps", "tau")},
                    "tv": {"weight": args.tv_weight}}
    return args


def describe(args, reconstructor, data: str) -> dict:
    """What run.json says: everything that results depend on. data: fingerprint of the slices."""
    return {"checkpoint": hash16(reconstructor.path), "data": data, "protocol": reconstructor.protocol,
            "dc": reconstructor.dc, **({"mirror": True} if reconstructor.mirror else {}),
            **{k: getattr(args, k) for k in ("methods", "views", "windows", "start", "photons", "electronic", "seed",
                                             "batch", "precision", "device")},
            "levels": {n: reconstructor.chain(n) for n in args.views},
            **{method: options for method, options in args.options.items() if method in args.methods}}


def write_tables(done, names, patients, run, again, args) -> list[dict]:
    """results.csv, summary.json, comparisons.csv, table.tex and table.md, which is printed too; the summary.

    again: of datasets.leakage.met_again.
    """
    from utils.metrics import METRICS
    from utils.results import table, write_rows
    from utils.statistics import compare, summarize

    methods, views = run["methods"], run["views"]
    done = {key: done[key] for n in views for m in methods for name in names if (key := (name, m, n)) in done}
    write_rows(args.out / "results.csv", [row for rows in done.values() for row in rows])
    counts = Counter((m, n) for _, m, n in done)
    done = {(name, m, n): rows for (name, m, n), rows in done.items() if counts[m, n] == len(names)}
    summary = [row | {"in_training": again} for row in summarize(done, patients, methods, views, args.seed)]
    with atomic(args.out / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if len(methods) > 1:
        write_rows(args.out / "comparisons.csv", compare(done, methods, views))
    noise = f", {args.photons:g} photons a ray" if args.photons else ""
    notes = [f"{len(patients)} slices, {len(set(patients))} patient(s), protocol {run['protocol']}, {run['dc']} "
             f"iterations of data consistency a call{noise}."]
    if "tv" in methods:
        chosen = ", chosen on validation slices" if run["tv"]["weight"] == TV_WEIGHT else ""
        notes.append(f"tv: weight {run['tv']['weight']:g}{chosen}.")
    kind = "main memory" if args.device == "cpu" else "GPU memory"
    if peaks := [row["peak_gib"] for row in summary if row["peak_gib"] is not None]:
        notes.append(f"At most {max(peaks):.2f} GiB of {kind} a process.")
    if above := sum(float(rows[0]["vif"]) > 1 + 1e-6 for rows in done.values()):
        notes.append(f"VIF is above 1 in {above} of {len(done)} images: more contrast than the truth, not a better "
                     "image. Are the slices in HU?")
    for name, metric in METRICS.items():
        if counts := [row[f"{name}_slices"] for row in summary if f"{name}_slices" in row]:
            notes.append(f"{metric.label} is not a number for up to {len(patients) - min(counts)} slices, which are "
                         "left out of its means.")
    left = {}
    for (_, method, n), rows in done.items():
        if rows[0]["held_out"]:
            left.setdefault((method, n), []).append(float(rows[0]["held_out"]))
    notes += [f"Measured views that were not used, {n} views by {method}: {mean(shares):.2%} unexplained."
              for (method, n), shares in left.items()]
    text = table(summary, notes)
    for path, content in (("table.md", text + "\n"), ("table.tex", latex(text))):
        with atomic(args.out / path) as partial:
            partial.write_text(content, encoding="utf-8")
    print(text)
    return summary


@script
def main(argv=None):
    args = parse(argv)
    files, checkpoint = find_slices(args.data, "test"), find_checkpoint(args.checkpoint)
    is_measured = (Path(args.data) / GEOMETRY).is_file()
    if is_measured and (args.photons or args.start):
        raise InputError(f"{args.data} holds measured sinograms: --photons and --start are for simulated ones.")
    if int(os.environ.get("RANK", 0)) == 0:
        lock(args.out)
    import torch  # takes two seconds, as what needs it

    from fig.evaluation import draw
    from models.evaluation import Noise, cautions, evaluate, read_measured
    from models.reconstructor import Reconstructor
    from models.scanner import PublishedScanner
    from utils import distributed
    from utils.device import chosen_device
    from utils.results import open_results

    rank, processes, args.device = distributed.start(chosen_device(args.device))
    reconstructor = Reconstructor.from_checkpoint(
        checkpoint, device=args.device, precision=args.precision, protocol=args.protocol, dc=args.dc,
        mirror=args.mirror, scanner=PublishedScanner(args.start), levels=args.levels)
    for method in args.methods:
        reconstructor.check(method)
    chosen = [files[i] for i in evenly_spaced(len(files), args.limit)]
    noise = Noise(args.photons, args.electronic, args.seed)
    if is_measured:
        noise = read_measured(Path(args.data), files)
        reconstructor = replace(reconstructor, scanner=noise.scanner)
    files, hu = read_slices(chosen, reconstructor.multiple, args.strict, args.trust_hu)
    names, patients = ([printable(text.encode("utf-8", "backslashreplace").decode()).replace("\n", "\\n")
                        for text in texts] for texts in ([f.name for f in files], patients_of(files)))
    again = met_again(reconstructor.header.get("traces"), traces(files, hu))
    shown = chosen_slice(args, names, hu.shape[1])
    run = describe(args, reconstructor, fingerprint(files, hu))
    run, done = distributed.gather(open_results(args.out, run) if rank == 0 else None)[0]
    print(f"{len(names)} slices of {hu.shape[1]} x {hu.shape[2]}, checkpoint {checkpoint.name} "
          f"({reconstructor.header.get('preset', 'unnamed')}), protocol {run['protocol']}, {run['dc']} iterations of "
          f"data consistency a call, {args.device}.")
    mu = hu_to_mu(torch.from_numpy(hu))[:, None]
    evaluate(args, reconstructor, noise, mu, names, patients, done, rank, processes)
    distributed.gather(rank)
    if rank == 0:
        run, done = open_results(args.out, run)
        summary = write_tables(done, names, patients, run, again, args)
        x0 = noise.truth(reconstructor, mu[shown:shown + 1].to(args.device))
        draw(args, reconstructor, noise, x0, names[shown], summary)
        print(f"Written: tables and figures in {args.out}.")
        told = cautions(reconstructor, run["methods"], hu.shape[1], args.photons, again)
        for text in (told if args.trust_hu else remarks(files, hu) + told):
            print(f"Warning: {text}", file=sys.stderr)
    distributed.gather(rank)
    distributed.finish()


if __name__ == "__main__":
    main()
