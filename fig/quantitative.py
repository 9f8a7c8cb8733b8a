"""Draw PSNR against views and calls from results folders of test.py, and a training curve, as PNG and PDF.

    python -m fig.quantitative results/test [MORE...] [--run runs/tiny]

The figure shows mean PSNR in the headline window. With several folders the names of their methods begin with theirs.
"""

import json
from pathlib import Path

from fig.figures import PAGE, draw_curves, draw_points, plt, psnr_in, write
from fig.plot_run import curves
from fig.tables import headline
from models.methods import LABELS
from utils.cli import Parser, script
from utils.errors import InputError
from utils.scalars import read_lines


def read_summary(folder: Path) -> list[dict]:
    """Rows of summary.json in its first window. Raises InputError where there is none."""
    try:
        rows = headline(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        return [{name: row[name] for name in ("method", "views", "window", "nfe", "psnr")} for row in rows]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} holds no whole summary.json; expected the --out folder of a finished run of "
                         "test.py.") from error


@script
def main(argv=None) -> None:
    parser = Parser("python -m fig.quantitative", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="--out folders of test.py")
    parser.add_argument("--run", type=Path, help="--out folder of train.py: adds its validation PSNR (default: none)")
    parser.add_argument("--out", type=Path, help="the file to write (default: quantitative.png in the first folder)")
    args = parser.parse_args(argv)
    by_views, by_calls, windows = {}, [], {}
    for folder in args.results:
        for row in read_summary(folder):
            name = LABELS.get(row["method"], row["method"])
            name = name if len(args.results) == 1 else f"{folder.name}: {name}"
            by_views.setdefault(name, []).append((row["views"], row["psnr"]))
            by_calls.append((f"{row['views']} views", name, row["nfe"], row["psnr"]))
            windows.setdefault(tuple(row["window"]), folder)
    if len(windows) > 1:
        raise InputError(f"{' and '.join(map(str, windows.values()))} have other headline windows, so their PSNR "
                         "cannot be compared; give the folders of one --windows.")
    label = psnr_in(*windows)
    panels = [(draw_curves, {name: sorted(pairs) for name, pairs in by_views.items()}, "views", {"xscale": "log"}),
              (draw_points, sorted(by_calls, key=lambda point: int(point[0].split()[0])), "network calls a slice", {})]
    if args.run:
        found = curves(read_lines(args.run / "metrics.jsonl"), "/psnr")
        if not found:
            raise InputError(f"{args.run} holds no validation PSNR; expected the --out folder of a run of train.py.")
        panels.append((draw_curves, found, "training images", {}))
    figure, axes = plt.subplots(1, len(panels), figsize=(PAGE, 2.4), layout="constrained")
    lines = [draw(axis, what, xlabel, label, **options)
             for axis, (draw, what, xlabel, options) in zip(axes, panels, strict=True)]
    figure.set_figheight(2.4 + 0.12 * max(lines))
    paths = write(figure, args.out or args.results[0] / "quantitative.png")
    print(f"Written: {paths[1]} and {paths[0].name}.")


if __name__ == "__main__":
    main()
