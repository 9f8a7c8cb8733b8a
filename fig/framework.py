"""Draw the method on one slice of the sample set, as PNG and PDF: `python -m fig.framework`.

Every picture is what the shipped network makes of slice --slice at 18 views; the numbers below are its PSNR.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch

from datasets.slices import find_slices, read_slice
from fig.figures import DISPLAY, DPI, NORMAL, PAGE, SMALL, grey, plt, psnr_in, said, write
from models.reconstructor import Reconstructor
from utils.cli import Parser, script
from utils.metrics import score
from utils.units import WINDOWS, hu_to_mu, mu_to_hu

ROOT = Path(__file__).parent.parent
RED, BLUE = "#b03020", "#1f4e79"


def pictures(index: int, n_views: int) -> tuple[np.ndarray, list[tuple[str, np.ndarray, float]]]:
    """The sinogram (views, bins) and (label, HU, PSNR in dB) of the stages of one chain."""
    files = find_slices(ROOT / "datasets" / "sample", "test")
    consistent, plain = Reconstructor.from_checkpoint("tiny"), Reconstructor.from_checkpoint("tiny", dc=0)
    degrade = consistent.degrade
    x0 = degrade.full(hu_to_mu(torch.from_numpy(read_slice(files[index])))[None, None])
    y, dense = degrade.project(x0, n_views), consistent.chain(n_views)[-2]
    corrected = consistent.run("one-step", y)[0]
    stages = {rf"$x_T$, {n_views} views": degrade.fbp(y, x0.shape[-1]),
              r"estimate $\hat{x}_0$": plain.run("one-step", y)[0],
              r"$\hat{x}_0$ that explains $y$": corrected,
              rf"$x_s$, {dense} views": degrade(corrected, dense),
              r"the last $\hat{x}_0$": consistent.run("sequential", y)[0]}
    return y[0, 0].numpy(), [(label, mu_to_hu(x[0, 0]).numpy(), score(x, x0, *WINDOWS[0])["psnr"].item())
                             for label, x in stages.items()]


def arrow(figure, start, end, color, bend: str = "arc3") -> None:
    figure.add_artist(FancyArrowPatch(start, end, transform=figure.transFigure, connectionstyle=bend, color=color,
                                      arrowstyle="-|>", mutation_scale=8, linewidth=1.1, shrinkA=0, shrinkB=0))


@script
def main(argv=None) -> None:
    parser = Parser("python -m fig.framework", __doc__)
    parser.add_argument("--slice", type=int, default=4, choices=range(8), help="of the sample set")
    parser.add_argument("--out", type=Path, default=Path("results/framework.png"), help="the file to write")
    parser.add_argument("--dpi", type=int, default=DPI, help="dots an inch of the PNG")
    args = parser.parse_args(argv)
    sinogram, stages = pictures(args.slice, 18)

    wide, high = PAGE, 2.45  # inches
    figure = plt.figure(figsize=(wide, high))
    side, gap, bottom = 0.103, 0.0735, 0.35  # in widths of the figure, the last in heights
    left = [0.006 + i * (side + gap) for i in range(6)]
    tall = side * wide / high
    middle, top = bottom + tall / 2, bottom + tall

    def picture(i, image, label, below, **style):
        axis = figure.add_axes((left[i], bottom, side, tall))
        axis.imshow(image, **style)
        axis.set(xticks=[], yticks=[])
        figure.text(left[i] + side / 2, top + 0.03, label, ha="center", va="bottom", fontsize=NORMAL)
        figure.text(left[i] + side / 2, bottom - 0.03, below, ha="center", va="top", fontsize=SMALL, color="0.35")

    picture(0, sinogram, r"measurement $y$", "18 views", cmap="gray", aspect="auto")
    for i, (label, hu, psnr) in enumerate(stages, 1):
        picture(i, hu, label, f"{psnr:.1f} dB", **grey(DISPLAY))
    steps = (("FBP", "black"), ("network\n$R$", BLUE), ("CG on\n" r"$\|P_n x - y\|^2$", RED),
             ("FBP of\n" r"$n_s > n$" "\nviews: $D$", "black"), ("six more\nlevels", "black"))
    for i, (name, color) in enumerate(steps):
        arrow(figure, (left[i] + side + 0.005, middle), (left[i + 1] - 0.005, middle), color)
        figure.text(left[i] + side + (left[i + 1] - left[i] - side) / 2, middle + 0.035, name, ha="center",
                    va="bottom", fontsize=SMALL, color=color)
    between = [(left[i] + side + left[i + 1]) / 2 for i in range(5)]
    y_x = left[0] + side / 2
    for points, color, text in ((((y_x, top + 0.14), (y_x, 0.93), (between[2], 0.93), (between[2], middle + 0.19)), RED,
                                 "the measurement, after every call of the network"),
                                (((left[4] + side / 2, bottom - 0.12), (left[4] + side / 2, 0.13), (between[1], 0.13),
                                  (between[1], middle - 0.04)), BLUE, "again from a denser level, up to 288 views")):
        figure.add_artist(plt.Line2D(*zip(*points[:-1], strict=True), color=color, linewidth=1.1))
        arrow(figure, points[-2], points[-1], color)
        figure.text((points[1][0] + points[2][0]) / 2, points[1][1], text, ha="center", va="center", fontsize=SMALL,
                    color=color, backgroundcolor="white")
    figure.text(0.994, 0.01, f"Display: {said(DISPLAY)}. {psnr_in(WINDOWS[0])}, below the pictures.", ha="right",
                va="bottom", fontsize=SMALL, color="0.35")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    paths = write(figure, args.out, dpi=args.dpi)
    print(f"Written: {paths[1]} and {paths[0].name}.")


if __name__ == "__main__":
    main()
