"""Measured sinograms from files: `.npy`, `.h5` and DICOM-CT-PD, the projection format of TCIA's LDCT collection.

All hold line integrals, -ln(I/I0). An array is (views, bins), or (N, views, bins) for a volume, feet to head. A
DICOM-CT-PD folder holds one file a view; these tags describe the scanner (Chen et al., Med. Phys. 42, 2015, and the
collection's manual; FL are little-endian float32, lengths in mm, angles in radians):

    (7029,1002) DetectorElementTransverseSpacing, along the arc     (7029,1010) NumberofDetectorRows
    (7029,100B) DetectorShape, CYLINDRICAL or FLAT                  (7029,1011) NumberofDetectorColumns
    (7031,1001) DetectorFocalCenterAngularPosition, 0 at 12 o'clock, clockwise as displayed
    (7031,1002) DetectorFocalCenterAxialPosition                    (7031,1003) DetectorFocalCenterRadialDistance
    (7031,1031) ConstantRadialDistance, source to detector          (7031,1033) DetectorCentralElement, from 1
    (7033,100B) and (7033,100D) shifts of a flying focal spot       (7041,1001) WaterAttenuationCoefficient, 1/mm
    InstanceNumber orders the views; RescaleSlope and RescaleIntercept turn pixels into line integrals;
    DataCollectionDiameter, where there is one, is the field of view.

One rotation of one detector row is read; a spiral or several rows (a cone) must be rebinned to that first, and a
flying focal spot is refused.
"""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom

from datasets.arrays import only_array, read_arrays
from datasets.counts import line_integrals
from datasets.series import Refused, refuse_on_error

EXCHANGE = "exchange/data"  # the layout of many beamlines, with data_white, data_dark and theta beside it
AXES = (["bins", "views"], ["bins", "slices", "views"], ["bins", "rows", "views"])
LARGEST = 2**28  # values of one sinogram
FIELDS = {"pitch": 0x70291002, "shape": 0x7029100B, "rows": 0x70291010, "columns": 0x70291011, "angle": 0x70311001,
          "z": 0x70311002, "source": 0x70311003, "span": 0x70311031, "centre": 0x70311033, "water": 0x70411001,
          "shift_angle": 0x7033100B, "shift_radius": 0x7033100D}
OPTIONAL = ("water", "shift_angle", "shift_radius", "z")
TEXT = ("shape", "water")  # rows and columns are 16-bit integers, all other fields float32
SHAPES = {"FLAT": "flat", "CYLINDRICAL": "curved"}


def is_projections(path: Path) -> bool:
    """Whether a file, or the first DICOM file of a folder, is a view in the DICOM-CT-PD format."""
    for file in _dicom_files(path):
        with suppress(Refused):
            return FIELDS["columns"] in _header(file)
    return False


def _dicom_files(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return (file for file in files if file.is_file() and pydicom.misc.is_dicom(file))


def read_sinograms(path: Path, dataset: str | None = None, *, axes: str | None = None, angles: str | None = None,
                   flat: str | None = None, dark: str | None = None):
    """(line integrals (N, views, bins), geometry fields the file itself tells) of a file or a folder.

    The first is read from the disk slice by slice, as it is indexed. dataset: which array of a file; its only one of
    two or three dimensions, or exchange/data, if None. axes: what its axes are, such as "views,rows,bins". angles: a
    file, or an array of this one. flat, dark: numbers, files or arrays of this one; counts are then turned into line
    integrals. Raises Refused.
    """
    if is_projections(path):
        return _read_projections(path)
    found = read_arrays(path)
    names = [dataset.strip("/")] if dataset else [EXCHANGE] if EXCHANGE in found else [
        name for name, item in found.items() if not name or len(item.shape) < 4 and sum(n > 1 for n in item.shape) > 1]
    if len(names) != 1 or names[0] not in found:
        raise Refused(f"holds the arrays {', '.join(sorted(found)) or '(none)'}; name the sinogram by --dataset")
    array, (name,), told = found[names[0]], names, {}
    if len(array.shape) not in (2, 3) or array.dtype.kind not in "iuf" or 0 in array.shape:
        raise Refused(f"holds {array.dtype} of shape {array.shape}; expected line integrals, (views, bins) or "
                      "(N, views, bins)")
    if name == EXCHANGE:  # what lies beside it, unless something else is named
        angles, flat, dark = (given or (key in found and key) or None for given, key in (
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


@refuse_on_error("cannot be parsed as DICOM; is it damaged?")
@pydicom.config.disable_value_validation()
def _header(file):
    return pydicom.dcmread(file, defer_size=1024)


def _value(view, name):
    # A number, of several the first, or text. A private tag that no dictionary knows may come as bytes.
    tag = pydicom.tag.Tag(FIELDS[name])
    if tag not in view:
        if name in OPTIONAL:
            return None
        raise Refused(f"lacks the tag {tag} of the DICOM-CT-PD format")
    value = view[tag].value
    if isinstance(value, bytes):
        kind = "<u2" if name in ("rows", "columns") else "<f4"
        value = value.decode("ascii", "replace") if name in TEXT else np.frombuffer(value, kind)
    if isinstance(value, str):
        value = value.strip("\0 ")
    if name == "shape":
        return str(value).upper()
    values = np.atleast_1d(value).astype(float)
    if not np.isfinite(values).all():
        raise Refused(f"has {values.tolist()} in the tag {tag}; expected finite numbers")
    return float(values[0])


@refuse_on_error("cannot be read as a DICOM-CT-PD view")
@pydicom.config.disable_value_validation()
def _read_view(file):
    # (instance number, fields, line integrals (columns,), DataCollectionDiameter)
    view = _header(file)
    fields = {name: _value(view, name) for name in FIELDS}
    if fields["rows"] != 1:
        raise Refused(f"has {fields['rows']:.0f} detector rows, a cone beam: rebin the scan to single rows first")
    row = view.pixel_array.ravel().astype(np.float32) * float(view.RescaleSlope) + float(view.RescaleIntercept)
    if len(row) != fields["columns"]:
        raise Refused(f"holds {len(row)} pixels for {fields['columns']:.0f} detector columns")
    return int(view.InstanceNumber), fields, row, float(view.get("DataCollectionDiameter") or 0)


def _read_projections(path):
    views = []
    for file in _dicom_files(path):
        try:
            views.append(_read_view(file))
        except Refused as error:  # a missing view would leave a gap that nobody sees: refuse the scan
            raise Refused(f"cannot be used: {file.name} {error}") from None
    if not views:
        raise Refused("holds no DICOM-CT-PD files")
    views.sort(key=lambda view: view[0])
    numbers, fields, rows, (diameter, *_) = zip(*views, strict=True)
    if len(set(numbers)) < len(numbers):
        raise Refused("holds two views of one InstanceNumber: keep one scan in a folder")
    first = fields[0]
    for key in ("pitch", "shape", "columns", "source", "span", "centre", "water"):
        if any(field[key] != first[key] for field in fields):
            raise Refused(f"holds views of different scans: the tag {pydicom.tag.Tag(FIELDS[key])} changes")
    if (travel := np.ptp([field["z"] or 0.0 for field in fields])) > 0.05:
        raise Refused(f"is a spiral scan: the source moves {travel:.1f} mm along the patient; rebin it to one rotation "
                      "a slice first")
    if any(field["shift_angle"] or field["shift_radius"] for field in fields):
        raise Refused("was measured with a flying focal spot, which is not supported: rebin it first")
    if first["shape"] not in SHAPES:
        raise Refused("has a detector that is neither FLAT nor CYLINDRICAL")
    geometry = {
        "angles": [math.degrees(field["angle"]) for field in fields], "angle_offset": 180.0, "direction": "cw",
        "detector_count": int(first["columns"]), "detector_pitch_mm": first["pitch"],
        "detector_shape": SHAPES[first["shape"]],
        "detector_offset_mm": ((first["columns"] + 1) / 2 - first["centre"]) * first["pitch"],
        "source_distance_mm": first["source"], "detector_distance_mm": first["span"] - first["source"]}
    if diameter:
        geometry["field_of_view_mm"] = diameter
    if first["water"]:
        geometry["water_per_cm"] = 10 * first["water"]
    return np.stack(rows)[None], geometry
