"""DICOM-CT-PD, the projection format of TCIA's LDCT-and-Projection-data: a DICOM file, or frame, a view.

Tags (Chen et al., Med. Phys. 42, 2015, and the collection's manual; FL are little-endian float32, mm and radians):

    (7029,1002) DetectorElementTransverseSpacing, along the arc     (7029,1006) DetectorElementAxialSpacing
    (7029,1010) NumberofDetectorRows                                (7029,1011) NumberofDetectorColumns
    (7029,100B) DetectorShape, CYLINDRICAL or FLAT                  (7031,1003) DetectorFocalCenterRadialDistance, rho
    (7031,1001) DetectorFocalCenterAngularPosition, phi             (7031,1002) DetectorFocalCenterAxialPosition, z
    (7031,1031) ConstantRadialDistance, focal centre to detector    (7031,1033) DetectorCentralElement, from 1
    (7033,100B), (7033,100C) and (7033,100D) shifts of the focal spot, (7033,100E) its mode: see `spot_shifts`
    (7033,1013) NumberofSourceAngularSteps, views a turn            (7033,1063) SpectrumIndex
    (7033,1065) PhotonStatistics, photons of each column            (7039,1009) LogFlag, NO: no line integrals
    (7041,1001) WaterAttenuationCoefficient, 1/mm

Pixels are stored (columns, rows); RescaleSlope and RescaleIntercept turn them into line integrals; InstanceNumber
orders the views; DataCollectionDiameter is the field of view. Seen from the patient table, phi is 0 at 12 o'clock and
grows counterclockwise, column 1 is leftmost with the source at 12 o'clock, and z grows into the gantry.
PatientPosition says what that is in the patient.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from datasets.privacy import pseudonym
from datasets.series import Refused, refuse_on_error
from datasets.slices import evenly_spaced
from utils.workers import DIED, parallel

FIELDS = {"pitch": 0x70291002, "row_pitch": 0x70291006, "rows": 0x70291010, "columns": 0x70291011, "shape": 0x7029100B,
          "angle": 0x70311001, "z": 0x70311002, "source": 0x70311003, "span": 0x70311031, "centre": 0x70311033,
          "shift_1": 0x7033100B, "shift_2": 0x7033100C, "shift_3": 0x7033100D, "mode": 0x7033100E, "steps": 0x70331013,
          "spectrum": 0x70331063, "photons": 0x70331065, "log": 0x70391009, "water": 0x70411001}
NEEDED = ("pitch", "rows", "columns", "shape", "angle", "source", "span", "centre")
TEXT = ("shape", "mode", "log", "water")  # rows, columns, steps and spectrum are 16-bit integers, all others float32
SAME = ("pitch", "row_pitch", "rows", "columns", "shape", "source", "span", "centre", "mode", "water", "position")
SHAPES = {"FLAT": "flat", "CYLINDRICAL": "curved"}
# Degrees from the source's place to the Scanner's angle, and which way that grows, as displayed: left on the right.
POSITIONS = {"HFS": (180, "ccw"), "HFP": (0, "ccw"), "HFDR": (90, "ccw"), "HFDL": (270, "ccw"),
             "FFS": (180, "cw"), "FFP": (0, "cw"), "FFDR": (270, "cw"), "FFDL": (90, "cw")}
LARGEST_ANGLE = 0.01   # radians: a shift of the spot beyond is mm
ROUNDING = 1e-5, 0.01, 0.01  # radians, mm, mm: smaller shifts are none
MOST_STATES = 16
DAMAGED = "cannot be parsed as DICOM; is it damaged?"
MANY = 2000  # files: from here on processes read their headers


@dataclass(frozen=True, eq=False)
class Scan:
    """The views of one scan, ordered by growing phi. Lengths in mm, angles in radians."""

    files: list[tuple[str, int, float, float]]  # of each view: path, frame, RescaleSlope, RescaleIntercept
    phi: np.ndarray                             # (views,), of the detector's focal centre
    z: np.ndarray                               # (views,)
    state: np.ndarray                           # (views,), index of `states`
    states: np.ndarray                          # (states, 3): shifts dphi, dz, drho of the focal spot
    rho: float                                  # focal centre to axis
    d0: float                                   # focal centre to detector
    columns: int
    rows: int
    du: float                                   # between columns, on the detector
    dv: float                                   # between rows
    cx: float                                   # column of the central ray, from 1
    cy: float                                   # its row
    shape: str                                  # flat or curved
    position: str                               # of POSITIONS
    turn: int                                   # views a turn
    water: float = 0.0                          # 1/mm; 0: not told
    diameter: float = 0.0                       # of the field of view; 0: not told
    photons: np.ndarray | None = None           # of each column without a patient
    patient: str = ""                           # pseudonym
    notes: tuple[str, ...] = ()                 # what was assumed, as sentences about the scan

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each column: the angle at the focal centre and the distance from it, (columns,)."""
        u = (np.arange(1, self.columns + 1) - self.cx) * self.du
        flat = self.shape == "flat"
        return (np.arctan(u / self.d0), np.hypot(u, self.d0)) if flat else (u / self.d0, 0 * u + self.d0)

    def geometry(self) -> dict:
        """Fields of the ideal fan beam, but for its angles."""
        offset, direction = POSITIONS[self.position]
        told = {"angle_offset": float(offset), "direction": direction, "flip_detector": direction == "ccw",
                "patient_position": self.position, "detector_count": self.columns, "detector_pitch_mm": self.du,
                "detector_shape": self.shape, "detector_offset_mm": ((self.columns + 1) / 2 - self.cx) * self.du,
                "source_distance_mm": self.rho, "detector_distance_mm": self.d0 - self.rho}
        extra = {"field_of_view_mm": self.diameter, "water_per_cm": 10 * self.water,
                 "photons": 0.0 if self.photons is None else float(self.photons.mean())}
        return told | {key: value for key, value in extra.items() if value}

    @refuse_on_error("cannot be read as a DICOM-CT-PD view")
    @pydicom.config.disable_value_validation()
    def view(self, i: int) -> np.ndarray:
        """Line integrals (rows, columns) float32. Raises Refused."""
        path, frame, slope, intercept = self.files[i]
        stored = pydicom.dcmread(path)
        pixels = stored.pixel_array if int(stored.get("NumberOfFrames") or 1) == 1 else \
            pydicom.pixels.pixel_array(stored, index=frame)
        if pixels.shape != (self.columns, self.rows):
            raise Refused(f"cannot be used: {os.path.basename(path)} holds {pixels.shape[0]} x {pixels.shape[1]} "
                          f"pixels for {self.columns} detector columns and {self.rows} rows")
        return pixels.T * np.float32(slope) + np.float32(intercept)


def is_projections(path: Path) -> bool:
    """Whether a file, or one of some files of a folder or of those in it, is a view in the DICOM-CT-PD format."""
    for _, files in _folders(path):
        for file in (files[i] for i in evenly_spaced(len(files), 12)):
            if (views := _read_file(file)) and not str(views).startswith(DAMAGED):
                return True
    return False


def _folders(path: Path):
    """(folder, its DICOM files) of a folder and those below it."""
    if path.is_file():
        return [(path.parent, [str(path)] if pydicom.misc.is_dicom(path) else [])]
    found = ((Path(name), [file for file in sorted(os.path.join(name, one) for one in files)
                           if pydicom.misc.is_dicom(file)]) for name, _, files in sorted(os.walk(path)))
    return [(folder, files) for folder, files in found if files]


def _value(items, name, frame, frames):
    """The field `name` of the first of datasets that has it: text, or an array of numbers; None: none has.

    A private tag that no dictionary knows may come as bytes. One value a frame may stand beside the others.
    """
    tag = pydicom.tag.Tag(FIELDS[name])
    value = next((item[tag].value for item in items if tag in item), None)
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        kind = "<u2" if name in ("rows", "columns", "steps", "spectrum") else "<f4"
        value = value.decode("ascii", "replace") if name in TEXT else np.frombuffer(value, kind)
    if name in ("shape", "mode", "log"):
        return str(value).strip("\0 ").upper()
    values = np.atleast_1d(value.strip("\0 ") if isinstance(value, str) else value).astype(float)
    if not np.isfinite(values).all():
        raise Refused(f"has {values.tolist()} in the tag {tag}; expected finite numbers")
    return values[frame:frame + 1] if len(values) == frames > 1 else values


def _groups(item):
    """The item of a functional group with the items of the sequences in it."""
    return [item, *(one for element in item if element.VR == "SQ" for one in element.value)]


@refuse_on_error(DAMAGED)
@pydicom.config.disable_value_validation()
def _views(path):
    """A file's views, each a dict of FIELDS and what else is needed; none of another kind of object."""
    stored = pydicom.dcmread(path, stop_before_pixels=True)
    frames, found = int(stored.get("NumberOfFrames") or 1), []
    shared = [one for item in stored.get("SharedFunctionalGroupsSequence", []) for one in _groups(item)]
    own = [_groups(item) for item in stored.get("PerFrameFunctionalGroupsSequence", [])]
    for frame in range(frames):
        items = [*(own[frame] if frame < len(own) else []), *shared, stored]
        if _value(items, "columns", frame, frames) is None:
            return []
        view = {name: _value(items, name, frame, frames) for name in FIELDS}
        if missing := [str(pydicom.tag.Tag(FIELDS[name])) for name in NEEDED if view[name] is None]:
            raise Refused(f"lacks the tag {missing[0]} of the DICOM-CT-PD format")
        first = {name: next((one.get(name) for one in items if one.get(name) not in (None, "")), None) for name in (
            "InstanceNumber", "RescaleSlope", "RescaleIntercept", "DataCollectionDiameter", "PatientPosition",
            "PatientID")}
        view |= {"position": str(first["PatientPosition"] or "").strip().upper(), "number": (
            int(first["InstanceNumber"]), frame), "diameter": float(first["DataCollectionDiameter"] or 0),
            "patient": str(first["PatientID"] or ""),
            "file": (path, frame, float(first["RescaleSlope"]), float(first["RescaleIntercept"]))}
        found.append({name: float(value[0]) if isinstance(value, np.ndarray) and name not in ("centre", "photons")
                      else value for name, value in view.items()})
    return found


def _read_file(path: str) -> list[dict] | str:
    """`_views`, or why there are none."""
    try:
        return _views(path)
    except Refused as error:
        return str(error)


def read_scan(path: Path, position: str | None = None, spectrum: int | None = None) -> Scan:
    """The scan of a folder, or of the one folder in it that holds projections. Raises Refused.

    position: the patient's, where the files do not say. spectrum: which SpectrumIndex, where there are several.
    """
    scans, reason = {}, ""
    for folder, files in _folders(path):
        workers = os.cpu_count() or 1
        read = parallel(_read_file, files, workers, "Reading headers", 64) if len(files) > MANY else [
            *map(_read_file, files)]
        if any(isinstance(views, list) and views for views in read):
            scans[folder] = files, read
        reason = next((f" that can be used: {os.path.basename(file)} {found}" for file, found in zip(
            files, read, strict=True) if isinstance(found, str)), reason)
    if len(scans) != 1:
        names = ", ".join(sorted(str(folder.relative_to(path)) for folder in scans))
        raise Refused(f"holds projections in {len(scans)} folders ({names}); give one of them" if scans else
                      f"holds no DICOM-CT-PD files{reason}")
    ((files, read),) = scans.values()
    views, others = [], 0
    for file, found in zip(files, read, strict=True):
        if not isinstance(found, list):  # a missing view would leave a gap that nobody sees: refuse the scan
            raise Refused(f"cannot be used: {os.path.basename(file)} {found or DIED}")
        views += found
        others += not found
    views, notes = _one_spectrum(views, spectrum)
    notes = [f"{others} DICOM files beside the views are none and were left out"] * (others > 0) + notes
    return _scan(sorted(views, key=lambda view: view["number"]), position, notes)


def _one_spectrum(views, spectrum):
    found = sorted({int(view["spectrum"] or 0) for view in views})
    if len(found) < 2 and spectrum is None:
        return views, []
    if spectrum not in found:
        raise Refused(f"holds the spectra {', '.join(map(str, found))} (SpectrumIndex); choose one by --spectrum of "
                      "python -m datasets.rebin")
    return [view for view in views if int(view["spectrum"] or 0) == spectrum], [f"spectrum {spectrum} was taken"]


def _scan(views: list[dict], position: str | None, notes: list[str]) -> Scan:
    """The Scan of views in order, checked."""
    first = views[0]
    _check(views)
    if not first["position"] and not position:
        raise Refused("does not say how the patient lay (PatientPosition), so that left and right are unknown; say it "
                      f"by --position, one of {', '.join(POSITIONS)}")
    if first["position"] and position and first["position"] != position:
        notes = [*notes, f"its PatientPosition is {first['position']}, and --position {position} was taken"]
    if (position := position or first["position"]) not in POSITIONS:
        raise Refused(f"has the PatientPosition {position}; expected one of {', '.join(POSITIONS)}")
    shifts, said = spot_shifts(*(np.array([view[f"shift_{i}"] or 0.0 for view in views]) for i in (1, 2, 3)),
                               first["mode"] or "")
    states, state = np.unique(np.round(shifts / ROUNDING).astype(int), axis=0, return_inverse=True)
    if len(states) > MOST_STATES:
        raise Refused(f"has {len(states)} places of the focal spot; expected at most {MOST_STATES} that repeat")
    states = np.stack([shifts[state.ravel() == s].mean(axis=0) for s in range(len(states))])
    phi = np.unwrap([view["angle"] for view in views])
    step = np.median(np.diff(phi)) if len(phi) > 1 else math.tau
    turn = int(first["steps"] or 0) or round(math.tau / abs(step))
    centre = first["centre"]
    photons = [view["photons"] for view in views if view["photons"] is not None]
    order = slice(None, None, 1 if step > 0 else -1)
    return Scan(
        files=[view["file"] for view in views][order], phi=phi[order], z=np.array([view["z"] or 0.0 for view in views])[
            order], state=state.ravel()[order], states=states, rho=first["source"], d0=first["span"],
        columns=int(first["columns"]), rows=int(first["rows"]), du=first["pitch"], dv=first["row_pitch"] or 1.0,
        cx=centre[0], cy=centre[1] if len(centre) > 1 else (first["rows"] + 1) / 2, shape=SHAPES[first["shape"]],
        position=position, turn=turn, water=first["water"] or 0.0, diameter=first["diameter"],
        photons=np.mean(photons, axis=0) if len(photons) == len(views) and {len(one) for one in photons} == {
            int(first["columns"])} else None,
        patient=pseudonym(first["patient"] or os.path.dirname(first["file"][0]), "patient", keep=False),
        notes=(*notes, *said))


def _check(views: list[dict]) -> None:
    """Raises Refused unless the views are those of one scan, without gaps, of line integrals."""
    first, numbers = views[0], Counter(view["number"] for view in views)
    if len(numbers) < len(views):
        raise Refused("holds two views of one InstanceNumber: keep one scan in a folder")
    for name in SAME:
        if any(not np.array_equal(view[name], first[name]) for view in views):
            what = f"the tag {pydicom.tag.Tag(FIELDS[name])}" if name in FIELDS else "PatientPosition"
            raise Refused(f"holds views of different scans: {what} changes")
    if any(view["log"] == "NO" for view in views):
        raise Refused("holds intensities (LogFlag NO); expected line integrals, -ln(I/I0)")
    if first["shape"] not in SHAPES:
        raise Refused("has a detector that is neither FLAT nor CYLINDRICAL")
    if first["rows"] > 1 and not first["row_pitch"]:
        raise Refused("lacks the tag (7029,1006) of the DICOM-CT-PD format")
    if len(views) > 2:
        for name, least in (("angle", 1e-4), ("z", 0.05)):
            values = np.array([view[name] or 0.0 for view in views])
            steps = np.diff(np.unwrap(values) if name == "angle" else values)
            usual = np.median(steps)
            if name == "angle" and not np.ptp([view["z"] or 0.0 for view in views]) > 0.05:
                continue  # one rotation may have any angles
            if (worst := np.abs(steps - usual)).max() > max(0.6 * abs(usual), least):
                number = views[int(worst.argmax())]["number"][0]
                raise Refused(f"has a step of {steps[worst.argmax()]:.4g} in the tag {pydicom.tag.Tag(FIELDS[name])} "
                              f"after view {number}, where {usual:.4g} is usual: views are missing, or it is several "
                              "scans")


def spot_shifts(first: np.ndarray, second: np.ndarray, radial: np.ndarray, mode: str) -> tuple[np.ndarray, list[str]]:
    """(shifts (views, 3) of the focal spot: dphi in radians, dz and drho in mm; what was assumed) of the three tags.

    (7033,100D) is drho. Of the first two, one edition of the manual has the angle first, another the axial shift. Their
    size tells: above 0.01 it is mm, and below it would be no shift in mm, so that it is radians. The mode (FFSNONE,
    FFSZ, FFSXY, FFSXYZ) is compared. Raises Refused.
    """
    sizes = [np.abs(shift).max() for shift in (first, second)]
    if min(sizes) > LARGEST_ANGLE:
        raise Refused(f"has shifts of the focal spot of {sizes[0]:.3g} in (7033,100B) and {sizes[1]:.3g} in (7033,100C)"
                      f"; expected an angle below {LARGEST_ANGLE} radians in one of them")
    swapped = sizes[0] > LARGEST_ANGLE or sizes[1] <= LARGEST_ANGLE and sizes[1] > sizes[0]
    shifts = np.stack([second, first, radial] if swapped else [first, second, radial], axis=1)
    shifts[:, np.abs(shifts).max(axis=0) < ROUNDING] = 0
    dphi, dz, drho = np.abs(shifts).max(axis=0)
    moves = ("XY" if dphi or drho else "") + ("Z" if dz else "")
    if not moves:
        still = mode in ("", "FFSNONE")
        return shifts, [] if still else [f"its flying focal spot ({mode}) has no shifts in the files: none is "
                                         "corrected"]
    tags = ("(7033,100C)", "(7033,100B)") if swapped else ("(7033,100B)", "(7033,100C)")
    fits = not mode or all(letter in mode.removeprefix("FFS").replace("NONE", "") for letter in moves)
    return shifts, [f"its focal spot moves by {dphi:.3g} radians ({tags[0]}), {dz:.3g} mm along the axis ({tags[1]}) "
                    f"and {drho:.3g} mm outwards, by the sizes of the numbers" + f", although its mode is {mode}" * (
                        not fits)]
