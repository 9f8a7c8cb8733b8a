"""Arrays of numbers in the files that scanners and laboratories write: `.npy`, HDF5, MATLAB, and stacks of TIFF images.

Nothing is unpickled, sizes are known before anything large is read, and an HDF5 file reaches into no other file.
"""

import math
import re
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from datasets.series import Refused, refuse_on_error

WHOLE = 2**33  # bytes, the most that is read at once
BLOCK = 2**28  # bytes of neighbouring slices that are read together: in many files they lie interleaved
TIFF = (".tif", ".tiff")
HDF5 = (".h5", ".hdf5", ".nxs")


@dataclass(frozen=True, eq=False)
class Stack:
    """An array that stays where it is, on the disk or in memory; its axes are taken in another order."""

    array: object               # shape, dtype, and indexing by slices
    order: tuple[int, ...]      # which of its axes is the first here, and so on

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[axis] for axis in self.order)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        """The i-th along the first axis."""
        together = max(1, BLOCK // max(1, self.dtype.itemsize * math.prod(self.shape[1:])))
        return _block(self, i // together * together, together)[i % together]

    def whole(self) -> np.ndarray:
        """All of it. Raises Refused where that is too much."""
        _limit(self.dtype.itemsize * math.prod(self.shape))
        return np.asarray(self.array[()]).transpose(self.order)

    def ordered(self, *axes: int) -> "Stack":
        """With its axes taken in that order."""
        return Stack(self.array, tuple(self.order[axis] for axis in axes))


@lru_cache(maxsize=1)
def _block(stack: Stack, start: int, count: int) -> np.ndarray:
    index = [slice(None)] * len(stack.order)
    index[stack.order[0]] = slice(start, start + count)
    with refuse_on_error("cannot be read as far as its header says; is it cut off?"):
        return np.asarray(stack.array[tuple(index)]).transpose(stack.order)


def read_arrays(path: Path) -> dict[str, Stack]:
    """{name: array} of a file's integers and floats; a file of one nameless array calls it "". A folder holds TIFF
    images. Raises Refused."""
    kind, turned = path.suffix.lower(), 1
    if not (path.is_dir() or path.is_file()):
        raise Refused("is no regular file")
    if path.is_dir() or kind in TIFF:
        found = {"": _tiff(path)}
    elif kind == ".npy":
        with refuse_on_error("is no whole .npy array"):
            found = {"": np.lib.format.open_memmap(path, mode="r")}
    elif kind in HDF5:
        found = _hdf5(path)
    elif kind == ".mat":
        import h5py  # only these files need it

        turned = -1 if h5py.is_hdf5(path) else 1  # MATLAB 7.3 counts axes from the other end
        found = _hdf5(path) if turned < 0 else _matlab(path)
    else:
        raise Refused("is no sinogram that this program reads (.npy, .h5, .hdf5, .nxs, .mat, TIFF images, or a folder "
                      "of these)")
    return {name: Stack(array, tuple(range(array.ndim))[::turned]) for name, array in found.items()}


def only_array(path: Path) -> np.ndarray:
    """The array of a file that holds one, or numbers in a text file. Raises Refused."""
    if path.suffix.lower() in (".txt", ".csv", ".dat"):
        _limit(20 * path.stat().st_size)
        with refuse_on_error("is no text of numbers alone"):
            return np.loadtxt(path.read_text(encoding="utf-8").replace(",", " ").splitlines(), ndmin=1)
    found = read_arrays(path)
    if len(found) != 1:
        raise Refused(f"holds the arrays {', '.join(sorted(found)) or '(none)'}; expected one")
    return next(iter(found.values())).whole()


def _limit(size: int) -> None:
    if size > WHOLE:
        raise Refused(f"holds {size / 2**30:.0f} GiB that must be read at once; at most {WHOLE / 2**30:.0f} are: save "
                      "it as .npy or uncompressed HDF5")


@refuse_on_error("is no whole HDF5 file")
def _hdf5(path) -> dict:
    """The data sets of a file. It stays open: they are read as they are indexed."""
    import h5py

    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf" and item.shape is not None \
                and item.attrs.get("MATLAB_class", b"") != b"char" and not name.startswith("#"):
            if item.external or item.is_virtual:
                raise Refused(f"keeps {name} in other files; copy it into one")
            found[name] = item

    h5py.File(path).visititems(visit)
    return found


@refuse_on_error("is no whole MATLAB file")
def _matlab(path) -> dict:
    """The arrays of a MATLAB 5 file, those inside structures by path."""
    from scipy.io import loadmat

    _limit(_unpacked(path))

    def arrays(name, value):
        if isinstance(value, dict):
            return {key: array for inner, item in value.items() if not inner.startswith("__")
                    for key, array in arrays(f"{name}/{inner}".lstrip("/"), item).items()}
        return {name: value} if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" else {}

    return arrays("", loadmat(path, simplify_cells=True))


def _unpacked(path) -> int:
    """Bytes of a MATLAB 5 file when decompressed, as the headers of its variables tell."""
    total = 0
    with open(path, "rb") as file:
        order = {b"IM": "<", b"MI": ">"}.get(file.read(128)[126:])
        if order is None:
            raise Refused("is no MATLAB file of version 5 or 7.3; save it by save -v7.3")
        while len(head := file.read(8)) == 8:
            kind, size = struct.unpack(order + "II", head)
            start = file.read(min(size, 256))
            file.seek(size - len(start), 1)
            if kind == 15:  # miCOMPRESSED: the tag inside says how much comes out
                size = struct.unpack(order + "II", zlib.decompressobj().decompress(start, 8))[1]
            total += size
    return total


def _tiff(path) -> np.ndarray:
    """(images, rows, columns) of a folder's images in the order of their numbers, or of a file; one is (rows, columns).
    """
    from PIL import Image, ImageSequence

    files = [path] if path.is_file() else sorted(
        (file for file in path.glob("[!.]*") if file.suffix.lower() in TIFF),
        key=lambda file: re.sub(r"\d+", lambda digits: digits[0].zfill(20), file.name))
    if not files:
        raise Refused("holds neither DICOM-CT-PD files nor TIFF images")
    pages = []
    for number, file in enumerate(files, 1):
        called = f"number {number} of {len(files)}"
        with refuse_on_error(f"holds a TIFF image that cannot be read: {called}"), Image.open(file) as image:
            _limit(4 * image.width * image.height * image.n_frames * len(files))
            for page in ImageSequence.Iterator(image):
                if page.mode not in ("F", "I", "L") and not page.mode.startswith("I;16"):
                    raise Refused(f"holds a TIFF image in colours or bits: {called}")
                pages.append(np.array(page))
                if (pages[-1].shape, pages[-1].dtype) != (pages[0].shape, pages[0].dtype):
                    raise Refused(f"holds TIFF images of different sizes: {called}")
    return np.stack(pages) if len(pages) > 1 else pages[0]
