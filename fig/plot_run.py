"""Draw the curves of a training run to OUT/curves.png: `python -m fig.plot_run OUT`."""

from pathlib import Path

from utils.cli import Parser, script
from utils.errors import InputError

PANELS = {"Loss": ("loss/", "log"), "PSNR, dB": ("/psnr", "linear"), "SSIM": ("/ssim", "linear"),
          "Gradient norm": ("gradient_norm", "log"), "Learning rate": ("lr", "linear"),
          "Images a second": ("images_per_second", "linear")}


def curves(lines: list[dict], part: str) -> dict[str, tuple[list, list]]:
    """(images seen, values) of every name in metrics.jsonl that begins or ends with `part`."""
    found: dict[str, tuple[list, list]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(part) or name.endswith(part):
                xs, ys = found.setdefault(name, ([], []))
                xs.append(line["images"])
                ys.append(value)
    return found


@script
def main(argv=None) -> None:
    parser = Parser("python -m fig.plot_run", __doc__)
    parser.add_argument("out", type=Path, help="folder of a run of train.py")
    out = parser.parse_args(argv).out
    from fig.figures import plt, write
    from utils.scalars import read_lines

    lines = read_lines(out / "metrics.jsonl")
    if not lines:
        raise InputError(f"{out} holds no metrics.jsonl with values; expected the --out folder of a run of train.py.")
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (title, (part, scale)) in zip(axes.flat, PANELS.items(), strict=True):
        found = curves(lines, part)
        for name, (xs, ys) in sorted(found.items()):
            axis.plot(xs, ys, label=name.removeprefix("loss/"), marker="." if len(xs) < 30 else None)
        axis.set(title=title, xlabel="training images", yscale=scale)
        axis.grid(alpha=0.3)
        if len(found) > 1:
            axis.legend(fontsize=7)
    write(figure, out / "curves.png")
    print(f"{out / 'curves.png'} shows {len(lines)} lines of metrics.jsonl, to {lines[-1]['images']} images.")


if __name__ == "__main__":
    main()
