"""CT of any layout to HU slices for training: `python -m datasets.prepare INPUT... --out DIR`.

Reads DICOM, NIfTI, .npy (HU) and 16-bit PNG (value - 1024 = HU), in any mixture of folders. Writes int16 HU to
DIR/{train,val,test}_img/<patient>_<nnn>.npy, split by patient, with a manifest.csv in each folder, and DIR/report.csv,
which names every file that was refused, left out or is odd. The same command again does only what is missing.

Names and IDs of patients become pseudonyms unless --keep-names, in file names and where a path repeats them. These
are hashes: they hide a name from a reader, not from someone who has a list of IDs to try. Exit status 1 when
something was refused (the rest is written) or nothing could be done.
"""

import argparse
import csv
import faulthandler
import hashlib
import json
import multiprocessing
import os
import re
import signal
import stat
import sys
import traceback
from collections import Counter, defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.dicom import Refused, Slice, hider, order_series, pseudonym
from datasets.formats import examine, load, resize_hu
from datasets.slices import patient_of, patients_of
from utils.files import atomic

SPLITS = ("train", "val", "test")
COLUMNS = ("file", "patient", "index", "series", "position", "spacing_mm", "kernel", "source", "sha256")
LIMIT = 300  # seconds a file: a decoder that takes longer hangs
DIED = "crashed its reader, or kept it busy for over five minutes"
_SILENT = open(os.devnull, "w")  # noqa: SIM115 (faulthandler wants a file that stays open)


@dataclass(frozen=True)
class Output:
    """One file to write: OUT/folder/name from slices in order, of the patient of that label."""

    folder: str
    name: str
    patient: str
    slices: list[Slice]


@contextmanager
def time_limit(seconds: float = LIMIT):
    """Ends this process where the block takes longer: nothing gentler stops a decoder that hangs in compiled code."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_SILENT)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def examine_in_time(path: str) -> tuple[list[Slice], list[tuple[str, str, str]]]:
    """`examine` within the time limit."""
    with time_limit():
        return examine(path)


def convert(task: tuple[list[tuple[str, list[Slice]]], int, bool]) -> list[tuple[list[Slice], str, list]]:
    """Write the files of one task that are missing: for each (slices it holds, sha256, problems).

    task: ([(file to write, its slices in order)], size, whether the files are volumes).
    """
    outputs, size, volumes = task
    results, failed = [], {}  # a file that fails once is not decoded again for its other slices
    for target, slices in outputs:
        problems, kept = [], list(slices)
        if not os.path.exists(target) or volumes and len(np.load(target, mmap_mode="r")) < len(slices):
            images = []
            for one in slices:
                try:
                    if one.path in failed:
                        raise failed[one.path]
                    with time_limit():
                        images.append(resize_hu(load(one.path)[one.frame], size))
                except Refused as error:
                    failed[one.path] = error
                    problems.append((one.path, "refused", str(error)))
                    kept.remove(one)
            if not images:
                results.append(([], "", problems))
                continue
            with atomic(target) as partial, open(partial, "wb") as file:
                np.save(file, np.stack(images) if volumes else images[0])
        smallest = np.load(target, mmap_mode="r").min()
        if smallest > -500:
            problems.append((kept[0].path, "warning", f"has no air, its smallest value is {smallest}: is it in HU?"))
        results.append((kept, hashlib.sha256(Path(target).read_bytes()).hexdigest(), problems))
    return results


def write_table(path: Path, header: tuple[str, ...], rows: list) -> None:
    """Write a CSV file. Bytes of a path that are no text are escaped."""
    with atomic(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _serve(function, pipe):
    # A worker: lists of tasks in, lists of results (or what went wrong) out, until the other end is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            tasks = pipe.recv()
            try:
                answer = [function(task) for task in tasks]
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = error
            pipe.send(answer)


def parallel(function, tasks: list, workers: int, title: str, chunk: int = 8) -> list:
    """[function(task) for task in tasks] over processes; None for a task whose process died.

    A process gets up to `chunk` tasks at a time, as a message costs about as much as reading a header. Where it dies,
    another gets them one by one.
    """
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    context.set_forkserver_preload(["argparse", "datasets.formats", "datasets.slices", "tqdm"])  # starts in ms
    chunk = max(1, min(chunk, len(tasks) // (4 * workers)))
    waiting = deque(range(k, min(k + chunk, len(tasks))) for k in range(0, len(tasks), chunk))
    results, processes, idle, busy = {}, {}, [], {}  # busy: {pipe to a process: range of tasks it has}

    def start():
        ours, theirs = context.Pipe()
        processes[ours] = context.Process(target=_serve, args=(function, theirs), daemon=True)
        processes[ours].start()
        theirs.close()
        return ours

    with tqdm(total=len(tasks), desc=title, disable=None) as bar:
        try:
            while waiting or busy:
                while waiting and len(busy) < workers:
                    pipe = idle.pop() if idle else start()
                    busy[pipe] = waiting.popleft()
                    with suppress(BrokenPipeError, ConnectionResetError):  # it died while idle: seen below
                        pipe.send([tasks[i] for i in busy[pipe]])
                for pipe in wait(list(busy)):
                    indices = busy.pop(pipe)
                    try:
                        answer = pipe.recv()
                    except (EOFError, OSError):
                        if len(indices) > 1:
                            waiting.extendleft(range(i, i + 1) for i in reversed(indices))
                            continue
                        answer = [None]
                    else:
                        idle.append(pipe)
                    if isinstance(answer, Exception):
                        raise answer
                    results.update(zip(indices, answer, strict=True))
                    bar.update(len(indices))
        except (KeyboardInterrupt, OSError) as error:  # an OSError is a full disk: readers raise Refused
            sys.exit(f"Stopped ({error!r}). What is written is whole; the same command does the rest.")
        finally:
            for pipe, process in processes.items():
                pipe.close()
                process.join()
    return [results[i] for i in range(len(tasks))]


def find_files(inputs: list[str], out: Path) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """All files below the inputs but not below `out`: ({path: path from the input's parent}, problems).

    Links are followed; one that leads back to a folder already read is refused, so loops end.
    """
    files, problems, links = {}, [], []
    seen = {(out.stat().st_dev, out.stat().st_ino)} if out.is_dir() else set()
    stack = [(str(path), Path(os.path.abspath(path)).name) for path in inputs]
    while stack or links:  # links last: one never hides the folder that it leads to
        path, shown = stack.pop() if stack else links.pop()
        try:
            info = os.stat(path)
            if stat.S_ISREG(info.st_mode):
                files[path] = shown
            elif not stat.S_ISDIR(info.st_mode):
                problems.append((path, "refused", "is neither a file nor a folder"))
            elif (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                for name in os.listdir(path):
                    child = os.path.join(path, name)
                    (links if os.path.islink(child) else stack).append((child, f"{shown}/{name}"))
            elif os.path.islink(path):
                problems.append((path, "refused", "is a link that leads back to a folder already read"))
        except OSError as error:
            problems.append((path, "refused", f"cannot be read ({error.strerror})"))
    return dict(sorted(files.items())), problems


def name_patients(slices: list[Slice]) -> list[Slice]:
    """Fill in the patient of slices from files that do not say: from a manifest.csv beside them, or from the name.

    A volume is a patient of its own, a slice `case_012` belongs to `case`; where names are bare numbers or the same
    in several folders, the folder is the patient.
    """
    paths = [Path(path) for path in sorted({one.path for one in slices if not one.patient})]
    volumes = {one.path for one in slices if one.frame}
    patients = dict(zip(paths, patients_of(paths), strict=True))
    named = {path for path in paths if patients[path] != patient_of(path.name)}  # by a manifest
    for path in volumes - {str(path) for path in named}:
        patients[Path(path)] = re.sub(r"\.nii$", "", Path(path).stem, flags=re.I)
    used = Counter((patients[path], path.name) for path in paths)
    shared = {patient for (patient, _), count in used.items() if count > 1}
    for path in set(paths) - named:
        if patients[path].isdigit() or patients[path] in shared:
            patients[path] = Path(os.path.abspath(path)).parent.name
    return [one if one.patient else replace(
        one, patient=(patient := patients[Path(one.path)]), names=(patient,) * (len(patient) >= 4),
        series=one.path if one.path in volumes else os.path.dirname(one.path)) for one in slices]


def split_patients(patients: list[str], split: list[str], seed: int) -> dict[str, str]:
    """{patient: train, val or test}, by three fractions or lists `train=A,B` (`*`: all others). Exits on nonsense.

    With fractions the order is a hash of (seed, patient), and a part that is wanted gets a patient if there are enough.
    """
    named = dict(item.partition("=")[::2] for item in split)
    if set(named) <= set(SPLITS) and len(named) == len(split):
        part_of = {patient: part for part, names in named.items() for patient in names.split(",")}
        if missing := set(part_of) - {"*", *patients}:
            sys.exit(f"--split names {', '.join(sorted(missing))}, which the input does not hold; nothing was written.")
        return {patient: part for patient in patients if (part := part_of.get(patient, part_of.get("*")))}
    shares = [float(item) for item in split if re.fullmatch(r"\d*\.?\d+", item)]
    if not len(shares) == len(split) == 3 or abs(sum(shares) - 1) > 1e-6:
        sys.exit(f"--split is {' '.join(split)}; expected three fractions that add up to 1, or lists like "
                 "train=* val=A test=B,C.")
    wanted = sorted((part for part in range(3) if shares[part]), key=lambda part: -shares[part])[: len(patients)]
    counts = [max(1, round(shares[part] * len(patients))) if part in wanted else 0 for part in range(3)]
    if wanted:
        counts[wanted[0]] += len(patients) - sum(counts)
    order = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed} {patient}".encode()).hexdigest())
    return dict(zip(order, np.repeat(SPLITS, counts).tolist(), strict=True))


def check_resume(out: Path, outputs: list[Output], shown: dict[str, str], options: dict) -> None:
    """Record what OUT will hold; exit with a sentence where it holds something else already."""
    def identity(one):
        files = [f"{shown[s.path]} {os.path.getsize(s.path)} {s.frame}" for s in one.slices]
        return hashlib.sha256("\n".join(files).encode(errors="backslashreplace")).hexdigest()[:16]

    plan = {f"{one.folder}/{one.name}": identity(one) for one in outputs}
    record = out / "prepare.json"
    before = json.loads(record.read_text()) if record.is_file() else {"options": options, "outputs": {}}
    if changed := [key for key in options if options[key] != before["options"].get(key)]:
        sys.exit(f"{out} was made with another {', '.join(changed)}; repeat those options, or choose another --out.")
    there = [f"{path.parent.name}/{path.name}" for part in SPLITS for path in (out / f"{part}_img").glob("*.npy")]
    if other := [name for name in there if plan.get(name, "") != before["outputs"].get(name)]:
        sys.exit(f"{out} holds {len(other)} file(s) made from other input, such as {min(other)}; choose another --out.")
    with atomic(record) as partial:
        partial.write_text(json.dumps({"options": options, "outputs": plan}))


def write_all(outputs: list[Output], out: Path, shown: dict, options: dict, workers: int, problems: list, hide) -> int:
    """Convert what is missing and write manifests and report; the exit status. options: size, volumes and the like."""
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob("*_img/.*.partial"):  # of a run that was killed
        leftover.unlink()
    if outputs:
        check_resume(out, outputs, shown, options)
    for folder in {one.folder for one in outputs}:
        (out / folder).mkdir(exist_ok=True)
    tasks = defaultdict(list)  # one file's slices go together: it is decoded once
    for one in outputs:
        tasks[one.name if options["volumes"] else one.slices[0].path].append(one)
    jobs = [([(str(out / one.folder / one.name), one.slices) for one in group], options["size"], options["volumes"])
            for group in tasks.values()]
    rows = defaultdict(list)
    chunk = 8 * len(jobs) // max(1, len(outputs))  # a job of many slices goes alone
    for group, results in zip(tasks.values(), parallel(convert, jobs, workers, "Writing slices", chunk), strict=True):
        if results is None:
            results = [(one.slices[:0], "", [(one.slices[0].path, "refused", DIED)]) for one in group]
        for one, (kept, sha256, found) in zip(group, results, strict=True):
            problems += found
            rows[one.folder] += [
                (one.name, one.patient, index, pseudonym(s.series, "series", options["keep_names"]),
                 "" if s.position is None else round(s.position, 4),
                 "" if s.spacing is None else round(s.spacing * s.size / options["size"], 6),
                 s.kernel, hide(shown[s.path]), sha256) for index, s in enumerate(kept)]
    for folder, lines in sorted(rows.items()):
        write_table(out / folder / "manifest.csv", COLUMNS, sorted(lines, key=lambda line: (line[0], line[2])))
        print(f"{out / folder}: {len(lines)} slices of {len({line[1] for line in lines})} patient(s)")
    report = sorted({(hide(shown.get(path, path)), status, reason) for path, status, reason in problems})
    write_table(out / "report.csv", ("file", "status", "reason"), report)
    if counts := Counter(status for _, status, _ in report):
        print(*(f"{counts[key]} {key}," for key in sorted(counts)), f"named in {out / 'report.csv'}", file=sys.stderr)
    if empty := not any(rows.values()):
        print("No slices were written: the input holds no usable image.", file=sys.stderr)
    return int(empty or counts["refused"] > 0)


def read_headers(inputs: list[str], out: Path, workers: int) -> tuple[list[Slice], dict[str, str], list]:
    """(slices, {path: how it is shown}, problems) of all files below the inputs."""
    files, problems = find_files(inputs, out)
    slices = []
    for path, found in zip(files, parallel(examine_in_time, list(files), workers, "Reading headers"), strict=True):
        more, notes = found or ([], [(path, "refused", DIED)])
        slices += more
        problems += notes
    return slices, files, problems


def prepare(inputs: list[str], out: Path, size: int, split: list[str], seed: int, volumes: bool, keep_names: bool,
            workers: int) -> int:
    """The whole of `python -m datasets.prepare`; returns the exit status."""
    slices, shown, problems = read_headers(inputs, out, workers)
    slices = name_patients(slices)
    part_of = split_patients(sorted({one.patient for one in slices}), split, seed)
    series = defaultdict(lambda: defaultdict(list))
    for one in slices:
        series[one.patient][one.series].append(one)
    outputs = []
    for patient, members in sorted(series.items()):
        found = [order_series(group) for _, group in sorted(members.items())]
        problems += [problem for _, notes in found for problem in notes]
        ordered = [kept if volumes else [one] for kept, _ in found for one in (kept[:1] if volumes else kept)]
        if patient not in part_of:
            problems += [(group[0].path, "left out", "is of a patient in no list of --split") for group in ordered]
            continue
        label, digits = pseudonym(patient, "patient", keep_names), max(3, len(str(len(ordered) - 1)))
        outputs += [Output(f"{part_of[patient]}_img", f"{label}_{index:0{digits}d}.npy", label, group)
                    for index, group in enumerate(ordered)]
    options = {"size": size, "split": split, "seed": seed, "volumes": volumes, "keep_names": keep_names}
    return write_all(outputs, out, shown, options, workers, problems, hider(slices, keep_names))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m datasets.prepare", description=__doc__.split("\n\n")[1],
                                     fromfile_prefix_chars="@", epilog="@FILE: arguments from FILE, one a line.")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="a file or a folder of any layout")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the slices go")
    parser.add_argument("--size", type=int, default=256, help="side of a slice in pixels (default: %(default)s)")
    parser.add_argument("--split", nargs="+", default=["0.8", "0.1", "0.1"], metavar="PART",
                        help="fractions of patients for train, val and test (default: 0.8 0.1 0.1), or lists of "
                             "patients' IDs: train=* val=A test=B,C, where * stands for all others")
    parser.add_argument("--seed", type=int, default=0, help="which patients go where with fractions")
    parser.add_argument("--volumes", action="store_true",
                        help="one (N, size, size) array a series, to be memory-mapped, not a file a slice")
    parser.add_argument("--keep-names", action="store_true", help="patients' IDs in file names and tables")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    if not 8 <= args.size <= 4096 or args.workers < 1 or args.out.is_file():
        parser.error("--size must lie between 8 and 4096, --workers be at least 1, and --out be no file")
    return prepare(**vars(args))


if __name__ == "__main__":
    sys.exit(main())
