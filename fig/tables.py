"""Write every table of results in README.md and docs/ from docs/results/*.json: `python -m fig.tables`.

A table stands between two marks. What lies between them is written by this script, never by hand:

    <!-- table: sample -->
    <!-- end of table -->

A file of results holds rows like those of test.py's summary.json, and says by which command, at which commit, when and
on which machine they were measured (docs/formats.md). With --check nothing is written: each table that differs from
its file is named, and the exit status is 1.
"""

import json
import math
import re
from functools import partial
from pathlib import Path
from textwrap import wrap

import numpy as np

from utils.cli import Parser, script
from utils.errors import InputError
from utils.files import atomic

TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
MARK = re.compile(r"<!-- (?:table: |end of table)")
FIELDS = ("title", "command", "commit", "date", "machine", "weights", "slices", "notes", "rows")
PUBLISHED_COUNTS = (18, 36, 54, 72, 126, 180)  # measured counts between which `any_views` interpolates


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    head, *body = ("|" + "|".join(f" {text} " if text else " " for text in cells) + "|" for cells in (header, *rows))
    return [head, "|" + "---|" * len(header), *body]


def grouped(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """{values of these names: rows that have them}, in the order in which they come."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(_plain(row.get(name)) for name in names), []).append(row)
    return groups


def unique(rows: list[dict], *names: str) -> dict[tuple, dict]:
    """{values of these names: the row that has them}. Raises ValueError where two rows have the same."""
    groups = grouped(rows, *names)
    for values, found in groups.items():
        if len(found) > 1:
            raise ValueError(f"two rows for {', '.join(map(str, values))}")
    return {values: row for values, (row,) in groups.items()}


def _plain(value):
    """A value that a dictionary takes as a key."""
    return tuple(value) if isinstance(value, list) else value


def column(rows: list[dict], name: str) -> list:
    """The different values of a name, in the order in which they come."""
    return list(dict.fromkeys(_plain(row.get(name)) for row in rows))


def headline(rows: list[dict]) -> list[dict]:
    """The rows of the first row's window."""
    return [row for row in rows if row.get("window") == rows[0].get("window")]


def numbers(values: list[float | None], form: str = ".2f") -> str:
    """`1.00 / 2.00 / 3.00`; one that is missing is a dash."""
    return " / ".join("-" if value is None else format(value, form) for value in values)


def at_views(rows: list[dict], views: list[int], name: str = "psnr") -> list[float | None]:
    """One number for each view count, None where no row has it."""
    found = unique(rows, "views")
    return [found[n,][name] if (n,) in found else None for n in views]


def cell(value: float | int | str | None, form: str = ".2f") -> str:
    """A number, text or nothing. form: of numbers that are not whole."""
    return "" if value is None else format(value, form) if isinstance(value, float) else str(value)


def summary(rows: list[dict]) -> list[str]:
    """Rows of test.py: a line for each view count and method."""
    return markdown(
        ["views", "method", "PSNR dB", "SSIM x100", "RMSE HU", "VIF x100", "calls", "s/slice"],
        [[str(r["views"]), r["method"], f"{r['psnr']:.2f}", f"{100 * r['ssim']:.2f}", f"{r['rmse_hu']:.1f}",
          "-" if r["vif"] is None else f"{100 * r['vif']:.2f}", f"{r['nfe']:.1f}", f"{r['seconds_per_slice']:.2f}"]
         for r in headline(rows)])


def consistency(rows: list[dict]) -> list[str]:
    """A line for each method and its options: iterations, PSNR at each view count, calls."""
    rows, lines = headline(rows), []
    views = column(rows, "views")
    for (method, levels, budget, dc), group in grouped(rows, "method", "levels", "semantic_budget", "dc").items():
        options = (f", `--levels {' '.join(map(str, levels))}`" if levels else "") + (
            f", `--semantic-budget {budget}`" if budget else "")
        calls = [f"{calls:.1f}".removesuffix(".0") for calls in at_views(group, views, "nfe") if calls is not None]
        lines.append([method + options, cell(dc), *(cell(psnr) for psnr in at_views(group, views)),
                      calls[0] if len(set(calls)) == 1 else " / ".join(calls)])
    return markdown(["method", "iterations", *(f"{n} views" for n in views), "calls"], lines)


def any_views(rows: list[dict]) -> list[str]:
    """A line for each view count: FBP, SPDPS, its gain, and the gain that the nearest published counts suggest."""
    rows = headline(rows)
    if other := set(column(rows, "method")) - {"fbp", "spdps"}:
        raise ValueError(f"it has no column for {', '.join(other)}")
    rows = [row | {"start": row.get("start", 0.0), "published": "levels" in row} for row in rows]
    found = unique(rows, "method", "views", "start", "published")
    views = sorted({row["views"] for row in rows})

    def psnr(method, n):
        return found.get((method, n, 0.0, False), {}).get("psnr")

    def gain(n, start, published=False):
        """As transcribed, else SPDPS less FBP; None where it was not measured."""
        row = found.get(("spdps", n, start, published))
        return row and (row["gain"] if "gain" in row else row["psnr"] - found["fbp", n, start, False]["psnr"])

    def expected(n, start):
        """As transcribed, else interpolated linearly between the two nearest published counts."""
        known = [m for m in PUBLISHED_COUNTS if gain(m, start) is not None]
        if gain(n, start) is None or n in known or not known:
            return None
        between = float(np.interp(n, known, [gain(m, start) for m in known]))
        return found["spdps", n, start, False].get("expected_gain", between)

    return markdown(
        ["views", "FBP", "SPDPS", "gain", "neighbours", "gain, published levels", "gain, `--start 0.3`", "neighbours"],
        [[str(n), *map(cell, (psnr("fbp", n), psnr("spdps", n), gain(n, 0.0), expected(n, 0.0), gain(n, 0.0, True),
                              gain(n, 0.3), expected(n, 0.3)))] for n in views])


def ablation(rows: list[dict]) -> list[str]:
    """A line for each change and seed: images seen, PSNR of one call and of the chain, commit of the measurement."""
    rows, lines = headline(rows), []
    views = column(rows, "views")
    for (change, seed, images), group in grouped(rows, "change", "seed", "images").items():
        by_method = grouped(group, "method")
        one, chains = by_method.pop(("one-step",), []), list(by_method.items())
        chain, found = (chains[0][0][0], chains[0][1]) if chains else ("-", [])
        lines.append([change, str(seed), str(images), numbers(at_views(one, views)), numbers(at_views(found, views)),
                      chain, group[0].get("commit", "")])
    listed = " / ".join(map(str, views))
    return markdown(["change", "seed", "images", f"one call {listed}", f"chain {listed}", "chain", "commit"], lines)


# What each part of the recipe gains: the rows with it, the rows without.
PARTS = {
    "data consistency, in the sampler": ("data consistency at test only", "no data consistency, level shift"),
    "data consistency, in training too": ("default", "data consistency at test only"),
    "residual output": ("default", "output x0 instead of x0 - x_t"),
    "one optimizer step for each input": ("default", "one update for all inputs"),
    "scaled input": ("default", "input in mu, unscaled"),
    "anchored residual channel": ("residual channel, anchored", "default"),
    "no flips and turns": ("no flips and turns", "default"),
    "all that tiny took from these, together": ("these together, as tiny has them", "default"),
}


def gains(rows: list[dict]) -> list[str]:
    """What each of PARTS gains in dB of the chain, over the seeds that both have, and how much a seed changes."""
    chain = grouped([row for row in headline(rows) if row["method"] != "one-step"], "change", "views")
    views = column(rows, "views")

    def gain(with_it, without, n):
        first, second = ({row["seed"]: row["psnr"] for row in chain.get((name, n), [])} for name in (with_it, without))
        shared = first.keys() & second.keys()
        return sum(first[seed] - second[seed] for seed in shared) / len(shared) if shared else None

    lines = [[part, *(cell(gain(*pair, n), "+.1f") for n in views)] for part, pair in PARTS.items()]
    spreads = [max(psnr) - min(psnr) for n in views if (psnr := [row["psnr"] for row in chain.get(("default", n), [])])]
    lines.append(["another seed (of the default)", *(f"{spread:.1f}" for spread in spreads)])
    return markdown(["part", *(f"{n} views" for n in views)], lines)


def crossed(rows: list[dict], names: tuple[str, ...], across: tuple[str, ...], heading: str,
            last: tuple[str, ...] = ()) -> list[str]:
    """A line for each values of `names`, which ends with those of `last`, and a column of PSNR for each of `across`.

    heading: of such a column, a format of its values.
    """
    columns, lines = list(grouped(rows, *across)), []
    for values, group in grouped(rows, *names).items():
        found = unique(group, *across)
        lines.append([*map(cell, values), *(cell(found.get(key, {}).get("psnr")) for key in columns),
                      *(cell(group[0].get(name)) for name in last)])
    called = {"dc": "iterations", "pflop": "PFLOP"}
    return markdown([*(called.get(name, name) for name in names), *(heading.format(*key) for key in columns), *last],
                    lines)


def sampling(rows: list[dict]) -> list[str]:
    """A line for each procedure: time, speed and PSNR against the first."""
    return markdown(
        ["procedure", "views", "s/slice", "times faster", "PSNR dB", "difference"],
        [[r["procedure"], str(r["views"]), f"{r['seconds_per_slice']:.2f}", f"{r['speedup']:.2f}", f"{r['psnr']:.3f}",
          cell(r.get("psnr_difference"), "+.3f")] for r in rows])


def scanners(rows: list[dict]) -> list[str]:
    """A line for each scanner and view count: FBP, and of each checkpoint its chain, its gain over FBP, and how far
    that is from the gain on the first scanner."""
    names = [name for name in column(rows, "checkpoint") if name is not None]
    lines, first = [], {}
    for (scanner, views), group in grouped(rows, "scanner", "views").items():
        found = unique(group, "checkpoint")
        fbp = found.get((None,), {}).get("psnr", math.nan)
        line = [scanner, str(views), f"{fbp:.2f}"]
        for name in names:
            psnr = found.get((name,), {}).get("psnr", math.nan)
            gain = psnr - fbp
            line += [f"{psnr:.2f}", f"{gain:+.2f}", f"{gain - first.setdefault(name, gain):+.2f}"]
        lines.append([text.replace("+nan", "-").replace("nan", "-") for text in line])
    heads = [text for name in names for text in (name, "gain", "difference")]
    return markdown(["scanner", "views", "FBP", *heads], lines)


def coverage(rows: list[dict]) -> list[str]:
    """A line for each view count and noise: share of pixels in their interval, mean error and mean half width."""
    return markdown(
        ["views", "photons", "in the interval", "of the body", "worst slice", "mean error HU", "mean half width HU"],
        [[str(r["views"]), "no noise" if r["photons"] is None else f"{r['photons']:g}",
          *(f"{100 * r[name]:.1f} %" for name in ("coverage", "body", "worst")),
          *(f"{r[name]:.1f}" for name in ("error_hu", "width_hu"))] for r in rows])


BY_NOISE = {"across": ("measurement", "views"), "heading": "{}, {} views"}
ROBUSTNESS = partial(crossed, names=("measurement", "views"), across=("checkpoint", "method"), heading="{}: {}")
TABLES = {  # mark: (file in docs/results, its table)
    "test": ("test", summary),
    "sample": ("sample", summary),
    "consistency": ("consistency", consistency),
    "any-views": ("any-views", any_views),
    "ablation": ("ablation", ablation),
    "gains": ("ablation", gains),
    "hops": ("hops", partial(crossed, names=("hops", "images"), across=("views",), heading="{} views")),
    "reference": ("reference", partial(crossed, names=("recipe", "method", "dc", "pflop"), across=("split", "views"),
                                       heading="{} {}", last=("commit",))),
    "robustness": ("robustness", ROBUSTNESS),
    "size": ("size", ROBUSTNESS),
    "iterations": ("iterations", partial(crossed, names=("dc",), across=("views",), heading="{} views")),
    "margin": ("margin", partial(crossed, names=("margin",), **BY_NOISE)),
    "mirror": ("mirror", partial(crossed, names=("method", "calls"), **BY_NOISE)),
    "seen": ("seen", partial(crossed, names=("weights", "method"), across=("slices", "views"),
                             heading="{} slices, {} views")),
    "told": ("told", partial(crossed, names=("network",), **BY_NOISE)),
    "networks": ("networks", partial(crossed, names=("network", "million parameters", "GFLOP a call", "ms a call",
                                                     "images"), across=("method", "views"), heading="{}, {} views")),
    "scanners": ("scanners", scanners),
    "coverage": ("coverage", coverage),
    "sampling": ("sampling", sampling),
}


def read_results(path: Path) -> dict:
    """A file of docs/results, checked. Raises InputError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected the JSON of a table of results.") from None
    missing = [name for name in FIELDS if name not in found]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; docs/formats.md says what a file of results holds.")
    return found


def source(found: dict) -> list[str]:
    """Where the numbers come from: some lines, and the command or commands."""
    text = (f"{found['title']}. Measured at commit {found['commit']} ({found['date']}) on {found['machine']}, "
            f"{found['slices']} slices. Weights: {found['weights']}. " + " ".join(found["notes"]))
    return [*wrap(text, 120, break_long_words=False, break_on_hyphens=False), "",
            *(f"    {line}" for line in found["command"].splitlines())]


def written(name: str, results: Path) -> str:
    """What stands between the marks of a table. Raises InputError."""
    if name not in TABLES:
        raise InputError(f"No table is called {name!r}; expected one of {', '.join(TABLES)}.")
    file, table = TABLES[name]
    found = read_results(results / f"{file}.json")
    try:
        lines = table(found["rows"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{results / file}.json has rows that the table {name!r} cannot be made of "
                         f"({type(error).__name__}: {error}).") from None
    return "\n".join(["", *lines, "", *source(found), "", ""])


def with_tables(text: str, results: Path) -> tuple[str, list[str]]:
    """(the text with its tables as the files give them, names of those that differed). Raises InputError."""
    if 2 * len(TABLE.findall(text)) != len(MARK.findall(text)):
        raise InputError("A mark of a table has no partner; expected <!-- table: NAME --> and <!-- end of table -->.")
    different = []

    def replace(match):
        new = match[1] + written(match[2], results) + match[3]
        different.extend([match[2]] * (new != match[0]))
        return new

    return TABLE.sub(replace, text), different


def texts(root: Path) -> list[Path]:
    """The files that have tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


@script
def main(argv=None) -> int:
    parser = Parser("python -m fig.tables", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; name what differs, with exit status 1")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, metavar="DIR",
                        help="folder of README.md and docs/ (default: this repository)")
    args = parser.parse_args(argv)
    changed = 0
    for path in texts(args.root):
        try:
            text = path.read_text(encoding="utf-8")
            new, different = with_tables(text, args.root / "docs" / "results")
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); --root is the folder of README.md.") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        for name in different:
            print(f"{path}: table {name!r} " + ("is not what its file gives; run python -m fig.tables."
                                                if args.check else "written."))
        changed += len(different)
        if different and not args.check:
            with atomic(path) as partial:
                partial.write_text(new, encoding="utf-8")
    if not changed:
        print("Every table is what its file gives.")
    return int(args.check and changed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
