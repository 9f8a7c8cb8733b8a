"""The flags of test.py that are about figures, checked before an evaluation begins. Needs no Matplotlib."""

import argparse

from utils.errors import InputError

# (width, centre) in HU, as radiologists set them (Radiopaedia, "Windowing (CT)").
NAMED = {"lung": (1500, -600), "mediastinum": (350, 50), "abdomen": (400, 50), "bone": (1800, 400), "brain": (80, 40)}


def region(text: str) -> tuple[int, int, int, int]:
    """X,Y,W,H in pixels."""
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        x = y = w = h = -1
    if min(x, y) < 0 or min(w, h) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected X,Y,W,H in pixels, such as 96,64,48,48: left, top, "
                                         "width and height")
    return x, y, w, h


def add_figure_flags(parser: argparse.ArgumentParser, window) -> None:
    """--slice, --roi and --display-window. window: turns WIDTH,CENTRE into two numbers."""
    parser.add_argument("--slice", metavar="FILE", help="slice of the figures: its file name, or its number among "
                        "those evaluated, from 0 (default: the middle one)")
    parser.add_argument("--roi", type=region, metavar="X,Y,W,H", help="region that figures show enlarged: left, top, "
                        "width and height in pixels (default: where the slice varies most)")
    parser.add_argument("--display-window", type=lambda text: NAMED.get(text) or window(text), metavar="WIDTH,CENTRE",
                        default=(1500, -100), help=f"HU window of the figures, or {', '.join(NAMED)} (default "
                        "1500,-100)")


def chosen_slice(args, names: list[str], side: int) -> int:
    """Index of the slice that the figures show. Raises InputError where it or the region is not there.

    names: files evaluated. side: of a slice, pixels.
    """
    if args.roi and (args.roi[0] + args.roi[2] > side or args.roi[1] + args.roi[3] > side):
        x, y, w, h = args.roi
        raise InputError(f"--roi {x},{y},{w},{h} ends at column {x + w} and row {y + h}, and the slices have "
                         f"{side} x {side} pixels; expected a region inside them.")
    if args.slice is None:
        return len(names) // 2
    found = [i for i, name in enumerate(names) if args.slice in (name, name.removesuffix(".npy"))]
    if not found and args.slice.isdecimal() and int(args.slice) < len(names):
        found = [int(args.slice)]
    if not found:
        raise InputError(f"--slice {args.slice} is none of the {len(names)} slices evaluated; expected a file name, "
                         f"such as {names[len(names) // 2]}, or a number from 0 to {len(names) - 1}.")
    return found[0]
