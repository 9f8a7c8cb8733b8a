"""Folders and files of any layout: which files there are, which slices they hold, whose these are."""

import faulthandler
import multiprocessing
import os
import re
import signal
import stat
import tempfile
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from datasets.formats import scan
from datasets.privacy import pseudonymizer
from datasets.series import LeftOut, Problem, Refused, Slice, order_series
from datasets.slices import patient_of, patients_of, read_manifest
from utils.errors import InputError
from utils.progress import Progress

LIMIT = 300  # seconds a file: a decoder that takes longer hangs
DIED = "crashed its reader, or kept it busy for over five minutes"
MOST_WORKERS = 64  # each takes eight open files, and many systems allow 1024
COMPANIONS = {"LICENSE", "NOTICE", "README.md", "metadata.csv", "index.csv", "manifest.csv", "report.csv", ".DS_Store"}


@contextmanager
def time_limit(seconds: float = LIMIT):
    """Ends this process where the block takes longer: nothing gentler stops a decoder that hangs in compiled code."""
    with open(os.devnull, "wb") as silent:  # takes the traceback that comes with it
        faulthandler.dump_traceback_later(seconds, exit=True, file=silent)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def parallel(function, tasks: list, workers: int, title: str, chunk: int = 8) -> list:
    """[function(task) for task in tasks] over processes; None for a task whose process died: decoders can crash.

    function: of a module, and it sets its own time limit. What it raises is raised here. A process gets up to `chunk`
    tasks at a time, as a message costs about as much as reading a header. Where it dies, they are tried one by one.
    """
    workers = min(workers, MOST_WORKERS)
    chunk = max(1, min(chunk, len(tasks) // (4 * workers)))
    spawn = os.name == "nt" or len(tempfile.gettempdir()) > 70  # a socket there may have a name of 107 characters
    context = multiprocessing.get_context("spawn" if spawn else "forkserver")
    context.set_forkserver_preload(["datasets.archive", "utils.cli"])  # a process starts in milliseconds
    own = threading.local()  # a process a thread: it is clear whose tasks killed it, and the other processes go on

    def run(part):
        try:
            if not hasattr(own, "process"):
                own.process = processes.enter_context(ProcessPoolExecutor(1, context, initializer=_begin))
            return list(own.process.map(function, part, chunksize=len(part)))
        except BrokenProcessPool:
            own.process.shutdown()
            del own.process
            return [None] if len(part) == 1 else [answer for task in part for answer in run([task])]

    results, parts = [], [tasks[k : k + chunk] for k in range(0, len(tasks), chunk)]
    with ExitStack() as processes, ThreadPoolExecutor(workers) as threads:
        bar = processes.enter_context(Progress(total=len(tasks), desc=title, unit="file"))
        for answers in threads.map(run, parts):
            results += answers
            bar.update(len(answers))
    return results


def _begin():
    # Ctrl-C reaches all processes: the parent waits until the others have done what they are at. A parent that is
    # killed cannot tell them to end, so they watch it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@time_limit()
def examine(path: str) -> tuple[list[Slice], list[Problem]]:
    """The slices of a file, and what is wrong with it."""
    try:
        slices = scan(path)
    except Refused as error:
        verdict = LeftOut.verdict if os.path.basename(path) in COMPANIONS else error.verdict
        return [], [(path, verdict, str(error))]
    return slices, [(path, "warning", slices[0].warning)] if slices[0].warning else []


def find_files(inputs: list[str], out: Path) -> tuple[dict[str, str], list[Problem]]:
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


def read_headers(inputs: list[str], out: Path, workers: int) -> tuple[list[Slice], dict[str, str], list[Problem]]:
    """(slices, {path: how it is shown}, problems) of all files below the inputs."""
    files, problems = find_files(inputs, out)
    slices = []
    for path, found in zip(files, parallel(examine, list(files), workers, "Reading headers"), strict=True):
        more, notes = found or ([], [(path, "refused", DIED)])
        slices += more
        problems += notes
    return slices, files, problems


def name_patients(slices: list[Slice]) -> list[Slice]:
    """Fill in the patient of slices from files that do not say: from a manifest.csv beside them, or from the name.

    A volume is a patient of its own, a slice `case_012` belongs to `case`; where names are bare numbers or the same
    in several folders, the folder is the patient.
    """
    paths = [Path(path) for path in sorted({one.path for one in slices if not one.patient})]
    volumes = {Path(one.path) for one in slices if one.frame}
    patients = dict(zip(paths, patients_of(paths), strict=True))
    unnamed = {path for path in paths if patients[path] == patient_of(path.name)}  # by a manifest
    for path in volumes & unnamed:
        patients[path] = re.sub(r"\.nii$", "", path.stem, flags=re.I)
    used = Counter((patients[path], path.name) for path in paths)
    shared = {patient for (patient, _), count in used.items() if count > 1}
    for path in unnamed:
        if patients[path].isdigit() or patients[path] in shared:
            patients[path] = Path(os.path.abspath(path)).parent.name

    def fill(one):
        patient = patients[Path(one.path)]
        return replace(one, patient=patient, names=(patient,) * (len(patient) >= 4),
                       series=one.path if Path(one.path) in volumes else os.path.dirname(one.path))

    return [one if one.patient else fill(one) for one in slices]


def group_series(slices: list[Slice]) -> list[list[Slice]]:
    """The slices of each series, sorted by patient and series."""
    key = attrgetter("patient", "series")
    return [list(group) for _, group in groupby(sorted(slices, key=key), key)]


def find_series(path: Path, out: Path, number: int | None = None) -> tuple[list[Slice], list[str], list[Problem]]:
    """(slices from feet to head, how each is called in messages, problems, with these names) of one series.

    number: which of several, from 1. Files below `out` are not read. Raises InputError where no series is chosen.
    """
    slices, shown, problems = read_headers([str(path)], out, workers=1)
    slices = name_patients(_with_manifest(slices))
    groups, hide = group_series(slices), pseudonymizer(slices, keep=False)
    if not groups:
        reasons = "; ".join(f"{hide(shown.get(name, name))} {reason}" for name, _, reason in problems[:3])
        raise InputError(f"{path} holds no slices that can be used" + f" ({reasons})" * bool(reasons) + ".")
    if number is None and len(groups) > 1 or number is not None and not 1 <= number <= len(groups):
        names = ", ".join(f"{i}: {len(group)} slices of {hide(Path(shown[group[0].path]).parent.as_posix())}"
                          for i, group in enumerate(groups, 1))
        raise InputError(f"{path} holds {len(groups)} series ({names}); choose one by --series.")
    kept, more = order_series(groups[(number or 1) - 1])
    names = [hide(shown[one.path]) + (f", frame {one.frame}" if one.frame else "") for one in kept]
    return kept, names, [(hide(shown.get(name, name)), *rest) for name, *rest in problems + more]


def _with_manifest(slices: list[Slice]) -> list[Slice]:
    """Spacing and position of slices that do not tell, from a manifest.csv that datasets.prepare wrote beside them."""
    folders = {Path(one.path).parent for one in slices if one.spacing is None}
    told = {(folder / row["file"], int(row.get("index") or 0)): row
            for folder in folders for row in read_manifest(folder)}

    def fill(one):
        row = told.get((Path(one.path), one.frame), {})
        spacing, position = (float(row[key]) if row.get(key) else None for key in ("spacing_mm", "position"))
        return replace(one, spacing=spacing, position=position)

    return [fill(one) if one.spacing is None else one for one in slices]
