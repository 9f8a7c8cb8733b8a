"""Measured sinograms from files: arrays (datasets/arrays.py), DICOM-CT-PD, and the folders of datasets.rebin.

All hold line integrals, -ln(I/I0), or counts that become such. An array is (views, bins), or (N, views, bins) for a
volume, feet to head. DICOM-CT-PD is read by datasets/ctpd.py, and rebinned where it is no rotation of one row.
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from datasets.arrays import only_array, read_arrays
from datasets.counts import line_integrals
from datasets.ctpd import is_projections
from datasets.rebin import GEOMETRY, SINOGRAMS, read_projections
from datasets.series import Refused, refuse_on_error

EXCHANGE = "exchange/data"  # the layout of many beamlines, with data_white, data_dark and theta beside it
AXES = (["bins", "views"], ["bins", "slices", "views"], ["bins", "rows", "views"])
LARGEST = 2**28  # values of one sinogram
MOST_GEOMETRY = 2**22  # characters


def is_measured(path: Path) -> bool:
    """Whether a file or folder holds projections in the DICOM-CT-PD format, or is one that datasets.rebin wrote."""
    return (path / GEOMETRY).is_file() or is_projections(path)


def read_sinograms(path: Path, dataset: str | None = None, *, axes: str | None = None, angles: str | None = None,
                   flat: str | None = None, dark: str | None = None, position: str | None = None):
    """(line integrals (N, views, bins), geometry fields the file itself tells) of a file or a folder.

    The first is read from the disk slice by slice, as it is indexed. dataset: which array of a file; its only one of
    two or three dimensions, or exchange/data, if None. axes: what its axes are, such as "views,rows,bins". angles: a
    file, or an array of this one. flat, dark: numbers, files or arrays of this one; counts are then turned into line
    integrals. position: how the patient lay, where DICOM-CT-PD files do not say. Raises Refused.
    """
    if (path / GEOMETRY).is_file():
        return _rebinned(path)
    if is_projections(path):
        return read_projections(path, position)
    found = read_arrays(path)
    names = [dataset.strip("/")] if dataset else [EXCHANGE] if EXCHANGE in found else [
        name for name, item in found.items() if not name or len(item.shape) < 4 and sum(n > 1 for n in item.shape) > 1]
    if len(names) != 1 or names[0] not in found:
        raise Refused(f"holds the arrays {', '.join(sorted(found)) or '(none)'}; name the sinogram by --dataset")
    name, told = names[0], {}
    array = found[name]
    if len(array.shape) not in (2, 3) or array.dtype.kind not in "iuf" or 0 in array.shape:
        raise Refused(f"holds {array.dtype} of shape {array.shape}; expected line integrals, (views, bins) or "
                      "(N, views, bins)")
    if name == EXCHANGE:  # what lies beside it, unless something else is named
        angles, flat, dark = (given or (key if key in found else None) for given, key in (
            (angles, "exchange/theta"), (flat, "exchange/data_white"), (dark, "exchange/data_dark")))
    axes = axes.split(",") if axes else _usual_axes(array, name)
    if sorted(axes) not in AXES or len(axes) != len(array.shape):
        raise Refused(f"has {len(array.shape)} axes, {array.shape}, and they are said to be {','.join(axes)}; expected "
                      "views and bins, and slices or rows (of a cone beam) where there are three")
    if "rows" in axes:
        told["detector_rows"] = array.shape[axes.index("rows")]
    array = array.ordered(*map(axes.index, sorted(axes, key=("slices", "rows", "views", "bins").index)))
    lines = array if len(axes) == 3 else array.whole()[None]
    if lines.shape[1] * lines.shape[2] > LARGEST:
        raise Refused(f"holds sinograms of {lines.shape[1]} x {lines.shape[2]}; at most 2^28 values are read at once")
    if dark and not flat:
        raise Refused("has a dark field and no flat one, which --flat names")
    if flat:
        lines, told["photons"] = line_integrals(lines, _beside(found, flat), _beside(found, dark or "0"))
    if angles:
        told["angles"] = np.ravel(_beside(found, angles)).astype(float).tolist()
    return lines, {"detector_count": lines.shape[2]} | told


@refuse_on_error(f"lacks {SINOGRAMS} or a sound {GEOMETRY}: python -m datasets.rebin was stopped, and the same command "
                 "goes on")
def _rebinned(path: Path) -> tuple[np.ndarray, dict]:
    """What datasets.rebin wrote."""
    lines = np.lib.format.open_memmap(path / SINOGRAMS, mode="r")
    with open(path / GEOMETRY, encoding="utf-8") as file:
        told = json.loads(file.read(MOST_GEOMETRY))
    if lines.ndim != 3 or lines.dtype != np.float32 or not isinstance(told, dict):
        raise ValueError
    return lines, told


def _usual_axes(array, name: str) -> list[str]:
    """Of the exchange layout what the file says, or views first; else slices first."""
    if name != EXCHANGE:
        return ["slices", "views", "bins"][-len(array.shape):]
    said = getattr(array.array, "attrs", {}).get("axes", "theta:y:x")
    said = said.decode("ascii", "replace") if isinstance(said, bytes) else str(said)
    return [{"theta": "views", "y": "rows", "x": "bins"}.get(axis, axis) for axis in said.split(":")]


def _beside(found, given: str) -> np.ndarray:
    """A number, an array of the same file, or that of another file."""
    with suppress(ValueError):
        return np.array(float(given))
    if given.strip("/") in found:
        return found[given.strip("/")].whole()
    if not Path(given).exists():
        raise Refused(f"holds no array {given}, and there is no file of that name")
    try:
        return only_array(Path(given))
    except Refused as error:
        raise Refused(f"needs {given}, which {error}") from None
