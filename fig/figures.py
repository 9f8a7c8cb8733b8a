"""Figures for a paper: pictures of reconstructions and curves, 3.5 or 7 inches wide, as PNG and PDF. Needs no display.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; shapes of points differ too.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from PIL import Image

from utils.files import atomic
from utils.workers import parallel, time_limit

COLUMN, PAGE, DPI = 3.5, 7.0, 300  # inches: a column and both columns of a paper; dots an inch of a PNG
DISPLAY = (1500, -100)             # (width, centre) in HU of a picture where nobody says otherwise
ERROR = 200                        # HU: what the strongest red and blue of an error map mean
SMALL, NORMAL = 6, 7               # points, of letters
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = "osD^v<*>hpPX", ("-", "--", ":")
plt.switch_backend("Agg")
plt.rcParams.update({
    "font.size": NORMAL, "axes.titlesize": NORMAL, "figure.titlesize": NORMAL, "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False, "axes.linewidth": 0.6,
    "lines.linewidth": 1, "lines.markersize": 4, "lines.markeredgewidth": 0.8, "grid.alpha": 0.3,
    "mathtext.fontset": "stix", "pdf.fonttype": 42})  # 42: letters stay letters, as journals ask


def grey(window: tuple[float, float]) -> dict:
    """Options of imshow for HU in a display window (width, centre)."""
    width, centre = window
    return {"cmap": "gray", "vmin": centre - width / 2, "vmax": centre + width / 2}


def said(window: tuple[float, float]) -> str:
    """A window (width, centre) as radiologists write it."""
    text = f"W {window[0]:g} L {window[1]:g} HU"  # which no line break may split
    return text.replace("-", "\N{MINUS SIGN}").replace(" ", "\N{NO-BREAK SPACE}")


def psnr_in(window: tuple[float, float]) -> str:
    """What stands beside an axis of PSNR in a window (width, centre)."""
    return f"PSNR ({said(window)}), dB"


def comparison(truth: np.ndarray, images: dict[str, np.ndarray], about: list[str],
               window: tuple[float, float] = DISPLAY, roi: tuple[int, int, int, int] | None = None) -> plt.Figure:
    """Truth and reconstructions above an enlarged region and their error maps.

    truth: HU (H, H). images: {heading: HU (H, H)}. about: lines in the free corner. window: (width, centre) in HU.
    roi: x, y, width and height of the region in pixels; by default where the truth varies most.
    """
    look, columns = grey(window), 1 + len(images)
    x, y, w, h = roi or detail(truth.clip(look["vmin"], look["vmax"]))
    width, head, bar, gap = PAGE if columns > 3 else COLUMN, 0.29, 0.58, 0.04  # inches
    side = max(0.87, (width - bar) / columns - gap)  # beyond six methods the figure is wider
    width = columns * (side + gap) + bar
    heights = (side, side * min(1, h / w), side)
    tops = [head + sum(heights[:row]) + row * gap for row in range(3)]
    high = tops[2] + side + gap
    figure = plt.figure(figsize=(width, high))

    def axes(row, left, wide, tall):
        return figure.add_axes((left / width, 1 - (tops[row] + tall) / high, wide / width, tall / high))

    for column, (heading, image) in enumerate([("Truth\n720 views", truth), *images.items()]):
        error, region = image - truth, (slice(y, y + h), slice(x, x + w))
        for row, (picture, style) in enumerate([(image, look), (image[region], look), (error, None)]):
            axis = axes(row, column * (side + gap), side, heights[row])
            axis.axis("off")
            if style or column:
                shown = axis.imshow(picture, **style or {"cmap": "RdBu_r", "vmin": -ERROR, "vmax": ERROR})
            else:
                lines = [part for line in about for part in wrap(line, int(21 * side))]
                axis.text(0.03, 0.97, "\n".join(lines), va="top", fontsize=SMALL, linespacing=1.4)
            if row == 0:
                axis.set_title(heading, pad=2)
                greys = shown
            if row == column == 0:
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor="#F0E442"))
    left, short = columns * (side + gap) + 0.02, 0.05  # bars are shorter than their rows: letters stand at their ends
    for row, mapped, tall, label in ((0, greys, tops[2] - tops[0] - gap, "HU"), (2, shown, side, "error, HU")):
        tops[row] += short
        scale = figure.colorbar(mapped, cax=axes(row, left, 0.07, tall - 2 * short),
                                ticks=np.linspace(*mapped.get_clim(), 3))
        scale.ax.tick_params(length=2, pad=2)
        scale.set_label(label, labelpad=2)
    return figure


def detail(image: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width and height of the region, a quarter of the sides, in which an image (H, H) varies most."""
    side = min(len(image), max(8, len(image) // 4))
    step = side // 2
    tiles = np.lib.stride_tricks.sliding_window_view(image, (side, side))[::step, ::step].std((-2, -1))
    row, column = divmod(int(tiles.argmax()), tiles.shape[1])
    return column * step, row * step, side, side


def one_axis(draw, title: str, *what, **options) -> plt.Figure:
    """A figure of one column with a title above what `draw_curves` or `draw_points` draws."""
    figure, axis = plt.subplots(figsize=(COLUMN, 2.4), layout="constrained")
    figure.set_figheight(2.4 + 0.12 * draw(axis, *what, **options))
    figure.suptitle(title)
    return figure


def draw_curves(axis, series: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, xscale: str = "linear",
                yscale: str = "linear") -> int:
    """A curve through each label's (x, y) pairs on an axis of a figure. On a logarithmic axis of x every x is named."""
    for i, (name, pairs) in enumerate(series.items()):
        axis.plot(*zip(*pairs, strict=True), color=COLOURS[i % len(COLOURS)], label=name, fillstyle="none",
                  linestyle=LINES[i // len(COLOURS) % len(LINES)],
                  marker=MARKERS[i % len(MARKERS)] if len(pairs) < 30 else None)
    rows = finish(axis, xlabel, ylabel)
    axis.set(xscale=xscale, yscale=yscale)
    if xscale == "log":
        xs, ticks = sorted({x for pairs in series.values() for x, _ in pairs}), []
        for x in xs:
            if not ticks or x >= ticks[-1] * (xs[-1] / xs[0]) ** 0.08:  # closer numbers would touch
                ticks.append(x)
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        axis.minorticks_off()
    return rows


def draw_points(axis, found: list[tuple[str, str, float, float]], xlabel: str, ylabel: str) -> int:
    """Points (name of its colour, name of its shape, x, y) on an axis of a figure."""
    names, shapes = (list(dict.fromkeys(column)) for column in list(zip(*found, strict=True))[:2])
    colours = COLOURS if len(names) <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for name, shape, x, y in found:
        axis.plot(x, y, MARKERS[shapes.index(shape) % len(MARKERS)], color=colours[names.index(name)], fillstyle="none")
    for name, colour in zip(names, colours, strict=False):
        axis.plot([], [], color=colour, linewidth=3, label=name)
    for i, shape in enumerate(shapes):
        axis.plot([], [], MARKERS[i % len(MARKERS)], color="0.3", fillstyle="none", label=shape)
    return finish(axis, xlabel, ylabel)


def finish(axis, xlabel: str, ylabel: str) -> int:
    """Axis labels, a grid, and above the axis the names of what it shows: how many lines of names."""
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.grid()
    names = axis.get_legend_handles_labels()[1]
    wide = axis.figure.get_figwidth() / axis.get_subplotspec().get_gridspec().ncols - 0.5  # inches
    columns = max(1, int(wide / (0.32 + 0.046 * max(map(len, names), default=0))))
    if names:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1, handlelength=1.6,
                    ncols=columns)
    return -(-len(names) // columns)


def write(figure: plt.Figure, path: Path, key: str = "", dpi: int = DPI) -> list[Path]:
    """Write a figure as PDF and PNG, whichever `path` names, and close it: their paths. key: what `is_drawn` asks."""
    paths = [path.with_name(f"{path.name.removesuffix('.png').removesuffix('.pdf')}.{kind}") for kind in ("pdf", "png")]
    for to, about in zip(paths, ({"CreationDate": None}, {"Description": key}), strict=True):
        with atomic(to) as partial:
            figure.savefig(partial, dpi=dpi, format=to.suffix[1:], metadata=about)
    plt.close(figure)
    return paths


def is_drawn(path: Path, key: str) -> bool:
    """Whether `write` finished this figure, a PNG, with this key."""
    try:
        with Image.open(path) as picture:
            return picture.text.get("Description") == key and path.with_suffix(".pdf").is_file()
    except (OSError, AttributeError, ValueError):
        return False


class Figure(NamedTuple):
    """A figure to be drawn: draw(*what, **options) for `path`, a PNG. key: by which `is_drawn` knows it again."""

    path: Path
    key: str
    draw: Callable
    what: tuple
    options: dict = {}


def draw_together(groups: list[list[Figure]]) -> None:
    """Draw what is not drawn yet, in as many processes as there are cores. One that dies costs its group alone."""
    groups = [group for group in groups if not all(is_drawn(figure.path, figure.key) for figure in group)]
    if not groups:
        return
    for group, done in zip(groups, parallel(_draw, groups, os.cpu_count() or 1, "Drawing", chunk=1), strict=True):
        if not done:
            print(f"Warning: a process died while it drew {', '.join(figure.path.name for figure in group)}. The same "
                  "command draws them. All tables are written.", file=sys.stderr)


@time_limit()
def _draw(group: list[Figure]) -> bool:
    """One after the other: the last one is there only if all are."""
    for figure in group:
        if not is_drawn(figure.path, figure.key):
            write(figure.draw(*figure.what, **figure.options), figure.path, figure.key)
    return True
