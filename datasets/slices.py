"""Folders of HU `.npy` slices: finding, checking, splitting by patient."""

import csv
import hashlib
import re
import sys
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.progress import Progress
from utils.units import HU_RANGE


def patient_of(name: str) -> str:
    """Patient of a slice file: up to the first `_` for AAPM names (L067_...), else the name without its `_number`."""
    aapm = re.match(r"(L\d{3})_", Path(name).stem)
    return aapm[1] if aapm else re.sub(r"_\d+$", "", Path(name).stem)


def read_manifest(folder: Path) -> list[dict[str, str]]:
    """Rows of FOLDER/manifest.csv, which datasets.prepare writes; none where there is no such file."""
    path = folder / "manifest.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        if not {"file", "patient"} <= set(columns):
            raise InputError(f"{path} has the columns {', '.join(columns)}; expected file and patient among them.")
        return list(reader)


def patients_of(files: list[Path]) -> list[str]:
    """Patient of each file: from the manifest.csv in its folder, else from its name."""
    folders = {f.parent for f in files}
    told = {folder / row["file"]: row["patient"] for folder in folders for row in read_manifest(folder)}
    return [told.get(f) or patient_of(f.name) for f in files]


def find_slices(data: str | Path, split: str) -> list[Path]:
    """Sorted `.npy` files of DATA/`split`_img, or of DATA where it has no such folders. InputError: there are none."""
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"The data folder {data} does not exist; expected {split}_img/ or .npy slices in it.")
    folder = data / f"{split}_img"
    if not folder.is_dir():
        if any((data / f"{other}_img").is_dir() for other in ("train", "val", "test")):
            raise InputError(f"{data} has no {split}_img/ folder beside its other splits; add it, or point --data at a "
                             "folder of .npy slices.")
        folder = data
    if files := sorted(folder.glob("[!.]*.npy")):
        return files
    raise InputError(f"{folder} holds no .npy slices; expected HU arrays of one slice each.")


def read_slice(path: Path, multiple: int = 1) -> np.ndarray:
    """One square HU slice, float32 (H, H), clipped to [-1024, 3071]; InputError unless H is divisible by `multiple`."""
    try:
        hu = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path.name} cannot be read as a .npy array ({error}).") from None
    if hu.ndim != 2 or hu.shape[0] != hu.shape[1]:
        raise InputError(f"{path.name} has shape {hu.shape}; expected one square slice.")
    if hu.dtype.kind not in "iuf":
        raise InputError(f"{path.name} holds {hu.dtype}; expected HU as integers or floats.")
    if hu.shape[0] % multiple:
        raise InputError(f"{path.name} is {hu.shape[0]} pixels wide; the network takes sizes divisible by {multiple}.")
    if not np.isfinite(hu).all():
        raise InputError(f"{path.name} holds NaN or infinity; expected finite HU.")
    return hu.astype(np.float32).clip(*HU_RANGE)


def read_slices(files: list[Path], multiple: int = 1, strict: bool = False) -> tuple[list[Path], np.ndarray]:
    """(files kept, their HU (N, H, H) float32). A bad slice, or one of another size, is named, skipped and counted.

    Raises InputError where none is left, or with `strict` at the first bad one.
    """
    kept, slices = [], []
    for path in Progress(files, desc="Reading slices", unit="slice", leave=False):
        try:
            hu = read_slice(path, multiple)
            if slices and hu.shape != slices[0].shape:
                raise InputError(f"{path.name} is {len(hu)} pixels wide, the slices before it {len(slices[0])}.")
        except InputError as error:
            if strict:
                raise InputError(f"{error} (--strict stops at the first bad slice.)") from None
            print(f"Skipped: {error}", file=sys.stderr)
            continue
        kept.append(path)
        slices.append(hu)
    if not kept:
        raise InputError(f"None of the {len(files)} slices in {files[0].parent} can be used; the reasons are above.")
    if len(kept) < len(files):
        print(f"Skipped {len(files) - len(kept)} of {len(files)} slices.", file=sys.stderr)
    return kept, np.stack(slices)


def evenly_spaced(count: int, wanted: int | None) -> list[int]:
    """Indices of `wanted` of `count` slices, evenly spaced; of all where `wanted` is None, 0 or at least `count`."""
    return np.linspace(0, count - 1, min(wanted or count, count)).round().astype(int).tolist()


def split_by_patient(files: list[Path], fraction: float, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """(training, validation) files; about `fraction` of the patients validate, at least one, never all."""
    owners = patients_of(files)
    patients = sorted(set(owners))
    if len(patients) < 2:
        raise InputError(f"All slices belong to one patient ({patients[0]}); splitting by patient needs two or more, "
                         "or train_img/ and val_img/ folders.")
    count = min(max(1, round(fraction * len(patients))), len(patients) - 1)
    held_out = set(np.random.default_rng(seed).permutation(patients)[:count])
    parts = [], []
    for file, owner in zip(files, owners, strict=True):
        parts[owner in held_out].append(file)
    return parts


def fingerprint(files: list[Path], slices: np.ndarray) -> str:
    """Hash of names and contents, to notice data that changed between two runs."""
    digest = hashlib.sha256("\n".join(f.name for f in files).encode())
    digest.update(np.ascontiguousarray(slices))
    return digest.hexdigest()[:16]
