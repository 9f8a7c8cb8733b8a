"""Draw fig/quantitative.png from results folders of test.py: PSNR against views and calls, and a training curve.

    python -m fig.quantitative results/test [MORE...] [--run runs/tiny]

The figure shows mean PSNR in the headline window. With several folders the names of their methods begin with theirs.
"""

import json
from pathlib import Path

from fig.figures import draw_curves, plt, write
from fig.plot_run import curves
from models.methods import LABELS
from utils.cli import Parser, script
from utils.errors import InputError
from utils.scalars import read_lines


def headline(folder: Path) -> list[dict]:
    """Rows of summary.json in its first window. Raises InputError where there is none."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return [row for row in summary if row["window"] == summary[0]["window"]]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{folder} holds no whole summary.json; expected the --out folder of a finished run of "
                         "test.py.") from error


@script
def main(argv=None) -> None:
    parser = Parser("python -m fig.quantitative", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="--out folders of test.py")
    parser.add_argument("--run", type=Path, help="--out folder of train.py: adds its validation PSNR (default: none)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quantitative.png",
                        help="the file to write")
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
            raise InputError(f"{args.run} holds no validation PSNR; expected the --out folder of a run of train.py.")
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
