"""Figures of reconstructions, drawn without a display."""

from pathlib import Path

import matplotlib
import torch

from utils.files import atomic
from utils.metrics import measure
from utils.units import WINDOWS, mu_to_hu

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)

LABELS = {"fbp": "FBP", "one-step": "One step", "sequential": "Sequential", "spdps": "SPDPS"}


def comparison(path: Path, x0: torch.Tensor, images: dict[str, torch.Tensor], title: str,
               width: float = 1500, centre: float = -100, error: float = 200) -> None:
    """Truth and reconstructions (1, 1, H, W, mu) above their error maps, written as PNG.

    width, centre: display window in HU; error: HU at the ends of the error maps' colours.
    """
    figure, axes = plt.subplots(2, 1 + len(images), figsize=(2.6 * (1 + len(images)), 5.6), layout="constrained",
                                squeeze=False)
    truth = mu_to_hu(x0[0, 0].cpu())
    grey = {"cmap": "gray", "vmin": centre - width / 2, "vmax": centre + width / 2}
    axes[0, 0].imshow(truth, **grey)
    axes[0, 0].set_title("Truth (720 views)")
    for column, (method, image) in zip(axes.T[1:], images.items(), strict=True):
        psnr = measure(image, x0, *WINDOWS[0])["psnr"].item()
        column[0].imshow(mu_to_hu(image[0, 0].cpu()), **grey)
        column[0].set_title(f"{LABELS.get(method, method)}: {psnr:.1f} dB")
        shown = column[1].imshow(mu_to_hu(image[0, 0].cpu()) - truth, cmap="RdBu_r", vmin=-error, vmax=error)
    figure.colorbar(shown, ax=axes[1, 0], location="right", label="error, HU", shrink=0.8)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
