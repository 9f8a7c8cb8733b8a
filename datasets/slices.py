"""Folders of HU `.npy` slices: finding, checking, splitting by patient."""

import codecs
import csv
import hashlib
import io
import math
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from datasets.plausible import ALL_THE_SAME, doubt, not_data
from datasets.series import Refused, refuse_on_error
from utils.errors import InputError, printable
from utils.files import from_cells
from utils.progress import Progress
from utils.units import HU_RANGE

# Data sets that tell the patient first: AAPM's L067_..., DeepLesion's 000001_01_01 (patient, study, series).
KNOWN = re.compile(r"L\d{3}(?=_)|\d{6}(?=_\d\d_\d\d(?:_|$))")
IF_SO = " If it is so, say --patients-from name."


def patient_of(name: str) -> str:
    """Patient of a slice file: as AAPM's and DeepLesion's names tell it, else the name without its `_number`."""
    known = KNOWN.match(Path(name).stem)
    return known[0] if known else re.sub(r"_\d+$", "", Path(name).stem)


def read_manifest(folder: Path) -> list[dict[str, str]]:
    """Rows of FOLDER/manifest.csv, ours or one from a spreadsheet: UTF-8 or UTF-16, commas, semicolons or tabs.

    Empty where there is no such file, or where it has no columns file and patient: that is said once.
    """
    path = folder / "manifest.csv"
    return _rows(path, os.stat(path).st_mtime_ns, os.path.getsize(path)) if path.is_file() else []


@lru_cache
def _rows(path, *version):
    data = path.read_bytes()
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = data.decode("utf-16" if wide else "utf-8-sig", errors="backslashreplace")  # bytes of other encodings
    text = re.sub(r"^sep=.*\n", "", text)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    except (csv.Error, ValueError):
        header, rows = [], []
    names = [name.strip().lower() for name in header]
    if not {"file", "patient"} <= set(names):
        columns = ", ".join(map(ascii, names[:9])) or "of no table"
        print(f"{printable(str(path))} is ignored: it has the columns {columns}; expected file and patient among them.",
              file=sys.stderr)
        return []
    rows = [dict(zip(names, map(str.strip, from_cells(row)), strict=False)) for row in rows]
    return [row for row in rows if row.get("file") and row.get("patient")]


def number_in(row: dict[str, str], column: str) -> float | None:
    """The number in a row of a manifest, with a decimal point or comma; None where there is none."""
    try:
        value = float(row.get(column, "").replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def told_patients(files: list[Path]) -> dict[Path, str]:
    """{file: patient} as the manifests beside the files tell it."""
    return {folder / row["file"]: row["patient"] for folder in {f.parent for f in files}
            for row in read_manifest(folder)}


def patients_of(files: list[Path], source: str | None = None, hide=str) -> list[str]:
    """Patient of each file: from the manifest.csv in its folder, else from its name.

    source: `manifest` or `name`, and only that. hide: as of `unsure`. Raises InputError for a file that no manifest
    tells but should.
    """
    told = {} if source == "name" else told_patients(files)
    if source == "manifest" and (missing := [f for f in files if f not in told]):
        raise InputError(f"No manifest.csv tells the patient of {len(missing)} file(s), such as "
                         f"{hide(missing[0].name)}; expected a row with file and patient in the table beside it.")
    return [told.get(f) or patient_of(f.name) for f in files]


def unsure(files: list[Path], hide=str) -> str:
    """A sentence where nothing but names tells the patients and these make every slice one of its own; else empty.

    hide: what makes pseudonyms of names in it.
    """
    told = told_patients(files)
    bare = [f for f in files if f not in told]
    if len(bare) < 2 or len({f.stem for f in bare}) < len(bare) or any(patient_of(f.name) != f.stem for f in bare):
        return ""
    return (f"By their names, each of {len(bare)} slices is of a patient of its own ({hide(bare[0].name)}, "
            f"{hide(bare[1].name)}), but slices of one scan are alike and must not be parted. Name them "
            "PATIENT_001.npy, or put a manifest.csv with the columns file and patient beside them.")


@refuse_on_error("cannot be read as a .npy array; is it truncated or damaged?")
def open_array(path: str | Path) -> np.ndarray:
    """A `.npy` array, read from the disk as it is indexed. Raises Refused."""
    if not os.path.isfile(path):
        raise Refused("is no regular file")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise Refused("is a .npz archive; expected one .npy array")
    return array


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


def read_slice(path: Path, multiple: int = 1, trust: bool = False) -> np.ndarray:
    """One square HU slice, (H, H) or (1, H, H), as float32 (H, H), clipped to [-1024, 3071].

    Raises InputError unless H is divisible by `multiple`, and for values that are no HU unless `trust`.
    """
    try:
        hu = open_array(path)
    except Refused as error:
        raise InputError(f"{path.name} {not_data(path) or error}.") from None
    hu = hu[0] if hu.ndim == 3 and len(hu) == 1 else hu
    if hu.ndim != 2 or hu.shape[0] != hu.shape[1]:
        raise InputError(f"{path.name} has shape {hu.shape}; expected one square slice.")
    if hu.dtype.kind not in "iuf":
        raise InputError(f"{path.name} holds {hu.dtype}; expected HU as integers or floats.")
    if hu.shape[0] % multiple:
        raise InputError(f"{path.name} is {hu.shape[0]} pixels wide; the network takes sizes divisible by {multiple}.")
    if not np.isfinite(hu).all():
        raise InputError(f"{path.name} holds NaN or infinity; expected finite HU.")
    found = None if trust else doubt(hu)
    if found and found[0] != "warning":
        raise InputError(f"{path.name} {found[1]}{ALL_THE_SAME}.")
    return hu.astype(np.float32).clip(*HU_RANGE)


def read_slices(files: list[Path], multiple: int = 1, strict: bool = False,
                trust: bool = False) -> tuple[list[Path], np.ndarray]:
    """(files kept, their HU (N, H, H) float32). A bad slice, or one of another size, is named, skipped and counted.

    trust: values are HU even where they do not look so. Raises InputError where none is left, or with `strict` at the
    first bad one.
    """
    kept, slices = [], []
    for path in Progress(files, desc="Reading slices", unit="slice", leave=False):
        try:
            hu = read_slice(path, multiple, trust)
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


def remarks(files: list[Path], hu: np.ndarray) -> list[str]:
    """What a person should know of slices (N, H, H) that were read: values that may be no HU, patients by guess."""
    odd = [f"{f.name} {found[1]}" for f, one in zip(files, hu, strict=True) if (found := doubt(one))]
    texts = [f"{len(odd)} of {len(files)} slices may not be what they should: {odd[0]}."] if odd else []
    return [printable(text) for text in [*texts, unsure(files)] if text]


def evenly_spaced(count: int, wanted: int | None) -> list[int]:
    """Indices of `wanted` of `count` slices, evenly spaced; of all where `wanted` is None, 0 or at least `count`."""
    return np.linspace(0, count - 1, min(wanted or count, count)).round().astype(int).tolist()


def split_by_patient(files: list[Path], fraction: float, seed: int = 0,
                     source: str | None = None) -> tuple[list[Path], list[Path]]:
    """(training, validation) files; about `fraction` of the patients validate, at least one, never all.

    source: what tells the patients, as in `patients_of`. Raises InputError for one patient, or where it is unsure.
    """
    owners = patients_of(files, source)
    if source is None and (text := unsure(files)):
        raise InputError(text + IF_SO)
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
    digest = hashlib.sha256("\n".join(f.name for f in files).encode(errors="backslashreplace"))
    digest.update(np.ascontiguousarray(slices))
    return digest.hexdigest()[:16]
