"""Draw fig/conventions.svg, the fields of a geometry file: `python -m fig.conventions`."""

from pathlib import Path

import numpy as np

from fig.figures import plt
from utils.cli import Parser, script
from utils.files import atomic

HERE = Path(__file__).parent
S, D, PITCH, OFFSET, BINS, FIELD = 600, 400, 60, 90, 9, 360  # mm
RED, BLUE, GREY = "#b03020", "#1f4e79", "0.5"


def places(degrees: float, direction: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(the source, the bins (BINS, 2)) of one view, mm to the right and up as the image is displayed."""
    t = direction * np.radians(degrees)
    right, ahead = np.array([np.cos(t), np.sin(t)]), np.array([-np.sin(t), np.cos(t)])  # as seen from the source
    u = (np.arange(BINS) - (BINS - 1) / 2) * PITCH + OFFSET
    return -S * ahead, D * ahead + u[:, None] * right


def draw_view(axis, degrees: float, colour: str) -> None:
    """One view: its source, its detector, the rays between and the order of the bins."""
    source, bins = places(degrees)
    axis.plot(*source, "o", color=colour, markersize=8)
    axis.plot(*bins.T, "s-", color=colour, markersize=5)
    for place in bins[[0, -1]]:
        axis.plot(*np.stack([source, place]).T, color=colour, linewidth=0.6)
    for index, text in ((0, "bin 1"), (-1, f"bin {BINS}")):
        axis.annotate(text, bins[index], (0, 8), textcoords="offset points", ha="center", color=colour, fontsize=8)
    axis.annotate(f"source at {degrees:g}°", source, (10, -3), textcoords="offset points", color=colour, fontsize=9)


def dimension(axis, start, end, text: str, shift=(0, 4)) -> None:
    """A length with its name."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "<->", "color": GREY, "shrinkA": 0, "shrinkB": 0})
    middle = (np.asarray(start) + end) / 2
    axis.annotate(text, middle, shift, textcoords="offset points", fontsize=8, color="0.25")


@script
def main(argv=None) -> None:
    parser = Parser("python -m fig.conventions", __doc__)
    parser.add_argument("--out", type=Path, default=HERE / "conventions.svg", help="the picture")
    args = parser.parse_args(argv)
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "conventions"})
    figure, axis = plt.subplots(figsize=(7.5, 7.8), layout="constrained")
    axis.add_patch(plt.Rectangle((-FIELD / 2, -FIELD / 2), FIELD, FIELD, fill=False, linestyle=":"))
    axis.text(-FIELD / 2 + 8, FIELD / 2 - 32, "image as displayed", fontsize=9)
    axis.plot(0, 0, "+", color="black", markersize=12)
    draw_view(axis, 40, RED)
    draw_view(axis, 0, BLUE)
    turn = np.radians(np.linspace(3, 36, 40))
    axis.plot(S * np.sin(turn), -S * np.cos(turn), color="black", linewidth=1)
    axis.annotate("", (S * np.sin(turn[-1]), -S * np.cos(turn[-1])), (S * np.sin(turn[-3]), -S * np.cos(turn[-3])),
                  arrowprops={"arrowstyle": "->"})
    axis.text(215, -545, 'direction "ccw"', fontsize=9)
    dimension(axis, (-430, -S), (-430, 0), "source_distance_mm", (5, 0))
    dimension(axis, (-430, 0), (-430, D), "detector_distance_mm", (5, -30))
    dimension(axis, (0, D - 40), (OFFSET, D - 40), "detector_offset_mm", (-34, -12))
    dimension(axis, (-FIELD / 2, -FIELD / 2 - 20), (FIELD / 2, -FIELD / 2 - 20), "field_of_view_mm", (-38, -13))
    dimension(axis, (OFFSET + PITCH, D + 60), (OFFSET + 2 * PITCH, D + 60), "detector_pitch_mm", (-38, 5))
    for y in (-S, 0, D):
        axis.plot([-445, 0], [y, y], color=GREY, linewidth=0.4)
    axis.plot([0, 0], [-S, D], color=GREY, linewidth=0.6, linestyle="--")
    axis.set(xlim=(-480, 640), ylim=(-650, 600), aspect="equal")
    axis.axis("off")
    with atomic(args.out) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
    plt.close(figure)
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
