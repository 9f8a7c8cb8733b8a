"""One series of slices, in order, from a folder or file of any format."""

import csv
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from datasets.dicom import Slice, hider, order_series
from datasets.prepare import name_patients, read_headers


def find_series(path: Path, out: Path, number: int | None = None) -> tuple[list[Slice], list[str], list[tuple]]:
    """(slices from feet to head, how each is called in messages, problems as (name, status, reason)).

    number: which of several series, from 1. Files below `out` are not read. Exits with a sentence where there is no
    series, or several and no number.
    """
    slices, shown, problems = read_headers([str(path)], out, workers=1)
    slices = name_patients(_with_manifest(slices))
    series = defaultdict(list)
    for one in slices:
        series[one.patient, one.series].append(one)
    groups = [group for _, group in sorted(series.items())]
    hide = hider(slices, keep=False)
    if not groups:
        reasons = "; ".join(f"{hide(shown.get(name, name))} {reason}" for name, _, reason in problems[:3])
        sys.exit(f"{path} holds no slices that can be used" + f" ({reasons})." * bool(reasons))
    if number is None and len(groups) > 1 or number is not None and not 1 <= number <= len(groups):
        names = ", ".join(f"{i}: {len(group)} slices of {hide(Path(shown[group[0].path]).parent.as_posix())}"
                          for i, group in enumerate(groups, 1))
        sys.exit(f"{path} holds {len(groups)} series ({names}); choose one by --series.")
    kept, more = order_series(groups[(number or 1) - 1])
    names = [hide(shown[one.path]) + (f", frame {one.frame}" if one.frame else "") for one in kept]
    return kept, names, [(hide(shown.get(name, name)), *rest) for name, *rest in problems + more]


def _with_manifest(slices: list[Slice]) -> list[Slice]:
    """Spacing and position of slices that do not tell, from a manifest.csv that datasets.prepare wrote beside them."""
    told = {}
    for folder in {Path(one.path).parent for one in slices if one.spacing is None}:
        if (folder / "manifest.csv").is_file():
            with open(folder / "manifest.csv", newline="") as file:
                told |= {(str(folder / row["file"]), row["file"], int(row.get("index") or 0)): row
                         for row in csv.DictReader(file)}
    frames = {one.path for one in slices if one.frame}  # the index of a single slice counts its patient's slices

    def fill(one):
        row = told.get((one.path, Path(one.path).name, one.frame if one.path in frames else 0), {})
        numbers = {key: float(row[column]) for key, column in {"spacing": "spacing_mm", "position": "position"}.items()
                   if row.get(column)}
        return replace(one, **numbers)

    return [fill(one) for one in slices]
