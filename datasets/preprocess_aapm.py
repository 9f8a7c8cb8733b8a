"""AAPM 2016 Low Dose CT data to HU slices as published: `python -m datasets.preprocess_aapm AAPM --out DIR`.

AAPM/L067/full_1mm/*.IMA, or TCIA's AAPM/L067/*/*Full Dose Images*/*.dcm, becomes DIR/{train,val,test}_img/*.npy: 512 to
256 by a 2x2 mean, int16 HU, each slice named after its DICOM file. Patients' folder names (L067, ...) are public
pseudonyms and are kept. Two splits:

  patient          L506 tests, L333 validates (most of what validates as published is of L333), the others train
  aapm-published   L506 tests; of all other slices, sorted by patient and file name, the first 90 % train and the
                   rest validates: 4,869 / 541, where 69 slices of L333 train and 541 validate

Anything else (other layouts, other splits, NIfTI) is for `python -m datasets.prepare`.
"""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from datasets.archive import group_series, read_headers
from datasets.prepare import Output, parse_and_check, write_all
from datasets.series import Slice, order_series
from utils.cli import Parser, script
from utils.errors import InputError
from utils.run_folder import lock

TEST, VALIDATION = "L506", "L333"
LAYOUTS = ("full_1mm", "*/*Full Dose Images*")  # of the challenge, of TCIA


def split_slices(slices: list[Slice], split: str) -> list[tuple[str, Slice]]:
    """(train, val or test) of each slice, sorted by patient and file name; split: patient or aapm-published."""
    ordered = sorted(slices, key=lambda one: (one.patient, Path(one.path).name))
    others = [one for one in ordered if one.patient != TEST]
    cut = int(0.9 * len(others))
    validates = [i >= cut if split == "aapm-published" else one.patient == VALIDATION for i, one in enumerate(others)]
    return [*(("val" if held else "train", one) for held, one in zip(validates, others, strict=True)),
            *(("test", one) for one in ordered if one.patient == TEST)]


def preprocess(root: Path, out: Path, split: str, size: int, workers: int) -> int:
    """The whole of `python -m datasets.preprocess_aapm`; returns the exit status."""
    folders = sorted(folder for layout in LAYOUTS for folder in root.glob(f"L[0-9][0-9][0-9]/{layout}")
                     if folder.is_dir())
    if not folders:
        raise InputError(f"{root} holds no L067/{' or L067/'.join(LAYOUTS)} or the like; expected one folder a patient "
                         "holding such a folder of DICOM files. For other layouts use python -m datasets.prepare.")
    slices, shown, problems, _ = read_headers([str(folder) for folder in folders], out, workers)
    shown = {path: os.path.relpath(path, root) for path in shown}
    # The folder is the patient, whatever the file says.
    slices = [replace(one, patient=Path(shown[one.path]).parts[0]) for one in slices]
    found = [order_series(group) for group in group_series(slices)]
    problems += [problem for _, notes in found for problem in notes]
    outputs = {}
    for part, one in split_slices([one for ordered, _ in found for one in ordered], split):
        stem = re.sub(r"\.(ima|dcm)$", "", Path(one.path).name, flags=re.I)
        stem = stem if stem.startswith(f"{one.patient}_") else f"{one.patient}_{stem}"
        if stem in outputs:
            problems.append((one.path, "refused", "has the name of another slice, and slices are named after files"))
        else:
            outputs[stem] = Output(f"{part}_img", f"{stem}.npy", one.patient, [one])
    options = {"size": size, "split": split, "volumes": False, "keep_names": True}
    return write_all(list(outputs.values()), out, shown, options, workers, problems, hide=str)


@script
def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m datasets.preprocess_aapm", __doc__)
    parser.add_argument("root", metavar="AAPM", type=Path, help="folder that holds L067/full_1mm and the like")
    parser.add_argument("--split", choices=("patient", "aapm-published"), default="patient", help="which of the two")
    args = parse_and_check(parser, argv)
    lock(args.out)
    return preprocess(**vars(args))


if __name__ == "__main__":
    sys.exit(main())
