"""The results folder of test.py: rows as they come, then whole tables. A second run finds what the first one did.

Every process appends to a part file of its own, part-RANK.csv; `open_results` merges parts into results.csv.
"""

import csv
import json
import sys
from pathlib import Path

from utils.files import atomic

COLUMNS = ("file", "patient", "method", "views", "width", "centre", "psnr", "ssim", "rmse_hu", "vif", "nfe",
           "seconds_per_slice", "peak_gib")


def open_results(out: Path, run: dict) -> dict[tuple, list[dict]]:
    """Rows already in the folder `out`, one a window of `run`, by (file, method, views).

    run: the configuration, JSON values. Exits with a sentence where the folder holds something else.
    """
    described = out / "run.json"
    run = json.loads(json.dumps(run))
    if out.is_dir() and any(out.iterdir()):
        if not described.is_file():
            sys.exit(f"{out} is not empty and holds no results of test.py; give --out a new or empty folder.")
        before = json.loads(described.read_text())
        if before != run:
            wrong = ", ".join(k for k in {**run, **before} if before.get(k) != run.get(k))
            sys.exit(f"{out} holds results of another {wrong}; give --out a new folder, or the same options to resume.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic(described) as partial:
        partial.write_text(json.dumps(run, indent=1))
    done, parts = {}, sorted(out.glob("part-*.csv"))
    for table in (out / "results.csv", *parts):
        if table.is_file():
            found = {}
            with open(table, newline="") as file:
                for row in csv.DictReader(file, COLUMNS):
                    if row["file"] != "file" and row["peak_gib"]:  # a killed run may leave half a line
                        found.setdefault((row["file"], row["method"], int(row["views"])), []).append(row)
            done.update({key: rows for key, rows in found.items() if len(rows) == len(run["windows"])})
    if parts:
        write_csv(out / "results.csv", [row for rows in done.values() for row in rows])
        for part in parts:
            part.unlink()
    return done


def append(out: Path, rank: int, rows: list[dict]) -> None:
    """Add rows to the part file of a process."""
    with open(out / f"part-{rank}.csv", "a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerows(rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    with atomic(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def table(summary: list[dict], notes: list[str]) -> str:
    """Markdown: a table a window of means over slices, PSNR with its 95 % interval by slice, and notes below."""
    lines = []
    for window in dict.fromkeys(tuple(row["window"]) for row in summary):
        lines += [f"W{window[0]}/L{window[1]}", "",
                  "| views | method | PSNR dB [95 %] | SSIM x100 | RMSE HU | VIF x100 | calls | s/slice |",
                  "|" + "---|" * 8]
        for r in summary:
            if tuple(r["window"]) == window:
                ci = r["psnr_ci_slices"]
                lines.append(
                    f"| {r['views']} | {r['method']} | {r['psnr']:.2f}" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")
                    + f" | {100 * r['ssim']:.2f} | {r['rmse_hu']:.1f} | "
                    + ("-" if r["vif"] is None else f"{100 * r['vif']:.2f}")
                    + f" | {r['nfe']:.1f} | {r['seconds_per_slice']:.2f} |")
        lines.append("")
    return "\n".join(lines + notes)
