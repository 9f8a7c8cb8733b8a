"""What a geometry file may say beyond a Scanner's fields: units, the rows of a cone beam, the number of photons.

    length_unit             mm or cm, of all lengths of the file; their names may then end without _mm
    angle_unit              degree or radian, of angles and angle_offset
    detector_rows           rows of a cone beam that the slices of the sinogram are (told by --axes too)
    detector_row_pitch_mm   between rows, on the detector
    detector_row_offset_mm  shift of the detector's middle row from the plane of the source, towards growing rows
    photons                 of a ray without the object, for the noise; or "none"
"""

import math
from dataclasses import fields
from itertools import permutations

import numpy as np

from models.scanner import Scanner, check_shape, read_geometry
from utils.errors import InputError

CONE_DEGREES = 1.2  # up to here a cone beam's row is a fan beam's to within noise (21-24 HU against 17-22; 52 at 2.3)
ROWS = {"detector_rows": 1, "detector_row_pitch_mm": None, "detector_row_offset_mm": 0.0}
LENGTHS = {name for name in (*(field.name for field in fields(Scanner)), *ROWS) if name.endswith("_mm")}


def read_in_mm(path) -> dict:
    """The fields of a geometry file, lengths in mm. Raises InputError."""
    found = read_geometry(path)
    unit = found.pop("length_unit", "mm")
    if unit not in ("mm", "cm"):
        raise InputError(f"The geometry's length_unit is {unit!r}; expected mm or cm")
    found = {f"{name}_mm" if f"{name}_mm" in LENGTHS else name: value for name, value in found.items()}
    if unit == "cm":
        found |= {name: 10 * found[name] for name in LENGTHS & set(found) if _number(found[name])}
    return found


def in_degrees(found: dict) -> dict:
    """The fields without angle_unit, angles in degrees. Raises InputError for angles that look like radians."""
    found = dict(found)
    unit, angles = found.pop("angle_unit", None), found.get("angles")
    if unit not in (None, "degree", "radian"):
        raise InputError(f"The geometry's angle_unit is {unit!r}; expected degree or radian")
    if unit == "radian":
        def degrees(value):
            return math.degrees(value) if _number(value) else value

        if isinstance(angles, list):
            found["angles"] = [degrees(angle) for angle in angles]
        if isinstance(angles, dict):
            found["angles"] = {key: value if key == "count" else degrees(value) for key, value in angles.items()}
        if "angle_offset" in found:
            found["angle_offset"] = degrees(found["angle_offset"])
    elif unit is None and isinstance(angles, list) and len(angles) > 9 and all(map(_number, angles)) \
            and 0 < max(angles) - min(angles) <= 2 * math.pi:
        raise InputError(f"The {len(angles)} angles span {max(angles) - min(angles):.3g} degrees; they look like "
                         'radians: say "angle_unit": "radian" in the geometry, or "degree" where they are so few')
    return found


def take_photons(found: dict) -> float | None:
    """The photons, which are taken out of the fields: None where they are not told, inf for "none".

    Raises InputError.
    """
    photons = found.pop("photons", None)
    if photons == "none":
        return math.inf
    if photons is not None and not (_number(photons) and photons > 0):
        raise InputError(f"The geometry's photons are {photons!r}; expected a number above 0, or \"none\" for a scan "
                         "without noise")
    return photons


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_axes(scanner: Scanner, shape: tuple[int, int, int]) -> None:
    """Raises InputError where (slices, views, bins) are not the scanner's, and says with what axes they would be."""
    want, names = (len(scanner.angles), scanner.detector_count), ("slices", "views", "bins")
    try:
        check_shape(scanner, shape)
    except InputError as error:
        for order in permutations(range(3)):
            if (shape[order[1]], shape[order[2]]) == want and (shape[0] > 1 or order[0] == 0):
                said = ",".join(names[order.index(axis)] for axis in range(3) if shape[0] > 1 or axis)
                more = ", rows instead of slices where they are those of a cone beam" if shape[0] > 1 else ""
                raise InputError(f"{error}: its axes are in another order, try --axes {said}{more}") from None
        raise


def near_plane(found: dict, count: int) -> tuple[dict, list[int], str]:
    """(fields of a fan beam, rows of a cone beam that are near its plane, what is to be said of the others or "").

    Fields of the rows are taken out, and their distance on the axis is the slices'. Raises InputError.
    """
    given = ROWS | found
    rows, pitch, offset = (given.pop(name) for name in ROWS)
    if rows == 1:
        return given, list(range(count)), ""
    if rows != count or not all(map(_number, (pitch, offset))) or pitch <= 0:
        raise InputError(f"The {count} slices are rows of one detector: the geometry needs detector_row_pitch_mm (and "
                         f"detector_row_offset_mm), and detector_rows is {count} or left out. Slices of their own are "
                         "said by --axes with slices instead of rows")
    if given.get("beam") == "parallel":
        return {"slice_spacing_mm": pitch} | given, list(range(count)), ""
    source, detector = (given.get(name) for name in ("source_distance_mm", "detector_distance_mm"))
    if not (_number(source) and _number(detector) and source > 0 and source + detector > 0):
        raise InputError("The geometry lacks source_distance_mm or detector_distance_mm")
    height = (np.arange(count) - (count - 1) / 2) * pitch + offset
    angle = np.degrees(np.arctan(np.abs(height) / (source + detector)))
    near = np.flatnonzero(angle <= CONE_DEGREES).tolist()
    far = (f"has {count - len(near)} rows beyond {CONE_DEGREES} degrees from the plane of the source, up to "
           f"{angle.max():.1f}: that is a cone beam, which RTK, TIGRE or LEAP reconstruct")
    if not near:
        raise InputError(f"The scan {far}")
    on_axis = source / (source + detector)
    return ({"slice_spacing_mm": pitch * on_axis, "first_slice_mm": float(height[near[0]] * on_axis)} | given, near,
            far if len(near) < count else "")
