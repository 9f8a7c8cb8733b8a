"""Draw the curves of a training run to OUT/curves.png and OUT/curves.pdf: `python -m fig.plot_run OUT`."""

from pathlib import Path

from utils.cli import Parser, script
from utils.errors import InputError

PANELS = {"loss": ("loss/", "log"), "PSNR, dB": ("/psnr", "linear"), "SSIM": ("/ssim", "linear"),
          "gradient norm": ("gradient_norm", "log"), "learning rate": ("lr", "linear"),
          "images a second": ("images_per_second", "linear")}


def curves(lines: list[dict], part: str) -> dict[str, list[tuple[int, float]]]:
    """(images seen, value) of every name in metrics.jsonl that begins or ends with `part`; the names without it."""
    found = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(part) or name.endswith(part):
                found.setdefault(name.removeprefix(part).removesuffix(part), []).append((line["images"], value))
    return dict(sorted(found.items()))


@script
def main(argv=None) -> None:
    parser = Parser("python -m fig.plot_run", __doc__)
    parser.add_argument("out", type=Path, help="folder of a run of train.py")
    out = parser.parse_args(argv).out
    from fig.figures import PAGE, draw_curves, plt, write
    from utils.scalars import read_lines

    lines = read_lines(out / "metrics.jsonl")
    if not lines:
        raise InputError(f"{out} holds no metrics.jsonl with values; expected the --out folder of a run of train.py.")
    figure, axes = plt.subplots(2, 3, figsize=(PAGE, 4), layout="constrained")
    lines_of_names = [0]
    for axis, (label, (part, scale)) in zip(axes.flat, PANELS.items(), strict=True):
        if found := curves(lines, part):
            lines_of_names.append(draw_curves(axis, found, "training images", label, yscale=scale))
        else:
            axis.axis("off")
    figure.set_figheight(4 + 0.12 * max(lines_of_names))
    write(figure, out / "curves.png")
    print(f"{out / 'curves.png'} shows {len(lines)} lines of metrics.jsonl, to {lines[-1]['images']} images.")


if __name__ == "__main__":
    main()
