"""Draw fig/quantitative.png from results folders of test.py: PSNR against views and calls, and a training curve.

    python -m fig.quantitative results/test [MORE...] [--run runs/tiny]

The figure shows mean PSNR in the headline window. With several folders the names of their methods begin with theirs.
"""

import argparse
import json
import sys
from pathlib import Path

from utils.figures import LABELS, draw_curves, plt, write
from utils.plot_run import curves
from utils.scalars import read_lines


def headline(folder: Path) -> list[dict]:
    """Rows of summary.json in its first window. Exits with a sentence where there is none."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return [row for row in summary if row["window"] == summary[0]["window"]]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        sys.exit(f"{folder} holds no whole summary.json; expected the --out folder of a finished run of test.py.")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser("python -m fig.quantitative", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="--out folders of test.py")
    parser.add_argument("--run", type=Path, help="--out folder of train.py: adds its validation PSNR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quantitative.png")
    args = parser.parse_args(argv)
    by_method, by_calls = {}, {}
    for folder in args.results:
        for row in headline(folder):
            name = LABELS.get(row["method"], row["method"])
            name = name if len(args.results) == 1 else f"{folder.name}: {name}"
            by_method.setdefault(name, []).append((row["views"], row["psnr"]))
            by_calls.setdefault(f"{row['views']} views", []).append((row["nfe"], row["psnr"]))
    panels = [(by_method, "views", "every method", {"log": True}),
              (by_calls, "network calls a slice", "every method", {"joined": False})]
    if args.run:
        found = curves(read_lines(args.run / "metrics.jsonl"), "/psnr")
        if not found:
            sys.exit(f"{args.run} holds no validation PSNR; expected the --out folder of a run of train.py.")
        panels.append(({name.removesuffix("/psnr"): list(zip(*xy, strict=True)) for name, xy in found.items()},
                       "training images", "validation", {}))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (series, xlabel, title, options) in zip(axes, panels, strict=True):
        draw_curves(axis, {name: sorted(points) for name, points in series.items()}, xlabel, title, **options)
        axis.legend(fontsize=7)
    write(figure, args.out)
    print(f"Written: {args.out}.")


if __name__ == "__main__":
    main()
