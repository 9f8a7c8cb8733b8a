"""The results folder of test.py: rows as they come, then whole tables. A second run finds what the first one did.

Every process appends to a part file of its own, part-RANK.csv; `open_results` merges parts into results.csv.
"""

import csv
from itertools import groupby
from pathlib import Path

from utils.files import write_table, writing
from utils.metrics import METRICS
from utils.run_folder import claim

COLUMNS = ("file", "patient", "method", "views", "width", "centre", *METRICS, "nfe", "seconds_per_slice", "peak_gib")


def open_results(out: Path, run: dict) -> dict[tuple, list[dict]]:
    """Rows already in the folder `out`, one a window of `run`, by (file, method, views).

    run: the configuration, JSON values. Raises RunFolderError where the folder holds something else.
    """
    claim(out, run, "run of test.py")
    done, parts = {}, sorted(out.glob("part-*.csv"))
    for path in filter(Path.is_file, (out / "results.csv", *parts)):
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file, COLUMNS) if row["file"] != "file" and row["peak_gib"]]
        for key, group in groupby(rows, lambda row: (row["file"], row["method"], int(row["views"]))):
            if len(windows := list(group)) == len(run["windows"]):  # a killed run may leave some, or half a line
                done[key] = windows
    if parts:
        write_rows(out / "results.csv", [row for rows in done.values() for row in rows])
        for part in parts:
            part.unlink()
    return done


def append(out: Path, rank: int, rows: list[dict]) -> None:
    """Add rows to the part file of a process."""
    with writing(out), open(out / f"part-{rank}.csv", "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writerows(rows)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a CSV file of rows that share their keys."""
    write_table(path, rows[0] if rows else COLUMNS, (row.values() for row in rows))


def table(summary: list[dict], notes: list[str]) -> str:
    """Markdown: a table a window of means over slices, PSNR with its 95 % interval by slice, and notes below."""
    lines, columns = [], ["views", "method", *(f"{m.label} {m.unit}" for m in METRICS.values()), "calls", "s/slice"]
    columns[2] += " [95 %]"
    for width, centre in dict.fromkeys(tuple(row["window"]) for row in summary):
        lines += [f"W{width}/L{centre}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in (row for row in summary if tuple(row["window"]) == (width, centre)):
            cells = ["-" if row[k] is None else f"{m.scale * row[k]:.{m.digits}f}" for k, m in METRICS.items()]
            if interval := row["psnr_ci_slices"]:
                cells[0] += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
            cells = [f"{row['views']}", row["method"], *cells, f"{row['nfe']:.1f}", f"{row['seconds_per_slice']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines + notes)
