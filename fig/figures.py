"""Figures of reconstructions and curves, drawn without a display."""

from pathlib import Path

import torch
from matplotlib import pyplot as plt

from utils.files import atomic
from utils.metrics import score
from utils.units import WINDOWS, mu_to_hu

plt.switch_backend("Agg")
GREY = {"cmap": "gray", "vmin": -850, "vmax": 650}  # HU


def comparison(path: Path, x0: torch.Tensor, images: dict[str, torch.Tensor], title: str) -> None:
    """Truth and reconstructions {label: image} above a zoomed region and their error maps (HU), written as PNG.

    Images: mu (1, 1, H, H).
    """
    figure, axes = plt.subplots(3, 1 + len(images), figsize=(2.6 * (1 + len(images)), 8.2), layout="constrained")
    truth = mu_to_hu(x0[0, 0].cpu())
    rows, columns = region = detail(truth.clamp(GREY["vmin"], GREY["vmax"]))
    truth = truth.numpy()
    axes[0, 0].imshow(truth, **GREY)
    axes[0, 0].add_patch(plt.Rectangle((columns.start, rows.start), columns.stop - columns.start,
                                       rows.stop - rows.start, fill=False, edgecolor="yellow"))
    axes[0, 0].set_title("Truth (720 views)")
    axes[1, 0].imshow(truth[region], **GREY)
    for column, (label, image) in zip(axes.T[1:], images.items(), strict=True):
        psnr, hu = score(image, x0, *WINDOWS[0])["psnr"].item(), mu_to_hu(image[0, 0].cpu()).numpy()
        column[0].imshow(hu, **GREY)
        column[0].set_title(f"{label}: {psnr:.1f} dB")
        column[1].imshow(hu[region], **GREY)
        shown = column[2].imshow(hu - truth, cmap="RdBu_r", vmin=-200, vmax=200)
    figure.colorbar(shown, ax=axes[2, 0], location="right", label="error, HU", shrink=0.8)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title)
    write(figure, path)


def detail(image: torch.Tensor) -> tuple[slice, slice]:
    """Rows and columns of the region, a quarter of the sides, in which an image (H, H) varies most."""
    side = max(8, image.shape[0] // 4)
    tiles = image.unfold(0, side, side // 2).unfold(1, side, side // 2)
    row, column = divmod(tiles.flatten(2).std(-1).argmax().item(), tiles.shape[1])
    return tuple(slice(i * (side // 2), i * (side // 2) + side) for i in (row, column))


def curves(path: Path, *what, **options) -> None:
    """`draw_curves` in a figure of its own, written as PNG."""
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    draw_curves(axis, *what, **options)
    write(figure, path)


def draw_curves(axis, series: dict[str, list[tuple[float, float]]], xlabel: str, title: str, log: bool = False,
                joined: bool = True) -> None:
    """PSNR against something on an axis of a figure: each label's (x, dB) pairs, joined by a line, x perhaps on a
    logarithmic scale."""
    for name, points in series.items():
        axis.plot(*zip(*points, strict=True), "o-" if joined else "o", label=name)
    if log:
        ticks = sorted({x for points in series.values() for x, _ in points})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel="PSNR, dB", title=title)
    axis.grid(alpha=0.3)
    axis.legend()


def write(figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG and close it."""
    with atomic(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
    plt.close(figure)
