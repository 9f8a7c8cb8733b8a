"""A look at prepared data: `python -m datasets.inspect DIR` prints what it holds and what is odd, and draws a sheet.

DIR holds train_img/, val_img/, test_img/ or is one folder of .npy files: HU slices (H, H) or volumes (N, H, H).
"""

import argparse
import csv
import hashlib
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets.slices import patients_of
from utils.files import atomic
from utils.units import HU_RANGE

BANDS = (HU_RANGE[0], -950, -200, -20, 20, 100, 300, 1000, HU_RANGE[1] + 1)
NAMES = ("air", "lung", "fat", "water", "soft tissue", "contrast, spongy bone", "bone", "dense bone, metal")
WINDOW = (-1000, 1000)  # HU shown black and white on the sheet


def read_manifest(folder: Path) -> dict[str, dict[str, str]]:
    """{file: row} of folder/manifest.csv; of a volume, the row of its first slice. Empty where there is none."""
    if not (folder / "manifest.csv").is_file():
        return {}
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in reversed(list(csv.DictReader(file)))}


def oddities(hu: np.ndarray) -> list[str]:
    """What is suspicious about an array of HU, each in a few words."""
    if hu.dtype.kind not in "iuf" or hu.ndim not in (2, 3) or hu.shape[-1] != hu.shape[-2] or not hu.size:
        return [f"is {hu.dtype} of shape {hu.shape}; expected square HU slices"]
    if not np.isfinite(hu).all():
        return ["holds NaN or infinity"]
    low, high = hu.min(), hu.max()
    return [text for odd, text in (
        (hu.shape[-1] % 8, f"is {hu.shape[-1]} pixels wide, which the network (multiples of 8) does not take"),
        (low < HU_RANGE[0] or high > HU_RANGE[1], f"reaches from {low} to {high} HU, beyond {HU_RANGE}"),
        (low == high, f"is {low} HU everywhere"),
        (low > -500 and low != high, f"has no air (smallest value {low}): is it in HU?"),
        (high < -200 and low != high, f"has nothing denser than {high} HU"),
    ) if odd]


def inspect(folder: Path) -> tuple[list[str], dict, list[np.ndarray]]:
    """Print the statistics of one folder; returns (what is odd, {content or patient: its name}, 8 slices to draw)."""
    files, manifest = sorted(folder.glob("[!.]*.npy")), read_manifest(folder)
    odd = [f"{folder.name}/{name} of manifest.csv is not there" for name in manifest if not (folder / name).exists()]
    sizes, counts, seen, chosen = Counter(), np.zeros(len(BANDS) - 1, int), {}, []
    wanted = set(np.linspace(0, len(files) - 1, 8).astype(int).tolist())
    slices = defaultdict(int)
    for index, (path, patient) in enumerate(tqdm(list(zip(files, patients_of(files), strict=True)), disable=None)):
        name = f"{folder.name}/{path.name}"
        try:
            hu = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            odd.append(f"{name} cannot be read ({type(error).__name__})")
            continue
        found = oddities(hu)
        odd += [f"{name} {text}" for text in found]
        if hu.dtype.kind not in "iuf" or hu.ndim not in (2, 3):
            continue
        slices[patient] += len(hu) if hu.ndim == 3 else 1
        sizes[f"{hu.shape[-2]} x {hu.shape[-1]} {hu.dtype}"] += 1
        counts += np.histogram(np.clip(hu, *HU_RANGE), BANDS)[0]
        if index in wanted and hu.size:
            chosen.append(np.asarray(hu[len(hu) // 2] if hu.ndim == 3 else hu, np.float32))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest in seen:
            odd.append(f"{name} is the same as {seen[digest]}")
        seen[digest] = name
        row = manifest.get(path.name)
        if manifest and row is None:
            odd.append(f"{name} is not in manifest.csv")
        elif row and row.get("sha256", digest) != digest:
            odd.append(f"{name} differs from the hash in manifest.csv: it was changed")
    print(f"\n{folder}: {sum(slices.values())} slices in {len(files)} files of {len(slices)} patients")
    if slices:
        few, many = min(slices.values()), max(slices.values())
        print(f"  slices a patient: {few} to {many}, median {np.median(list(slices.values())):g}")
    print("  sizes: " + ", ".join(f"{size} ({count} files)" for size, count in sizes.most_common()))
    if len(sizes) > 1:
        odd.append(f"{folder.name} mixes sizes or types: {', '.join(sizes)}")
    spacing = [float(row["spacing_mm"]) for row in manifest.values() if row.get("spacing_mm")]
    if spacing:
        print(f"  pixel spacing: {min(spacing):.3f} to {max(spacing):.3f} mm, median {np.median(spacing):.3f}")
        odd += [f"{folder.name}/{name} has a pixel spacing of {row['spacing_mm']} mm" for name, row in manifest.items()
                if row.get("spacing_mm") and not 0.1 <= float(row["spacing_mm"]) <= 4]
    for low, high, name, share in zip(BANDS, BANDS[1:], NAMES, counts / max(1, counts.sum()), strict=False):
        print(f"  {low:6d} .. {high - 1:5d} HU {share:6.1%} {'#' * round(40 * share):40s} {name}")
    return odd, seen | {f"patient {patient}": folder.name for patient in slices}, chosen


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m datasets.inspect", description=__doc__)
    parser.add_argument("data", metavar="DIR", type=Path, help="prepared data, or one folder of .npy files")
    parser.add_argument("--sheet", metavar="PNG", type=Path, help="contact sheet to write (default: DIR/sheet.png)")
    args = parser.parse_args(argv)
    folders = [args.data / f"{part}_img" for part in ("train", "val", "test") if (args.data / f"{part}_img").is_dir()]
    folders = [folder for folder in folders or [args.data] if any(folder.glob("[!.]*.npy"))]
    if not folders:
        sys.exit(f"{args.data} holds no .npy files, nor does a train_img/, val_img/ or test_img/ in it.")
    odd, seen, rows = [], {}, {}
    for folder in folders:
        found, keys, rows[folder.name] = inspect(folder)
        odd += found + [f"{keys[key]} and {seen[key]} share {key if ' ' in key else 'one slice'}"
                        for key in sorted(keys.keys() & seen.keys())]
        seen |= keys
    print(f"\n{len(odd)} suspicious" + (":" if odd else ""))
    print("\n".join(f"  {line}" for line in odd[:50]) + (f"\n  and {len(odd) - 50} more" if len(odd) > 50 else ""))
    if any(rows.values()):
        sheet = args.sheet or args.data / "sheet.png"
        draw_sheet({name: slices for name, slices in rows.items() if slices}, sheet)
        print(f"Contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
