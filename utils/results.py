"""The results folder of test.py: rows as they come, then whole tables. A second run finds what the first one did.

Every process appends to a part file of its own, part-RANK.csv; `open_results` merges parts into results.csv.
"""

import csv
import json
import sys
import zlib
from itertools import groupby
from pathlib import Path

import numpy as np

from utils.errors import RunFolderError
from utils.files import as_cells, from_cells, write_table, writing
from utils.metrics import METRICS
from utils.run_folder import claim, described

COLUMNS = ("file", "patient", "method", "views", "width", "centre", *METRICS, "nfe", "held_out", "seconds_per_slice",
           "peak_gib", "check")


def check_of(row: dict) -> str:
    """Eight hexadecimal digits of a row's other columns: the row is as it was written if they agree."""
    return f"{zlib.crc32(repr([str(row.get(name, '')) for name in COLUMNS[:-1]]).encode()):08x}"


def open_results(out: Path, run: dict) -> tuple[dict, dict[tuple, list[dict]]]:
    """(what run.json says now, rows already in the folder `out`, one a window, by (file, method, views)).

    run: the configuration, JSON values. Its methods and view counts join those of the folder. Raises RunFolderError
    where the folder holds something else.
    """
    run = json.loads(json.dumps(run))
    known = described(out)
    before = known or run
    try:
        methods = list(dict.fromkeys(before["methods"] + run["methods"]))
        views = sorted({*before["views"], *run["views"]})
        run, before = (_joined(one, other, methods, views) for one, other in ((run, before), (before, run)))
    except (KeyError, TypeError):
        raise RunFolderError(f"{out} holds no run of test.py that can be read; give --out a new folder.") from None
    run = claim(out, run, "run of test.py", before=known and before)
    done, parts = {}, sorted(out.glob("part-*.csv"))
    for path in filter(Path.is_file, (out / "results.csv", *parts)):
        for key, group in groupby(whole_rows(path), lambda row: (row["file"], row["method"], int(row["views"]))):
            if len(windows := list(group)) == len(run["windows"]):  # a killed run may leave some, or half a line
                done[key] = windows
    if parts:
        write_rows(out / "results.csv", [row for rows in done.values() for row in rows])
        for part in parts:
            part.unlink()
    return run, done


def _joined(one: dict, other: dict, methods: list[str], views: list[int]) -> dict:
    """A configuration with those levels and options of methods that only the other has."""
    levels = {**other["levels"], **one["levels"]}
    return {**{k: other[k] for k in methods if k in other}, **one, "methods": methods, "views": views, "levels": levels}


def whole_rows(path: Path) -> list[dict]:
    """The rows of a file that are as they were written. The others are counted, and their slices done again."""
    found, damaged = [], 0
    *lines, _ = path.read_bytes().decode("utf-8", errors="replace").split("\n")  # the last: nothing, or half a line
    for line in lines:
        try:
            row = dict(zip(COLUMNS, from_cells(next(csv.reader([line]), [])), strict=True))
            if row["check"] != check_of(row):
                raise ValueError
            found.append(row)
        except (ValueError, csv.Error):
            damaged += line.strip() != ",".join(COLUMNS)
    if damaged:
        print(f"{path}: {damaged} rows are damaged, or of an older version; their slices are done again.",
              file=sys.stderr)
    return found


def append(out: Path, rank: int, rows: list[dict]) -> None:
    """Add rows to the part file of a process."""
    with writing(out), open(out / f"part-{rank}.csv", "a", newline="", encoding="utf-8") as file:
        rows = ({**row, "check": check_of(row)} for row in rows)
        csv.writer(file).writerows(as_cells(row.get(name, "") for name in COLUMNS) for row in rows)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a CSV file of rows that share their keys."""
    write_table(path, rows[0] if rows else COLUMNS, (row.values() for row in rows))


def table(summary: list[dict], notes: list[str]) -> str:
    """Markdown: a table a window of means over slices, PSNR with its 95 % interval, one by patient, and notes below.

    The interval is over patients where there are several, else over slices.
    """
    several = summary[0]["patients"] > 1
    interval, of = ("psnr_ci_patients", " over patients") if several else ("psnr_ci_slices", "")
    lines, columns = [], ["views", "method", *(f"{m.label} {m.unit}" for m in METRICS.values()), "calls", "s/slice"]
    columns[2] += f" [95 %{of}]" if any(row.get(interval) for row in summary) else ""
    for width, centre in dict.fromkeys(tuple(row["window"]) for row in summary):
        lines += [f"W{width}/L{centre}", "", *_markdown(columns)]
        for row in (row for row in summary if tuple(row["window"]) == (width, centre)):
            cells = ["-" if row[k] is None else f"{m.scale * row[k]:.{m.digits}f}" for k, m in METRICS.items()]
            if ends := row.get(interval):
                cells[0] += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
            cells = [f"{row['views']}", row["method"], *cells, f"{row['nfe']:.1f}", f"{row['seconds_per_slice']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines + (by_patient(summary) if several else []) + notes)


def by_patient(summary: list[dict]) -> list[str]:
    """Markdown: mean PSNR of each patient in the first window; of many the lowest, the median and the highest."""
    rows = [row for row in summary if row["window"] == summary[0]["window"]]
    names, few = list(rows[0]["psnr_patients"]), len(rows[0]["psnr_patients"]) <= 8
    shown = [name.replace("|", "/") for name in names] if few else ["lowest patient", "median", "highest"]
    lines = ["PSNR dB by patient, W{}/L{}".format(*rows[0]["window"]), "", *_markdown(["views", "method", *shown])]
    for row in rows:
        values = [np.nan if value is None else value for value in row["psnr_patients"].values()]
        values = values if few else np.nanquantile(values, [0, 0.5, 1])
        lines.append(f"| {row['views']} | {row['method']} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return [*lines, ""]


def _markdown(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
