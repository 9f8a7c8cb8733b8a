"""Every number that matters on a GPU, with its goal, in four minutes: python -m benchmarks.gpu

Each line is printed when it is measured. A section that fails or hangs is named and hides nothing else: sections run in
a process of their own, which is ended when their time is over and begun again for the next. The table, with card,
versions and commit, goes to a JSON file. --train then trains preset small for some minutes on a folder of slices, its
schedule fitted to the measured rate, and evaluates it on DATA's val and test slices.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import harmonic_mean

from benchmarks.ablation import affordable, preset_of
from benchmarks.gpu_rows import LEFT_OUT, ROOT, SECTIONS, make_data, work
from datasets.slices import find_slices, read_slices
from models.cost import cost
from models.schedule import forward_calls
from utils.cli import Parser, script
from utils.device import chosen_device
from utils.errors import InputError, RunFolderError, Stopped
from utils.files import atomic
from utils.scalars import read_lines

GRACE = 5  # seconds after a section's time in which it may end by itself


def parse(argv=None):
    parser = Parser("python -m benchmarks.gpu", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"), metavar="FILE", help="the JSON file")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
                        help=f"some of {', '.join(SECTIONS)}; none: only --train (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="every section on tiny images: does it all work?")
    parser.add_argument("--train", type=float, metavar="MINUTES", help="train for so long (default: no training)")
    parser.add_argument("--data", metavar="DATA", help="folder with train_img/, val_img/ and test_img/, for --train "
                        "(default: none)")
    parser.add_device()
    args = parser.parse_args(argv)
    parser.at_least(args, {"train": 0.01 if args.rehearse else 2})
    if (args.train is None) != (args.data is None):
        parser.error("--train and --data go together: minutes, and a folder of slices")
    return args


def measure(args, found: dict) -> None:
    """Fill `found` with the rows of the sections, and print them."""
    names = [name for name in SECTIONS if name in args.only]
    ends = dict(zip(names, accumulate((SECTIONS[name][1] for name in names), initial=time.monotonic()), strict=False))
    ends = {name: end + SECTIONS[name][1] for name, end in ends.items()}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.rehearse)
        while names:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(theirs, names, ends, args.device, args.rehearse, Path(folder)))
            worker.start()
            theirs.close()
            try:
                names = listen(ours, names, ends, found)
            finally:
                end(worker)


def listen(connection, names: list[str], ends: dict[str, float], found: dict) -> list[str]:
    """Take what a process sends until it is done, ends or hangs; the names of the sections that are left."""
    names = list(names)
    while names:
        reason = ""
        try:
            if connection.poll(max(0.0, ends[names[0]] + GRACE - time.monotonic())):
                kind, content = connection.recv()
            else:
                reason = "its time is over, and it did not end by itself"
        except (EOFError, OSError):
            reason = "its process ended"
        if reason:
            add(found, {"section": names[0], "name": f"the rest of {names[0]}", "value": None, "unit": "", "goal": "",
                        "met": None, "note": reason})
            return names[1:]
        if kind == "done":
            names.remove(content)
        elif kind == "machine" and not found["machine"]:
            found["machine"] = content
            print(", ".join(f"{name} {value}" for name, value in content.items()), flush=True)
        elif kind == "row":
            add(found, content)
    return []


def end(worker) -> None:
    """End a process and all that it started."""
    worker.join(0.1)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()
    worker.join(10)


def add(found: dict, row: dict) -> None:
    """Keep a row and print it."""
    found["rows"].append(row)
    value = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
    judged = f"goal {row['goal']}" if row["goal"] else row["note"]
    if row["met"] is not None:
        judged += ": met" if row["met"] else ": not met"
    if row["note"] and row["goal"]:
        judged += f", {row['note']}"
    print(f"{row['section']:<11}{row['name']:<62}{value:<18} {judged}".rstrip(), flush=True)


def write(path: Path, found: dict) -> None:
    """Write everything that was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def train(args, out: Path) -> dict:
    """Train, evaluate on val and test, and say what came of it. Leaves run/, val/ and test/ in `out`.

    The minutes are those of the trial that measures the rate and of the training, not of the evaluation.
    """
    begun, flags = time.monotonic(), ["--preset", "small"]
    if args.rehearse:
        flags += ["--width", "32", "--blocks", "1", "--batch", "8", "--hops", "1", "--val-slices", "1", "--dc", "1"]
    start = [sys.executable, "train.py", "--data", args.data, "--device", args.device, *flags]
    out.mkdir(parents=True)
    rate, before = trial(start, out / "trial", 0 if args.rehearse else 30)
    files, preset = find_slices(args.data, "train"), preset_of(flags)
    left = max(60 * args.train - (time.monotonic() - begun) - before, 1.0)
    size = read_slices(files[:1])[1].shape[-1]
    images, shorter = fit(preset, len(files), size, 0.95 * left * rate * forward_calls(preset, 1 + preset.hops))
    print(f"train      {rate:.1f} images/s: {images} images in the {left:.0f} s that are left", flush=True)
    checkpoint, summaries = out / "run" / "checkpoint.safetensors", {}
    status, _ = run([*start, "--out", out / "run", "--images", images, *shorter], 1.1 * left + before + 30)
    if not checkpoint.is_file():
        raise Stopped(f"train.py ended with status {status} and left no checkpoint; what it said is above")
    for split in ("val", "test"):
        command = [sys.executable, "test.py", "--data", Path(args.data, f"{split}_img"), "--out", out / split,
                   "--checkpoint", checkpoint, "--precision", "bf16", "--batch", "32", "--methods", "fbp", "sequential",
                   "spdps", "--device", args.device, *(["--views", "18"] if args.rehearse else [])]
        status_of_test, text = run(command, 600)
        print(f"train      {split}:\n{text}", flush=True)
        if status_of_test:
            raise Stopped(f"test.py ended with status {status_of_test} on {split}; what it said is above")
        summaries[split] = json.loads((out / split / "summary.json").read_text(encoding="utf-8"))
    return {"minutes": args.train, "images_per_second": rate, "images": images, "flags": shorter,
            "status": status, "checkpoint": str(checkpoint), **summaries}


def fit(preset, count: int, size: int, calls: float) -> tuple[int, list[str]]:
    """Images that so many forward calls of one slice pay for, and the flags of a schedule of this length."""
    pflop = calls * cost(preset.network(), size, preset.precision)[1] / 1e15
    images = affordable(preset, count, size, pflop)
    share = min(1.0, images / preset.images)  # phases as long as they are in the preset, in proportion
    fields = {"epct_start": int(share * preset.epct_start), "warmup": int(share * preset.warmup)}
    images = affordable(replace(preset, **fields), count, size, pflop)
    fields |= {"val_every": max(100, images // 4), "save_every": max(100, images // 8)}
    return images, [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def trial(start: list, out: Path, seconds: float) -> tuple[float, float]:
    """(images a second of EPCT over so many seconds, seconds before the first image)."""
    log, begun, first = out.with_suffix(".log"), time.monotonic(), None
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([*map(str, start), "--out", str(out), "--epct-start", "0", "--images", str(10**6),
                                    "--val-every", str(10**9), "--save-every", str(10**9)], cwd=ROOT, stdout=file,
                                   stderr=file)
        try:
            while True:
                time.sleep(0.1)
                lines, now = read_lines(out / "metrics.jsonl"), time.monotonic()
                first = first or (now if lines else None)
                if process.poll() is not None or now - begun > 300 + seconds:
                    raise Stopped(f"The trial run of train.py gave no rate: see {log}")
                if first and now - first >= seconds:
                    break
        finally:
            process.kill()
            process.wait()
    shutil.rmtree(out)
    rates = [line["images_per_second"] for line in lines]  # of every hundred images
    later = rates[len(rates) // 2:]                        # the first ones still build tables
    return harmonic_mean(later), max(0.0, first - begun - lines[0]["images"] / rates[0])


def run(command: list, seconds: float) -> tuple[int, str]:
    """(exit status, standard output) of a script, which is asked to stop after so many seconds."""
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # train.py saves what it has
        with suppress(subprocess.TimeoutExpired):
            return process.wait(60), ""
        raise Stopped(f"{command[1]} did not stop within a minute") from None
    finally:
        process.kill()
    return process.returncode, text


@script
def main(argv=None) -> None:
    args = parse(argv)
    args.out = args.out.absolute()
    args.device = chosen_device(args.device)
    if args.device == "cpu" and not args.rehearse:
        raise InputError("There is no GPU here, or --device cpu was given; a CPU can only --rehearse.")
    trained = args.out.parent / f"{args.out.stem}-small"
    if args.train:
        args.data = str(Path(args.data).absolute())
        for split in ("train", "val", "test"):
            find_slices(args.data, split)
        if trained.exists():
            raise RunFolderError(f"{trained} exists; move it away, or give --out another name.")
    found = {"rehearsal": args.rehearse, "machine": {}, "rows": []}
    try:
        measure(args, found)
        write(args.out, found)
        if args.train:
            found["training"] = train(args, trained)
    finally:
        write(args.out, found)
    print(f"Written: {args.out}")
    failed = [row["name"] for row in found["rows"] if row["value"] is None and row["note"] != LEFT_OUT]
    if failed:
        raise Stopped(f"{len(failed)} could not be measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
