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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from datasets.privacy import pseudonym
from datasets.series import Refused, refuse_on_error
from datasets.slices import evenly_spaced
from utils.workers import DIED, parallel

FIELDS = {"number": 0x00200013, "slope": 0x00281053, "intercept": 0x00281052, "position": 0x00185100,
          "diameter": 0x00180090, "patient": 0x00100020, "pitch": 0x70291002, "row_pitch": 0x70291006,
          "rows": 0x70291010, "columns": 0x70291011, "shape": 0x7029100B, "angle": 0x70311001, "z": 0x70311002,
          "source": 0x70311003, "span": 0x70311031, "centre": 0x70311033, "shift_1": 0x7033100B,
          "shift_2": 0x7033100C, "shift_3": 0x7033100D, "mode": 0x7033100E, "steps": 0x70331013,
          "spectrum": 0x70331063, "photons": 0x70331065, "log": 0x70391009, "water": 0x70411001}
NEEDED = ("pitch", "rows", "columns", "shape", "angle", "source", "span", "centre", "number", "slope", "intercept")
WORDS = ("shape", "mode", "log", "position", "patient")
LISTS = ("centre", "photons")
SHORT = ("rows", "columns", "steps", "spectrum")  # 16-bit integers; the other private numbers but water are float32
SAME = ("pitch", "row_pitch", "rows", "columns", "shape", "source", "span", "centre", "mode", "water", "position")
SHAPES = {"FLAT": "flat", "CYLINDRICAL": "curved"}
# Degrees from the source's place to the Scanner's angle, and which way that grows, as displayed: left on the right.
POSITIONS = {"HFS": (180, "ccw"), "HFP": (0, "ccw"), "HFDR": (90, "ccw"), "HFDL": (270, "ccw"),
             "FFS": (180, "cw"), "FFP": (0, "cw"), "FFDR": (270, "cw"), "FFDL": (90, "cw")}
LARGEST_ANGLE = 0.01   # radians: a shift of the spot beyond is mm
ROUNDING = 1e-5, 0.01, 0.01  # radians, mm, mm: smaller shifts are none
AXIAL = 0.05  # mm: a scan that moves less along the axis does not move
MOST_STATES = 16
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

    @property
    def head_first(self) -> bool:
        """Whether z grows towards the head."""
        return self.position.startswith("HF")

    @property
    def axial(self) -> bool:
        """Whether it stays in one plane."""
        return np.ptp(self.z) <= AXIAL

    @property
    def plain(self) -> bool:
        """Whether it is a fan beam as it was measured: one row, and neither table nor focal spot moves."""
        return self.rows == 1 and self.axial and not self.states.any()

    def view(self, i: int) -> np.ndarray:
        """Line integrals (rows, columns) float32. Raises Refused."""
        path, frame, slope, intercept = self.files[i]
        with refuse_on_error(f"has a view that cannot be read: number {i + 1} by InstanceNumber"):
            return pydicom.pixels.pixel_array(path, index=frame).T * np.float32(slope) + np.float32(intercept)


def is_projections(path: Path) -> bool:
    """Whether a file, or one of some files of a folder or of those in it, is a view in the DICOM-CT-PD format."""
    return any(_is_view(files[i]) for _, files in _folders(path) for i in evenly_spaced(len(files), 12))


def _is_view(path):
    with suppress(Refused), refuse_on_error("is damaged"):
        return _value(_items(_header(path), 0), "columns") is not None


def _folders(path: Path):
    """(folder, its DICOM files) of a file, or of a folder and those below it, where there are any."""
    for folder, _, names in [(path.parent, [], [path.name])] if path.is_file() else sorted(os.walk(path)):
        files = [file for name in sorted(names) if os.path.isfile(file := os.path.join(folder, name))
                 and pydicom.misc.is_dicom(file)]
        if files:
            yield Path(folder), files


def _header(path):
    """pydicom's dataset without pixels."""
    if pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID.is_deflated:
        raise Refused("is deflated, so that its size is unknown; expected plain DICOM")
    return pydicom.dcmread(path, stop_before_pixels=True)


def _items(stored, frame):
    """Where the fields of a frame may stand, innermost first: its functional groups, the shared ones, the file."""
    own = stored.get("PerFrameFunctionalGroupsSequence", [])[frame:frame + 1]
    items = []
    for group in [*own, *stored.get("SharedFunctionalGroupsSequence", [])]:
        items += [group, *(one for element in group if element.VR == "SQ" for one in element.value)]
    return [*items, stored]


def _value(items, name: str, frame: int = 0, frames: int = 1):
    """The field `name` of the first item that has it: a word, a number, an array (LISTS); None: none has.

    A private tag that no dictionary knows may come as bytes. One number a frame may stand beside the others.
    """
    tag = pydicom.tag.Tag(FIELDS[name])
    value = next((item[tag].value for item in items if tag in item), None)
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        text, kind = name in (*WORDS, "water"), "<u2" if name in SHORT else "<f4"
        value = value.decode("ascii", "replace") if text else np.frombuffer(value, kind)
    if name in WORDS:
        word = str(value).strip("\0 ")
        return word if name == "patient" else word.upper()
    numbers = np.atleast_1d(value.strip("\0 ") if isinstance(value, str) else value).astype(float)
    if not np.isfinite(numbers).all():
        raise Refused(f"has {numbers.tolist()} in the tag {tag}; expected finite numbers")
    return numbers if name in LISTS else float(numbers[frame if len(numbers) == frames else 0])


@refuse_on_error("cannot be parsed as DICOM; is it damaged?")
@pydicom.config.disable_value_validation()
def _views(path) -> list[dict]:
    """A file's views, each FIELDS and a `file` as of Scan; none of another kind of object. Raises Refused."""
    stored, found = _header(path), []
    frames = int(stored.get("NumberOfFrames") or 1)
    for frame in range(frames):
        items = _items(stored, frame)
        if _value(items, "columns", frame, frames) is None:
            return []
        view = {name: _value(items, name, frame, frames) for name in FIELDS}
        needed = (*NEEDED, "row_pitch", "z") if view["rows"] != 1 else NEEDED
        if missing := [name for name in needed if view[name] is None]:
            raise Refused(f"lacks the tag {pydicom.tag.Tag(FIELDS[missing[0]])} of the DICOM-CT-PD format")
        if not frame:
            _check_pixels(stored, path, frames, int(view["columns"]), int(view["rows"]))
        view |= {"number": (int(view["number"]), frame), "file": (path, frame, view["slope"], view["intercept"])}
        found.append(view)
    return found


def _check_pixels(stored, path, frames, columns, rows):
    """Raises Refused unless the file is long enough for its frames, uncompressed."""
    if (stored.Rows, stored.Columns) != (columns, rows):
        raise Refused(f"holds {stored.Rows} x {stored.Columns} pixels for {columns} detector columns and {rows} rows")
    if stored.file_meta.TransferSyntaxUID.is_compressed:
        raise Refused("is compressed; expected plain pixels: decompress it first, for example by gdcmconv --raw")
    if frames * columns * rows * stored.BitsAllocated // 8 > os.path.getsize(path):
        raise Refused(f"is cut off: it has fewer bytes than its {frames} frames need")


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
        read = parallel(_read_file, files, os.cpu_count() or 1, "Reading headers", 64) if len(files) > MANY else [
            *map(_read_file, files)]
        bad = [f"DICOM file {number} of {len(files)} by name {views or DIED}" for number, views in enumerate(read, 1)
               if not isinstance(views, list)]
        reason = f" that can be used: {bad[0]}" if bad else reason
        if any(isinstance(views, list) and views for views in read):
            scans[folder] = read
            if bad:  # a missing view would leave a gap that nobody sees
                raise Refused(f"cannot be used: {bad[0]}")
    if len(scans) != 1:
        raise Refused(f"holds projections in {len(scans)} folders; give one of them" if scans else
                      f"holds no DICOM-CT-PD files{reason}")
    (read,) = scans.values()
    others = read.count([])
    views, notes = _one_spectrum([view for found in read for view in found], spectrum)
    notes = [f"{others} DICOM files beside the views are none and were left out"] * (others > 0) + notes
    return _scan(sorted(views, key=lambda view: view["number"]), position, notes)


def _one_spectrum(views, spectrum):
    """(the views of one spectrum, what is to be said of it). Raises Refused where it must be chosen."""
    found = sorted({int(view["spectrum"] or 0) for view in views})
    if len(found) < 2 and spectrum is None:
        return views, []
    if spectrum not in found:
        raise Refused(f"holds the spectra {', '.join(map(str, found))} (SpectrumIndex); choose one by --spectrum of "
                      "python -m datasets.rebin")
    return [view for view in views if int(view["spectrum"] or 0) == spectrum], [f"spectrum {spectrum} was taken"]


def _scan(views: list[dict], position: str | None, notes: list[str]) -> Scan:
    """The Scan of views in the order of their numbers, checked."""
    _check_same(views)
    first, phi = views[0], np.unwrap([view["angle"] for view in views])
    step = np.median(np.diff(phi)) if len(phi) > 1 else math.tau
    if step == 0:
        raise Refused(f"has the same angle in most of its views, {first['angle']:.4g} radians in (7031,1001)")
    if step < 0:
        views, phi = views[::-1], phi[::-1]
    columns, rows, centre = int(first["columns"]), int(first["rows"]), first["centre"]
    position, said = _position(first["position"], position)
    shifts, moves = spot_shifts(*(np.array([view[f"shift_{i}"] or 0.0 for view in views]) for i in (1, 2, 3)),
                                first["mode"] or "")
    states, state = _states(shifts)
    photons = [one for view in views if (one := view["photons"]) is not None and len(one) == columns]
    scan = Scan(
        files=[view["file"] for view in views], phi=phi, z=np.array([view["z"] or 0.0 for view in views]), state=state,
        states=states, rho=first["source"], d0=first["span"], columns=columns, rows=rows, du=first["pitch"],
        dv=first["row_pitch"] or 1.0, cx=centre[0], cy=centre[1] if len(centre) > 1 else (rows + 1) / 2,
        shape=SHAPES[first["shape"]], position=position, turn=int(first["steps"] or 0) or round(math.tau / abs(step)),
        water=first["water"] or 0.0, diameter=first["diameter"] or 0.0,
        photons=np.mean(photons, axis=0) if len(photons) == len(views) else None,
        patient=pseudonym(first["patient"] or os.path.dirname(first["file"][0]), "patient", keep=False),
        notes=(*notes, *said, *moves))
    if not scan.plain:  # that may have any angles
        numbers = [view["number"][0] for view in views]
        _check_steps("angle", phi, 1e-4, numbers)
        _check_steps("z", scan.z, AXIAL, numbers)
    return scan


def _position(told: str | None, wanted: str | None) -> tuple[str, list[str]]:
    """(how the patient lay, what is to be said of it). Raises Refused."""
    if not told and not wanted:
        raise Refused("does not say how the patient lay (PatientPosition), so that left and right are unknown; say it "
                      f"by --position, one of {', '.join(POSITIONS)}")
    position = wanted or told
    if position not in POSITIONS:
        raise Refused(f"has the PatientPosition {position}; expected one of {', '.join(POSITIONS)}")
    differs = told and told != position
    return position, [f"its PatientPosition is {told}, and --position {position} was taken"] if differs else []


def _states(shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places of the focal spot (states, 3), which one each view has) of shifts (views, 3). Raises Refused."""
    states, state = np.unique(np.round(shifts / ROUNDING).astype(int), axis=0, return_inverse=True)
    state, numbers = state.ravel(), range(len(states))
    apart = max(np.diff(np.flatnonzero(state == s), prepend=-1, append=len(state)).max() for s in numbers)
    if len(states) > MOST_STATES or apart > 4 * len(states):
        raise Refused(f"has {len(states)} places of the focal spot, one of them not in {apart - 1} views; expected at "
                      f"most {MOST_STATES} that take turns")
    return np.stack([shifts[state == s].mean(axis=0) for s in numbers]), state


def _check_same(views: list[dict]) -> None:
    """Raises Refused unless the views are those of one scan, of line integrals."""
    first = views[0]
    if max(Counter(view["number"] for view in views).values()) > 1:
        raise Refused("holds two views of one InstanceNumber: keep one scan in a folder")
    for name in SAME:
        if any(not np.array_equal(view[name], first[name]) for view in views):
            raise Refused(f"holds views of different scans: the tag {pydicom.tag.Tag(FIELDS[name])} changes")
    if low := [name for name in ("pitch", "rows", "columns", "source", "span") if first[name] <= 0]:
        raise Refused(f"has {first[low[0]]:g} in the tag {pydicom.tag.Tag(FIELDS[low[0]])}; expected more than 0")
    if any(view["log"] == "NO" for view in views):
        raise Refused("holds intensities (LogFlag NO); expected line integrals, -ln(I/I0)")
    if first["shape"] not in SHAPES:
        raise Refused("has a detector that is neither FLAT nor CYLINDRICAL")


def _check_steps(name: str, values: np.ndarray, least: float, numbers: list[int]) -> None:
    """Raises Refused where a step between views is unlike the others, and by more than `least`."""
    steps = np.diff(values)
    if len(steps) < 2:
        return
    usual = np.median(steps)
    worst = int(np.abs(steps - usual).argmax())
    if abs(steps[worst] - usual) > max(0.6 * abs(usual), least):
        raise Refused(f"has a step of {steps[worst]:.4g} in the tag {pydicom.tag.Tag(FIELDS[name])} after view "
                      f"{min(numbers[worst:worst + 2])}, where {usual:.4g} is usual: views are missing, or it is "
                      "several scans")


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
    if not shifts.any():
        still = mode in ("", "FFSNONE")
        return shifts, [] if still else [f"its flying focal spot ({mode}) has no shifts in the files: none is "
                                         "corrected"]
    tags = ("(7033,100C)", "(7033,100B)") if swapped else ("(7033,100B)", "(7033,100C)")
    moves = "XY" * bool(dphi) + "Z" * bool(dz)  # a slanted anode moves the spot outwards with either
    fits = not mode or all(letter in mode.removeprefix("FFS").replace("NONE", "") for letter in moves)
    return shifts, [f"its focal spot moves by {dphi:.3g} radians ({tags[0]}), {dz:.3g} mm along the axis ({tags[1]}) "
                    f"and {drho:.3g} mm outwards, by the sizes of the numbers" + f", although its mode is {mode}" * (
                        not fits)]
