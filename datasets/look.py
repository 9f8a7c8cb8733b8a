"""A look at prepared data: `python -m datasets.look DIR` prints what it holds and what is odd, and draws a sheet.

DIR holds train_img/, val_img/, test_img/ or is one folder of .npy files: HU slices (H, H) or volumes (N, H, H).
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datasets.plausible import doubt
from datasets.series import Refused
from datasets.slices import number_in, open_array, patients_of, read_manifest, unsure
from utils.cli import Parser, script
from utils.errors import InputError, printable
from utils.files import atomic, sha256
from utils.progress import Progress
from utils.units import HU_RANGE

BANDS = (HU_RANGE[0], -950, -200, -20, 20, 100, 300, 1000, HU_RANGE[1] + 1)
NAMES = ("air", "lung", "fat", "water", "soft tissue", "contrast, spongy bone", "bone", "dense bone, metal")
WINDOW = (-1000, 1000)  # HU shown black and white on the sheet


def read_array(path: Path) -> tuple[np.ndarray | None, list[str]]:
    """(the array, or None where it is none of HU; what is suspicious about it, in a few words each)."""
    try:
        hu = open_array(path)
    except Refused as error:
        return None, [str(error)]
    usable = hu.dtype.kind in "iuf" and hu.ndim in (2, 3) and hu.size
    if not usable or hu.shape[-1] != hu.shape[-2]:
        return hu if usable else None, [f"is {hu.dtype} of shape {hu.shape}; expected square HU slices"]
    if not np.isfinite(hu).all():
        return hu, ["holds NaN or infinity"]
    low, high, found = hu.min(), hu.max(), doubt(hu)
    return hu, [text for odd, text in (
        (hu.shape[-1] % 8, f"is {hu.shape[-1]} pixels wide, which the network (multiples of 8) does not take"),
        (low < HU_RANGE[0] or high > HU_RANGE[1], f"reaches from {low} to {high} HU, beyond {HU_RANGE}"),
        (found, (found or ("", ""))[1])) if odd]


def check_manifest(folder: Path, rows: dict[str, dict[str, str]], found: list[tuple[Path, str, str]]) -> list[str]:
    """What is odd about a manifest's {file: row}, if it has any, beside the files' (path, patient, sha256)."""
    odd = [f"{name} of manifest.csv is not there" for name in rows if not (folder / name).exists()]
    odd += [f"{name} has a pixel spacing of {row['spacing_mm']} mm" for name, row in rows.items()
            if row.get("spacing_mm") and not 0.1 <= (number_in(row, "spacing_mm") or 0) <= 4]
    for path, _, digest in found if rows else ():
        if path.name not in rows:
            odd.append(f"{path.name} is not in manifest.csv")
        elif rows[path.name].get("sha256", digest) != digest:
            odd.append(f"{path.name} differs from the hash in manifest.csv: it was changed")
    return odd


def look(folder: Path) -> tuple[list[str], list[tuple[Path, str, str]], list[np.ndarray]]:
    """Print the statistics of one folder; returns (what is odd, (path, patient, sha256) of files, 8 slices to draw)."""
    files, odd, found, chosen = sorted(folder.glob("[!.]*.npy")), [], [], []
    sizes, slices, counts = Counter(), Counter(), np.zeros(len(NAMES), int)
    wanted = set(np.linspace(0, len(files) - 1, 8).astype(int).tolist())
    owned = list(zip(files, patients_of(files), strict=True))
    for index, (path, patient) in enumerate(Progress(owned, desc=folder.name, unit="file")):
        hu, reasons = read_array(path)
        odd += [f"{path.name} {reason}" for reason in reasons]
        if hu is None:
            continue
        found.append((path, patient, sha256(path)))
        slices[patient] += len(hu) if hu.ndim == 3 else 1
        sizes[f"{hu.shape[-2]} x {hu.shape[-1]} {hu.dtype}"] += 1
        counts += np.histogram(np.clip(hu, *HU_RANGE), BANDS)[0]
        if index in wanted:
            chosen.append(np.asarray(hu[len(hu) // 2] if hu.ndim == 3 else hu, np.float32))
    rows = {row["file"]: row for row in reversed(read_manifest(folder))}  # of a volume, the row of its first slice
    print(f"\n{printable(str(folder))}: {slices.total()} slices in {len(files)} files of {len(slices)} patients")
    if slices:
        numbers = list(slices.values())
        print(f"  slices a patient: {min(numbers)} to {max(numbers)}, median {np.median(numbers):g}")
    print("  sizes: " + ", ".join(f"{size} ({count} files)" for size, count in sizes.most_common()))
    if spacings := [value for row in rows.values() if (value := number_in(row, "spacing_mm"))]:
        print(f"  pixel spacing: {min(spacings):.3f} to {max(spacings):.3f} mm, median {np.median(spacings):.3f}")
    for low, high, name, share in zip(BANDS, BANDS[1:], NAMES, counts / max(1, counts.sum()), strict=False):
        print(f"  {low:6d} .. {high - 1:5d} HU {share:6.1%} {'#' * round(40 * share):40s} {name}")
    odd = [f"{folder.name}/{line}" for line in odd + check_manifest(folder, rows, found)]
    return odd + [f"{folder.name} mixes sizes or types: {', '.join(sizes)}"] * (len(sizes) > 1), found, chosen


def shared(found: list[tuple[Path, str, str]]) -> list[str]:
    """Which files (path, patient, sha256) are the same, and which patients are in several folders."""
    odd, first, folders = [], {}, defaultdict(dict)
    for path, patient, digest in found:
        name = f"{path.parent.name}/{path.name}"
        if first.setdefault(digest, name) != name:
            odd.append(f"{name} is the same as {first[digest]}")
        folders[patient][path.parent.name] = None
    return odd + [f"{' and '.join(names)} share patient {who}" for who, names in folders.items() if len(names) > 1]


def draw_sheet(rows: dict[str, list[np.ndarray]], path: Path, side: int = 160) -> None:
    """Write a PNG with a row of slices ((H, H) HU) for each name."""
    sheet = Image.new("L", (side * max(map(len, rows.values())), (side + 14) * len(rows)))
    draw = ImageDraw.Draw(sheet)
    for row, (name, slices) in enumerate(rows.items()):
        draw.text((2, row * (side + 14) + 1), f"{name}, {WINDOW[0]} to {WINDOW[1]} HU", fill=255)
        for column, hu in enumerate(slices):
            grey = (np.nan_to_num(hu) - WINDOW[0]) / (WINDOW[1] - WINDOW[0]) * 255
            picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize((side, side))
            sheet.paste(picture, (column * side, row * (side + 14) + 14))
    with atomic(path) as partial:
        sheet.save(partial, format="PNG")


@script
def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m datasets.look", __doc__)
    parser.add_argument("data", metavar="DIR", type=Path, help="prepared data, or one folder of .npy files")
    parser.add_argument("--sheet", metavar="PNG", type=Path, help="contact sheet to write (default: DIR/sheet.png)")
    args = parser.parse_args(argv)
    folders = [args.data / f"{part}_img" for part in ("train", "val", "test") if (args.data / f"{part}_img").is_dir()]
    folders = [folder for folder in folders or [args.data] if any(folder.glob("[!.]*.npy"))]
    if not folders:
        raise InputError(f"{args.data} holds no .npy files, nor does a train_img/, val_img/ or test_img/ in it.")
    odds, founds, pictures = zip(*map(look, folders), strict=True)
    odd = sum(odds, []) + shared(sum(founds, []))
    odd += [f"{folder.name}: {text}" for folder in folders if (text := unsure(sorted(folder.glob("[!.]*.npy"))))]
    print(f"\n{len(odd)} suspicious" + (":" if odd else ""))
    for line in [*odd[:50], *[f"and {len(odd) - 50} more"] * (len(odd) > 50)]:
        print(f"  {printable(line)}")
    if any(pictures):
        sheet = args.sheet or args.data / "sheet.png"
        draw_sheet({folder.name: slices for folder, slices in zip(folders, pictures, strict=True) if slices}, sheet)
        print(f"Contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
