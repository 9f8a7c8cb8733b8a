"""AAPM 2016 Low Dose CT data to HU slices as published: `python -m datasets.preprocess_aapm AAPM --out DIR`.

AAPM/L067/full_1mm/*.IMA becomes DIR/{train,val,test}_img/*.npy: 512 to 256 by a 2x2 mean, int16 HU, each slice named
after its DICOM file. Patients' folder names (L067, ...) are public pseudonyms and are kept. Two splits:

  patient          L506 tests, L333 validates (most of what validates as published is of L333), the others train
  aapm-published   L506 tests; of all other slices, sorted by patient and file name, the first 90 % train and the
                   rest validates: 4,869 / 541, where 69 slices of L333 train and 541 validate

Anything else (other layouts, other splits, NIfTI) is for `python -m datasets.prepare`.
"""

import os
import sys

if not __package__:  # run as a file: imports start at the repository, not in this folder, where inspect.py would shadow
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from datasets.dicom import Slice, order_series
from datasets.prepare import Output, read_headers, write_all

TEST, VALIDATION = "L506", "L333"


def split_slices(slices: list[Slice], split: str) -> list[tuple[str, Slice]]:
    """(train, val or test) of each slice, sorted by patient and file name; split: patient or aapm-published."""
    ordered = sorted(slices, key=lambda one: (one.patient, Path(one.path).name))
    others = [one for one in ordered if one.patient != TEST]
    if split == "aapm-published":
        cut = int(0.9 * len(others))
        parts = ["train"] * cut + ["val"] * (len(others) - cut)
    else:
        parts = ["val" if one.patient == VALIDATION else "train" for one in others]
    return [*zip(parts, others, strict=True), *(("test", one) for one in ordered if one.patient == TEST)]


def preprocess(root: Path, out: Path, split: str, size: int, workers: int) -> int:
    """The whole of `python -m datasets.preprocess_aapm`; returns the exit status, 1 when a file was refused."""
    folders = sorted(folder for folder in root.glob("L[0-9][0-9][0-9]/full_1mm") if folder.is_dir())
    if not folders:
        sys.exit(f"{root} holds no L067/full_1mm or the like; expected one folder a patient holding a folder full_1mm "
                 "with .IMA files. For other layouts use python -m datasets.prepare.")
    slices, shown, problems = read_headers([str(folder) for folder in folders], out, workers)
    shown = {path: os.path.relpath(path, root) for path in shown}
    series = defaultdict(list)
    for one in slices:  # the folder is the patient, whatever the file says
        patient = Path(shown[one.path]).parts[0]
        series[patient, one.series].append(replace(one, patient=patient))
    kept = []
    for _, group in sorted(series.items()):
        ordered, notes = order_series(group)
        kept += ordered
        problems += notes
    outputs = {}
    for part, one in split_slices(kept, split):
        stem = re.sub(r"\.(ima|dcm)$", "", Path(one.path).name, flags=re.I)
        stem = stem if stem.startswith(f"{one.patient}_") else f"{one.patient}_{stem}"
        if stem in outputs:
            problems.append((one.path, "refused", "has the name of another slice, and slices are named after files"))
        else:
            outputs[stem] = Output(f"{part}_img", f"{stem}.npy", one.patient, [one])
    options = {"size": size, "split": split, "volumes": False, "keep_names": True}
    return write_all(list(outputs.values()), out, shown, options, workers, problems, hide=str)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m datasets.preprocess_aapm", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="AAPM", type=Path, help="folder that holds L067/full_1mm and the like")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the slices go")
    parser.add_argument("--split", choices=("patient", "aapm-published"), default="patient")
    parser.add_argument("--size", type=int, default=256, help="side of a slice in pixels (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    if not 8 <= args.size <= 4096 or args.workers < 1 or args.out.is_file():
        parser.error("--size must lie between 8 and 4096, --workers be at least 1, and --out be no file")
    return preprocess(**vars(args))


if __name__ == "__main__":
    sys.exit(main())
