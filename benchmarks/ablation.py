"""Ablation at equal compute: one change to the recipe at a time, trained alike, compared on validation slices.

    python -m benchmarks.ablation --data DATA --out runs/ablation [--pflop 0.03 | --minutes 15] [--rows NAME ...]
        [--seeds 3407 1]

Every row is a training by train.py on DATA/train_img, with as many images as its network calls may cost or as fit into
--minutes, and an evaluation by test.py on slices of DATA/val_img; no test slice is read. What is done is not done
again, and a training that was stopped goes on: the same command prints the whole table. Rows can be shared out between
several shells; with --minutes the machine must be as busy in every row.
"""

import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import train
from datasets.loader import batches
from datasets.slices import find_slices, read_slices
from models.cost import cost
from models.presets import Preset
from models.schedule import forward_calls, inputs_of
from utils.cli import Parser, script
from utils.errors import InputError, RunFolderError

# Step counts of the recipe, scaled to runs of some hundred steps. Measurements and chains at the published levels, from
# angle 0: the few that such runs see are those that the table asks about. And without what came of the table: the
# residual channel, and no flips and turns.
SHORT = ("--epct-start 25 --warmup 25 --ema-start 25 --ema 0.99 --any-view-share 0 --conditioning level --augment "
         "--channels 1 --residual-channel two-pass")
PROBE = 32  # images of a training that measures the speed
# name: (flags of train.py after --preset tiny, flags of test.py)
ROWS = {
    "default": ("", ""),
    "output x0 instead of x0 - x_t": ("--no-residual --no-zero-init", ""),
    "input in mu, unscaled": ("--shift 0 --scale 1", ""),
    "one level a batch": ("--no-per-sample-levels", ""),
    "all levels alike": ("--focus-share 0", ""),
    "constant rate": ("--schedule step", ""),
    "rate 4e-5, constant": ("--schedule step --lr 4e-5", ""),
    "raw weights at test": ("--publish raw", ""),
    "one hop": ("--hops 1", ""),
    "no EPCT": ("--hops 0", ""),
    "every hop to the next level": ("--jumps 0", ""),
    "every hop to any denser level": ("--jumps 1", ""),
    "the EMA's estimates in EPCT": ("--estimates-by ema", ""),
    "residual channel, two passes": ("--channels 2", "--methods one-step reco"),
    "residual channel, anchored": ("--channels 2 --residual-channel anchored", ""),
    "no flips and turns": ("--no-augment", ""),
    "chains through multiples of the measured views": ("--conditioning log-views", ""),
    "the same, measured at any view count too": ("--conditioning log-views --any-view-share 0.5", ""),
    "these together, as tiny has them": (
        "--conditioning log-views --any-view-share 0.5 --channels 2 --residual-channel anchored --no-augment", ""),
    "data consistency at test only": ("--dc 0", "--dc 16"),
    "no data consistency, x_s = D(x0_hat)": ("--dc 0", "--dc 0 --methods one-step naive"),
    "no data consistency, level shift": ("--dc 0 --update shift", "--dc 0"),
    "MSE loss": ("--loss mse", ""),
    "no unshuffle stem": ("--stem 1", ""),
    "width 64": ("--width 64", ""),
    "width 64, unshuffle by 4": ("--width 64 --stem 4", ""),
    "one block a resolution": ("--blocks 1", ""),
    # Its published rate, 4e-5 and constant, leads nowhere in so few steps.
    "reference: the published recipe, rate 5e-4 falling": (
        "--preset paper --width 32 --precision bf16 --schedule cosine --lr 5e-4 --epct-start 10 --ema-start 10 "
        "--ema 0.9 --ema-every 1 --no-augment", "--methods one-step spdps"),
}


def parse(argv=None):
    parser = Parser("python -m benchmarks.ablation", __doc__)
    parser.add_argument("--data", required=True, help="folder with train_img/ and val_img/")
    parser.add_argument("--out", required=True, type=Path, help="folder of the trainings and their evaluations")
    parser.add_argument("--pflop", type=float, default=0.03, help="of network calls, each training")
    parser.add_argument("--minutes", type=float, help="train each row for so many minutes on this machine, instead "
                        "of --pflop (default: by --pflop)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME",
                        help="which rows (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407], help="of the trainings")
    parser.add_argument("--slices", type=int, default=8, help="validation slices")
    parser.add_argument("--train", default=SHORT, help="flags of train.py for every row")
    parser.add_argument("--table", action="store_true", help="only print what is done")
    args = parser.parse_args(argv)
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes:g}: expected a positive number")
    return args


def preset_of(flags: list[str]) -> Preset:
    """The preset that these flags of train.py give."""
    return train.parse(["--data", "-", "--out", "-", *flags])[1]


def affordable(preset: Preset, count: int, size: int, pflop: float) -> int:
    """Training images, whole batches of `count` slices, whose network calls cost at most `pflop` 1e15 operations."""
    calls, step, images = pflop * 1e15 / cost(preset.network(), size, preset.precision)[1], 0, 0
    for first, last in batches(count, preset.batch, 10**9):
        calls -= (last - first) * forward_calls(preset, inputs_of(preset, step))
        if calls < 0 and images == 0:
            raise InputError(f"--pflop {pflop:g} does not pay for one batch; give more.")
        if calls < 0:
            return images
        step, images = step + inputs_of(preset, step), last


def fitting(minutes: float, batch: int, command: list) -> int:
    """Training images, whole batches, that fit into so many minutes, by the speed of a training of PROBE images.

    command: train.py with its flags, but for --out and --images. All but the first steps have composed inputs.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, images in (("compiled", batch), ("timed", max(batch, PROBE))):
            call([*command, "--out", Path(folder, name), "--images", images, "--epct-start", 0])
        lines = map(json.loads, Path(folder, "timed", "metrics.jsonl").read_text().splitlines())
        rate = next(line["images_per_second"] for line in lines if "images_per_second" in line)
    return max(1, round(60 * minutes * rate / batch)) * batch


def call(command: list) -> None:
    """Run a script of this repository; what it prints is in its folder too."""
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def run(args, row: str, seed: int) -> Path:
    """Train and evaluate one row; the folder of its results."""
    trains, tests = ROWS[row]
    out = args.out / f"{re.sub(r'[^a-z0-9]+', '-', row.lower())}-{seed}"
    flags = ["--preset", "tiny", *shlex.split(args.train), *shlex.split(trains), "--seed", str(seed)]
    spent = {"minutes": args.minutes} if args.minutes else {"pflop": args.pflop}
    record, now = out / "row.json", {**spent, "slices": args.slices, "train": flags, "test": tests}
    before = json.loads(record.read_text()) if record.is_file() else {}
    images = before.pop("images", None)
    if before and before != now:
        raise RunFolderError(f"{out} holds this row made otherwise ({before}); give --out a new folder, or the same "
                             "options.")
    if (out / "test" / "summary.json").is_file() or args.table:
        return out / "test"
    files, preset = find_slices(args.data, "train"), preset_of(flags)
    size = read_slices(files[:1], preset.network().multiple)[1].shape[-1]
    training = ["train.py", "--data", args.data, *flags, "--val-every", 10**9, "--val-slices", 1, "--save-every", 100]
    images = images or (fitting(args.minutes, preset.batch, training) if args.minutes
                        else affordable(preset, len(files), size, args.pflop))
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(now | {"images": images}))
    for command in ([*training, "--out", out / "train", "--images", images],
                    ["test.py", "--data", Path(args.data, "val_img"), "--out", out / "test", "--checkpoint",
                     out / "train" / "checkpoint.safetensors", "--limit", args.slices, "--batch", 8, "--precision",
                     "bf16", "--no-mirror", "--methods", "one-step", "sequential", *shlex.split(tests)]):
        print(f"{row} (seed {seed}): {command[0]}, {images} images", flush=True)
        call(command)
    return out / "test"


def line(row: str, seed: int, results: Path) -> str:
    """A row of the table: images seen, PSNR of one call and of the chain at 18 / 36 / 72 views."""
    headline = [r for r in json.loads((results / "summary.json").read_text()) if r["window"] == [3000, 500]]
    lines = (results.parent / "train" / "metrics.jsonl").read_text().splitlines()
    psnr = {}
    for r in sorted(headline, key=lambda r: r["views"]):
        psnr.setdefault(r["method"], []).append(f"{r['psnr']:.2f}")
    chain = next(name for name in psnr if name != "one-step")
    cells = [row, chain, seed, json.loads(lines[-1])["images"], *(" / ".join(psnr[m]) for m in ("one-step", chain))]
    return "| " + " | ".join(map(str, cells)) + " |"


@script
def main(argv=None):
    args = parse(argv)
    done = []
    for seed in args.seeds:
        for row in args.rows:
            results = run(args, row, seed)
            if (results / "summary.json").is_file():
                done.append((row, seed, results))
    spent = f"{args.minutes:g} minutes" if args.minutes else f"{args.pflop:g} PFLOP"
    print(f"{spent} a training, {args.slices} validation slices, PSNR in dB at 18 / 36 / 72 views\n"
          "| change | chain | seed | images | one call | chain |\n|" + "---|" * 6)
    print("\n".join(line(*row) for row in done))


if __name__ == "__main__":
    main()
