"""CT of any layout to HU slices for training: `python -m datasets.prepare INPUT... --out DIR`.

Reads DICOM, NIfTI, .npy (HU) and 16-bit PNG (value - 1024 = HU), in any mixture of folders. Writes int16 HU to
DIR/{train,val,test}_img/<patient>_<nnn>.npy, split by patient, with a manifest.csv in each folder, and DIR/report.csv,
which names every file that was refused, left out or is odd. The same command again does only what is missing.

Names, IDs and birth dates of patients become pseudonyms unless --keep-names, where a path repeats them, too. These
are hashes: they hide a name from a reader, not from someone who has a list of IDs to try. Exit status 1 when
something was refused (the rest is written) or nothing could be done.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path

import numpy as np

from datasets.archive import OWN_SPLITS, group_series, name_patients, read_headers, unsure_patients
from datasets.formats import read_hu
from datasets.plausible import doubt
from datasets.privacy import pseudonym, pseudonymizer
from datasets.series import Problem, Refused, Slice, order_series
from datasets.slices import IF_SO, open_array, read_manifest
from utils.cli import Parser, script
from utils.errors import InputError, RunFolderError, printable
from utils.files import atomic, hash16, sha256, write_table
from utils.run_folder import check, described, lock, sweep
from utils.workers import DIED, parallel, time_limit

SPLITS = ("train", "val", "test")
DEFAULT_SPLIT = ["0.8", "0.1", "0.1"]
LOW_DOSE = re.compile(r"\b(low|quarter|reduced)[ _-]*dose", re.I)
COLUMNS = ("file", "patient", "index", "series", "position", "spacing_mm", "kernel", "source", "sha256")


@dataclass(frozen=True)
class Output:
    """One file to write: OUT/folder/name from slices in order, of the patient of that label."""

    folder: str
    name: str
    patient: str
    slices: list[Slice]
    sha256: str = ""  # by the last manifest, of the file that is there


def split_patients(patients: list[str], split: list[str], seed: int) -> dict[str, str]:
    """{patient: train, val or test}, by three fractions or lists `train=A,B` (`*`: all others). Raises InputError.

    With fractions the order is a hash of (seed, patient), and a part that is wanted gets a patient if there are enough.
    """
    named = dict(item.partition("=")[::2] for item in split)
    if set(named) <= set(SPLITS) and len(named) == len(split):
        part_of = {patient: part for part, names in named.items() for patient in names.split(",")}
        if missing := set(part_of) - {"*", *patients}:
            raise InputError(f"--split names {', '.join(sorted(missing))}, which the input does not hold; nothing was "
                             "written.")
        return {patient: part for patient in patients if (part := part_of.get(patient, part_of.get("*")))}
    shares = [float(item) for item in split if re.fullmatch(r"\d*\.?\d+", item)]
    if not len(shares) == len(split) == 3 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(f"--split is {' '.join(split)}; expected three fractions that add up to 1, or lists like "
                         "train=* val=A test=B,C.")
    wanted = sorted((part for part in range(3) if shares[part]), key=lambda part: -shares[part])[: len(patients)]
    counts = [max(1, round(shares[part] * len(patients))) if part in wanted else 0 for part in range(3)]
    if wanted:
        counts[wanted[0]] += len(patients) - sum(counts)
    order = sorted(patients, key=lambda patient: hash16(f"{seed} {patient}"))
    return dict(zip(order, np.repeat(SPLITS, counts).tolist(), strict=True))


def convert(outputs: list[Output], out: Path, size: int, volumes: bool,
            trust: bool = False) -> list[tuple[list[Slice], str, list[Problem]]]:
    """Write those of the outputs that are missing or not as they were written.

    trust: as `scan`'s. Returns for each (slices it holds, sha256, problems).
    """
    results = []
    for one in outputs:
        target, images, problems = out / one.folder / one.name, {}, []
        digest = _digest(target, (len(one.slices),) * volumes + (size, size))
        whole = digest and one.sha256 in ("", digest)
        if not whole:
            target.unlink(missing_ok=True)
        for source in [] if whole else one.slices:
            try:
                with time_limit():
                    images[source] = read_hu(source, size, trust)
            except Refused as error:
                problems.append((source.path, error.verdict, str(error)))
        kept = one.slices if whole else list(images)
        if images:
            with atomic(target) as temporary, open(temporary, "wb") as file:
                np.save(file, np.stack(list(images.values())) if volumes else images[kept[0]])
            digest = sha256(target)
        if kept and not trust and (found := doubt(np.load(target, mmap_mode="r"))):
            problems.append((kept[0].path, "warning", found[1]))
        results.append((kept, digest if kept else "", problems))
    return results


def _digest(target, shape):
    # SHA-256 of an output; empty where it is not there, or is no array of that shape
    with suppress(Refused):
        array = open_array(target)
        return sha256(target) if (array.shape, array.dtype) == (shape, "i2") else ""
    return ""


def check_resume(out: Path, outputs: list[Output], shown: dict[str, str], options: dict) -> None:
    """Record what OUT will hold, and remove what was made of other contents of the same files.

    Raises RunFolderError where it holds something else.
    """
    plan, record = {}, out / "prepare.json"
    for one in outputs:
        names, contents = [f"{shown[s.path]} {s.frame}" for s in one.slices], [s.content for s in one.slices]
        plan[f"{one.folder}/{one.name}"] = [hash16("\n".join(texts)) for texts in (names, contents)]
    before = {"options": options, "outputs": {}} | (described(out, record.name) or {})
    if not all(isinstance(before[key], dict) for key in ("options", "outputs")):
        raise RunFolderError(f"{record} is damaged; restore it, or choose another --out.")
    check(out, options, "set of slices", before=before["options"])
    there = [f"{path.parent.name}/{path.name}" for part in SPLITS for path in (out / f"{part}_img").glob("*.npy")]
    made_of = {name: found for name, found in before["outputs"].items() if isinstance(found, list)}
    if other := [name for name in there if name not in plan or plan[name][:1] != made_of.get(name, [])[:1]]:
        raise RunFolderError(f"{out} holds {len(other)} file(s) made from other input, such as {min(other)}; choose "
                             "another --out.")
    for name in there:
        if plan[name] != made_of[name]:
            (out / name).unlink()
    with atomic(record) as temporary:
        temporary.write_text(json.dumps({"options": options, "outputs": plan}), "utf-8")


def write_all(outputs: list[Output], out: Path, shown: dict[str, str], options: dict, workers: int,
              problems: list[Problem], hide, trust: bool = False) -> int:
    """Convert what is missing and write manifests and report; the exit status.

    shown: how each path is called; options: size, volumes, keep_names and whatever else makes another output;
    problems: so far; hide: puts pseudonyms into a text; trust: values are HU even where they do not look so.
    """
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if outputs:
        check_resume(out, outputs, shown, options)
    hashes = {(folder, row["file"]): row.get("sha256", "") for folder in {one.folder for one in outputs}
              for row in read_manifest(out / folder)}
    outputs = [replace(one, sha256=hashes.get((one.folder, one.name), "")) for one in outputs]
    uids = dict.fromkeys(s.series for one in outputs for s in one.slices)
    series = {uid: pseudonym(uid, "series", True) if options["keep_names"] else f"series-{number}"
              for number, uid in enumerate(uids, 1)}
    rows = defaultdict(list)
    for one, (kept, digest, found) in _convert_all(outputs, out, options["size"], options["volumes"], trust, workers):
        problems += found
        rows[one.folder] += [
            (one.name, one.patient, index, series[s.series],
             "" if s.position is None else round(s.position, 4),
             "" if s.spacing is None else round(s.spacing * s.size / options["size"], 6),
             hide(s.kernel), hide(shown[s.path]), digest) for index, s in enumerate(kept)]
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


def _convert_all(outputs, out, size, volumes, trust, workers):
    # Yields (output, what `convert` says of it). One file's slices go together: it is decoded once.
    groups = defaultdict(list)
    for one in outputs:
        (out / one.folder).mkdir(exist_ok=True)
        groups[one.name if volumes else one.slices[0].path].append(one)
    chunk = 8 * len(groups) // max(1, len(outputs))  # a group of many slices goes alone
    made = parallel(partial(convert, out=out, size=size, volumes=volumes, trust=trust), list(groups.values()), workers,
                    "Writing slices", chunk)
    for group, results in zip(groups.values(), made, strict=True):
        died = [([], "", [(one.slices[0].path, "refused", DIED)]) for one in group]
        yield from zip(group, results or died, strict=True)


def plan_outputs(slices: list[Slice], part_of: dict[str, str], volumes: bool,
                 keep_names: bool) -> tuple[list[Output], list[Problem]]:
    """(files to write, problems): a file a slice, or a series with `volumes`, numbered within each patient.

    part_of: {patient: train, val or test}; a patient without a part is left out.
    """
    outputs, problems = [], []
    for patient, groups in groupby(group_series(slices), key=lambda group: group[0].patient):
        series, notes = zip(*map(order_series, groups), strict=True)
        problems += chain(*notes)
        ordered = series if volumes else [[one] for one in chain(*series)]
        if patient not in part_of:
            problems += [(group[0].path, "left out", "is of a patient in no list of --split") for group in ordered]
            continue
        label, digits = pseudonym(patient, "patient", keep_names), max(3, len(str(len(ordered) - 1)))
        outputs += [Output(f"{part_of[patient]}_img", f"{label}_{index:0{digits}d}.npy", label, group)
                    for index, group in enumerate(ordered)]
    return outputs, problems


def own_split(slices: list[Slice], shown: dict[str, str]) -> dict[str, str]:
    """{patient: part} where each file lies below one of several folders train, val and test; else empty.

    Raises InputError for a patient who lies in two of them.
    """
    parts = defaultdict(set)
    for one in slices:
        parts[one.patient] |= {OWN_SPLITS.get(folder.lower().removesuffix("_img")) for folder in
                               Path(shown[one.path]).parent.parts} - {None} or {None}
    if None in (found := set().union(*parts.values())) or len(found) < 2:
        return {}
    if both := [patient for patient, found in parts.items() if len(found) > 1]:
        raise InputError(f"{len(both)} patient(s) are in several of the input's folders train, val and test; split by "
                         "patient anew, such as by --split 0.8 0.1 0.1.")
    return {patient: found.pop() for patient, found in parts.items()}


def prepare(inputs: list[str], out: Path, size: int, split: list[str] | None, seed: int, volumes: bool,
            keep_names: bool, workers: int, trust_hu: bool = False, patients_from: str | None = None,
            only: list[str] | None = None, derived: bool = False) -> int:
    """The whole of `python -m datasets.prepare`; returns the exit status."""
    slices, shown, problems, hidden = read_headers(inputs, out, workers, derived, trust_hu)
    slices, more = choose_series(slices, only)
    slices = name_patients(slices, patients_from)
    part_of = {} if split else own_split(slices, shown)
    if part_of:
        print("The input's own folders train, val and test are the split; --split makes another.")
    chosen = ["own"] if part_of else split or DEFAULT_SPLIT
    part_of = part_of or split_patients(sorted({one.patient for one in slices}), chosen, seed)
    hide = pseudonymizer(slices + hidden, keep_names)
    if patients_from is None and (text := unsure_patients(slices, hide)):
        if sum(part.strip("0.") != "" for part in chosen if "=" not in part and part != "own") > 1:
            raise InputError(text + IF_SO)
        print(f"Warning: {printable(text)}", file=sys.stderr)
    outputs, notes = plan_outputs(slices, part_of, volumes, keep_names)
    options = {"size": size, "split": chosen, "seed": seed, "volumes": volumes, "keep_names": keep_names}
    options |= {"patients_from": patients_from} if patients_from else {}
    return write_all(outputs, out, shown, options, workers, problems + more + notes, hide, trust_hu)


def choose_series(slices: list[Slice], only: list[str] | None) -> tuple[list[Slice], list[Problem]]:
    """(slices whose series description or kernel holds one of the texts, whatever its case; problems)."""
    if only:
        texts = [text.casefold() for text in only]
        kept = [one for one in slices if any(text in f"{one.description}\n{one.kernel}".casefold() for text in texts)]
        return kept, [(one.path, "left out", "is of a series that --only does not name") for one in
                      sorted(set(slices) - set(kept), key=attrgetter("path"))]
    low = {one.series: one.path for one in reversed(slices) if LOW_DOSE.search(one.description)}
    return slices, [(path, "warning", "is of a series of lower dose, by its description: its noise would be taken for "
                     "truth; choose series by --only") for path in low.values()]


def parse_and_check(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Add --out, --size and --workers, which preprocess_aapm has too, parse and check them."""
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the slices go")
    parser.add_argument("--size", type=int, default=256, help="side of a slice in pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="processes, at most 64 (default: one a core)")
    args = parser.parse_args(argv)
    parser.at_least(args, {"workers": 1})
    if not 8 <= args.size <= 4096:
        parser.error(f"--size {args.size}: expected 8 to 4096")
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file; expected a folder")
    return args


@script
def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m datasets.prepare", (__doc__ or "\n\n").split("\n\n")[1], fromfile_prefix_chars="@",
                    epilog="@FILE: arguments from FILE, one a line.")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="a file or a folder of any layout")
    parser.add_argument("--split", nargs="+", metavar="PART",
                        help="fractions of patients for train, val and test (default: the input's own folders of these "
                             "names, else 0.8 0.1 0.1), or lists of patients' IDs: train=* val=A test=B,C, where * "
                             "stands for all others")
    parser.add_argument("--patients-from", choices=("name", "folder", "manifest"),
                        help="what tells the patient: the file (its header, else its name), the first folder below the "
                             "input that differs, or manifest.csv (default: the header, a manifest.csv, the name or "
                             "the folder, and a sentence where these cannot be right)")
    parser.add_argument("--only", nargs="+", metavar="TEXT",
                        help="series of DICOM with this text in their description or kernel (default: all)")
    parser.add_argument("--trust-hu", action="store_true",
                        help="values are HU even where they do not look so: label maps, [0, 1], HU + 1024")
    parser.add_argument("--seed", type=int, default=0, help="which patients go where with fractions")
    parser.add_argument("--volumes", action="store_true",
                        help="one (N, size, size) array a series, to be memory-mapped (default: a file a slice)")
    parser.add_argument("--keep-names", action="store_true",
                        help="patients' IDs in file names and tables (default: pseudonyms)")
    parser.add_argument("--derived", action="store_true",
                        help="DERIVED and SECONDARY images of DICOM too: reformatted, or made by a program (default: "
                             "left out)")
    args = parse_and_check(parser, argv)
    if missing := [path for path in args.inputs if not os.path.exists(path)]:
        parser.error(f"{missing[0]} does not exist")
    lock(args.out)
    return prepare(**vars(args))


if __name__ == "__main__":
    sys.exit(main())
