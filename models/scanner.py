"""Scanners: the published one in pixels, and any real one in mm and degrees.

Both say where views lie and make projectors, and nothing else: `theta(n)`, the projector's angles of n views in
radians; `shares(n)`, the share of the rotation that each stands for, times n, None where all have the same;
`projector(size, theta)` of torch_radon; `size_of(bins)`, the pixels of a side whose sinogram has so many bins; and
`from_zero()`, the scanner that ground truths are made with.

A real scanner's only conversion to pixels: with p = field_of_view_mm / size, the side of a pixel in mm, the projector
(torch-radon_fix/README.md, "Equations") gets

    S = source_distance_mm / p          D = detector_distance_mm / p
    du = detector_pitch_mm / p          det_offset = detector_offset_mm / p
    theta = +-(angle + angle_offset) pi/180     + for ccw, - for cw
    sinogram = line integral / (p / 10) * 0.192 / water_per_cm

so that its FBP is mu in 1/cm on the scale of utils/units.py, where water is 0.192. A detector to be flipped has its
bins reversed and -det_offset. An image to be flipped is another scan: -theta (left-right) or 180 degrees - theta
(up-down), and reversed bins. A curved detector (equal angles between bins, centred on the source) is rebinned to a
flat one at the same distance R = S + D: flat bin u reads the curved one at R arctan(u / R), by cubic convolution (Keys,
IEEE Trans. ASSP 29, 1981).
"""

import json
import math
import warnings
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch_radon import Radon, RadonFanbeam

from utils.errors import InputError
from utils.units import MU_WATER

PUBLISHED = {"size": 256, "source_distance": 1075, "det_distance": 1075, "det_count": 672, "det_spacing": 2}  # pixels

CHOICES = {"beam": ("fan", "parallel"), "detector_shape": ("flat", "curved"), "direction": ("ccw", "cw"),
           "flip_image": ("none", "left-right", "up-down")}


@dataclass(frozen=True)
class PublishedScanner:
    """CvG-Diff's fan beam with n equally spaced views. Other sizes than 256 keep the field of view."""

    start: float = 0.0  # angle of the first view, radians

    def theta(self, n_views: int) -> tuple[float, ...]:
        """start + 2 pi a/n, a = 0..n-1."""
        return _equal_angles(n_views, self.start)

    def shares(self, n_views: int) -> None:
        """None: every view counts the same."""

    def projector(self, size: int, theta: tuple[float, ...], weights: str = "published") -> RadonFanbeam:
        """S = D = 1075 f, 672 f bins (an even number) 2 pixels apart, f = size/256."""
        return _published_projector(size, theta, weights)

    def size_of(self, bins: int) -> int:
        """Pixels of a side whose sinogram has so many bins."""
        return bins * PUBLISHED["size"] // PUBLISHED["det_count"]

    def from_zero(self) -> "PublishedScanner":
        """The scanner with its first view at angle 0."""
        return PublishedScanner()


@lru_cache(maxsize=512)
def _equal_angles(n_views: int, start: float) -> tuple[float, ...]:
    return tuple((start + 2 * np.pi * np.arange(n_views) / n_views).tolist())


@lru_cache(maxsize=512)  # more than any view count makes of levels
def _published_projector(size: int, theta: tuple[float, ...], weights: str) -> RadonFanbeam:
    f = size / PUBLISHED["size"]
    bins = 2 * math.ceil(PUBLISHED["det_count"] * f / 2)
    return RadonFanbeam(size, theta, PUBLISHED["source_distance"] * f, PUBLISHED["det_distance"] * f, bins,
                        float(PUBLISHED["det_spacing"]), weights=weights)


@dataclass(frozen=True)
class Scanner:
    """One rotation about an axis through the middle of the image, measured in the image's plane.

    As the image is displayed: angle 0 has the source below it (under the table of a patient on his back), ccw turns it
    to the right, and bins grow to the right as seen from the source. Other conventions: the last four fields.
    """

    angles: tuple[float, ...]            # degrees, one a view; in a file a list, or {start, step, count}
    detector_count: int                  # bins
    detector_pitch_mm: float             # between bins, on the detector (along the arc of a curved one)
    field_of_view_mm: float              # side of the image
    size: int = 256                      # pixels along that side
    beam: str = "fan"                    # fan or parallel
    source_distance_mm: float = 0.0      # source to axis (fan beam)
    detector_distance_mm: float = 0.0    # axis to detector (fan beam)
    detector_shape: str = "flat"         # flat or curved
    detector_offset_mm: float = 0.0      # shift of the detector's middle towards growing bins, as they are stored
    water_per_cm: float = MU_WATER       # attenuation of water in this beam
    slice_spacing_mm: float = 1.0        # between sinograms of a volume, feet to head
    angle_offset: float = 0.0            # degrees added to every angle
    direction: str = "ccw"               # in which the source moves as angles grow
    flip_detector: bool = False          # bins grow to the left as seen from the source
    flip_image: str = "none"             # none, left-right or up-down

    @property
    def arc(self) -> float:
        """Degrees after which the lines repeat: a rotation, or half of one for a parallel beam."""
        return 360.0 if self.beam == "fan" else 180.0

    def theta(self, n_views: int) -> tuple[float, ...]:
        """Its own angles where n_views are as many, else those of `resampled`."""
        return _views(self, n_views)[0]

    def shares(self, n_views: int) -> tuple[float, ...]:
        """`view_weights` of the same views."""
        return _views(self, n_views)[1]

    def projector(self, size: int, theta: tuple[float, ...], weights: str = "fdk") -> Radon | RadonFanbeam:
        """The scan of a size x size image in pixels. The detector is flat: see `to_pixels`."""
        return _projector(self, size, theta, weights)

    def size_of(self, bins: int) -> int:
        """The scanner's own size, whatever the bins."""
        return self.size

    def from_zero(self) -> "Scanner":
        """The scanner itself."""
        return self

    def thinned(self, n_views: int) -> tuple["Scanner", np.ndarray]:
        """The scan of `n_views` of the views, spread evenly, and their indices."""
        if not 1 <= n_views <= len(self.angles):
            raise InputError(f"--views {n_views}: the sinogram holds {len(self.angles)} views; expected at most these.")
        chosen = np.arange(n_views) * len(self.angles) // n_views
        return replace(self, angles=tuple(self.angles[i] for i in chosen)), chosen

    def resampled(self, n_views: int) -> "Scanner":
        """The same scanner with `n_views` equally spaced views from its first angle on; where they are a multiple of
        its own, these and even steps between neighbours."""
        factor, rest = divmod(n_views, len(self.angles))
        if rest or not factor:
            return replace(self, angles=tuple(self.angles[0] + self.arc * np.arange(n_views) / n_views))
        own = np.sort(np.mod(self.angles, self.arc))
        steps = np.diff(own, append=own[0] + self.arc)[:, None] * np.arange(factor) / factor
        return replace(self, angles=tuple((own[:, None] + steps).ravel()))


def read_geometry(path: str | Path) -> dict:
    """Fields of a geometry file, JSON or YAML, unchecked. Raises InputError with a sentence."""
    try:
        text = Path(path).read_text()
        if str(path).lower().endswith((".yaml", ".yml")):
            import yaml  # only these files need it

            found = yaml.safe_load(text)
        else:
            found = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"The geometry {path} cannot be read ({error}); expected JSON, or YAML named .yaml") from None
    except Exception as error:  # PyYAML's errors have no common base among the built-in ones
        raise InputError(f"The geometry {path} is not valid YAML ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise InputError(f"The geometry {path} holds a {type(found).__name__}; expected fields and their values")
    return found


def make_scanner(found: dict) -> Scanner:
    """A Scanner from fields as a file holds them. Raises InputError with a sentence for what is missing or absurd."""
    known = {field.name: field for field in fields(Scanner)}
    if unknown := sorted(map(str, set(found) - set(known))):
        raise InputError(f"The geometry has unknown fields {', '.join(unknown)}; expected some of {', '.join(known)}")
    needed = [name for name, field in known.items() if field.default is MISSING]
    if found.get("beam", "fan") == "fan":
        needed += ["source_distance_mm", "detector_distance_mm"]
    if missing := [name for name in needed if name not in found]:
        raise InputError(f"The geometry lacks {', '.join(missing)}")
    values = {name: _checked(name, value, known[name].type) for name, value in found.items() if name != "angles"}
    scanner = Scanner(angles=_angles(found["angles"]), **values)
    for name in ("detector_count", "detector_pitch_mm", "field_of_view_mm", "size", "water_per_cm", "slice_spacing_mm"):
        if getattr(scanner, name) <= 0:
            raise InputError(f"The geometry's {name} is {getattr(scanner, name)}; expected more than 0")
    if scanner.beam == "fan" and scanner.source_distance_mm <= scanner.field_of_view_mm / math.sqrt(2):
        raise InputError(f"The geometry's source_distance_mm {scanner.source_distance_mm:g} lies inside the image, "
                         f"whose corners are {scanner.field_of_view_mm / math.sqrt(2):.0f} mm from the axis")
    if scanner.detector_distance_mm < 0 or (scanner.beam == "parallel" and scanner.detector_shape == "curved"):
        raise InputError("The geometry has a detector_distance_mm below 0, or a curved detector in a parallel beam")
    view_weights(scanner)
    return scanner


def _checked(name, value, kind):
    if name in CHOICES and value not in CHOICES[name]:
        raise InputError(f"The geometry's {name} is {value!r}; expected {' or '.join(CHOICES[name])}")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (isinstance(value, kind) if kind in (bool, str) else number and (kind is float or value == int(value))):
        raise InputError(f"The geometry's {name} is {value!r}; expected "
                         f"{ {bool: 'true or false', int: 'a whole number', float: 'a finite number'}[kind]}")
    return kind(value)


def _angles(found) -> tuple[float, ...]:
    if isinstance(found, dict):
        if set(found) != {"start", "step", "count"}:
            raise InputError(f"The geometry's angles hold {', '.join(map(str, found))}; expected start, step and count")
        count = _checked("angles.count", found["count"], int)
        start, step = (_checked(f"angles.{key}", found[key], float) for key in ("start", "step"))
        found = [start + step * i for i in range(count)]
    if not isinstance(found, list | tuple) or not found:
        raise InputError("The geometry's angles are no list; expected degrees, one a view, or start, step and count")
    return tuple(_checked("angles", value, float) for value in found)


def view_weights(scanner: Scanner) -> np.ndarray:
    """Share of the rotation that each view stands for, times their number: (views,) float32, all 1 if equally spaced.

    A rotation that was measured twice counts half each time. Raises InputError where a part of it is missing.
    """
    angles = np.mod(np.array(scanner.angles), scanner.arc)
    places, index, count = np.unique(angles.round(3) % scanner.arc, return_inverse=True, return_counts=True)
    gaps = np.diff(places, append=places[0] + scanner.arc)
    if gaps.max() > 3 * np.median(gaps) + 1e-3:
        raise InputError(f"The views leave a gap of {gaps.max():.1f} degrees where {np.median(gaps):.3g} is usual; a "
                         f"rotation of {scanner.arc:g} degrees is expected (short scans are not supported)")
    share = (gaps + np.roll(gaps, 1)) / 2 / count
    return (share[index] * len(angles) / scanner.arc).astype(np.float32)


def _pose(scanner: Scanner) -> tuple[np.ndarray, bool]:
    """theta of each view, radians, and whether the bins are reversed."""
    theta = (np.array(scanner.angles) + scanner.angle_offset) * (1 if scanner.direction == "ccw" else -1)
    if scanner.flip_image != "none":
        theta = (0 if scanner.flip_image == "left-right" else 180) - theta
    # Small angles keep their digits in the projector's float32.
    return np.radians(np.mod(theta, 360)), scanner.flip_detector != (scanner.flip_image != "none")


def _flat_bins(scanner: Scanner) -> tuple[int, float, np.ndarray | None]:
    """Count and offset (mm) of the flat bins, and where each lies among the measured ones (None: these are flat)."""
    n, pitch, offset = scanner.detector_count, scanner.detector_pitch_mm, scanner.detector_offset_mm
    if scanner.detector_shape == "flat":
        return n, offset, None
    R = scanner.source_distance_mm + scanner.detector_distance_mm
    first, last = ((k - n / 2 + 0.5) * pitch + offset for k in (0, n - 1))
    if max(-first, last) >= R * math.pi / 2:
        raise InputError(f"The curved detector spans {(last - first) / R * 180 / math.pi:.0f} degrees as seen from the "
                         "source; expected less than 90 to each side")
    low, high = R * math.tan(first / R), R * math.tan(last / R)
    count, middle = math.floor((high - low) / pitch) + 1, (low + high) / 2
    u = (np.arange(count) - count / 2 + 0.5) * pitch + middle
    return count, middle, (R * np.arctan(u / R) - first) / pitch


@lru_cache(maxsize=512)
def _views(scanner: Scanner, n_views: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(theta, shares) of n views."""
    scan = scanner if n_views == len(scanner.angles) else scanner.resampled(n_views)
    return tuple(_pose(scan)[0].tolist()), tuple(view_weights(scan).tolist())


@lru_cache(maxsize=64)
def _projector(scanner: Scanner, size: int, theta: tuple[float, ...], weights: str) -> Radon | RadonFanbeam:
    count, offset, _ = _flat_bins(scanner)
    p = scanner.field_of_view_mm / size
    du, offset = scanner.detector_pitch_mm / p, (-offset if _pose(scanner)[1] else offset) / p
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*corners")  # a scanner sees a circle, an image is a square
        if scanner.beam == "parallel":
            return Radon(size, theta, count, du, det_offset=offset)
        return RadonFanbeam(size, theta, scanner.source_distance_mm / p, scanner.detector_distance_mm / p, count, du,
                            det_offset=offset, weights=weights)


def check_shape(scanner: Scanner, shape: tuple[int, ...]) -> None:
    """Raises InputError where (..., views, bins) are not the scanner's."""
    if tuple(shape[-2:]) != (len(scanner.angles), scanner.detector_count):
        raise InputError(f"The sinogram has {shape[-2]} views of {shape[-1]} bins, the geometry "
                         f"{len(scanner.angles)} of {scanner.detector_count}; expected the same (views, bins)")


def to_pixels(scanner: Scanner, lines: np.ndarray, size: int) -> torch.Tensor:
    """Line integrals (..., views, bins) as measured, no unit -> (..., views, flat bins) float32 for `projector`."""
    lines = np.asarray(lines, np.float32)
    check_shape(scanner, lines.shape)
    if not np.isfinite(lines).all():
        raise InputError("The sinogram holds NaN or infinity; expected finite line integrals")
    position = _flat_bins(scanner)[2]
    if position is not None:
        lines = _cubic(lines, position)
    if _pose(scanner)[1]:
        lines = lines[..., ::-1]
    scale = 10 * size / scanner.field_of_view_mm * MU_WATER / scanner.water_per_cm
    return torch.from_numpy(np.multiply(lines, scale, dtype=np.float32))


def _cubic(rows: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rows (..., n) at fractional indices, by Keys' cubic convolution (a = -1/2); the ends repeat."""
    i = np.floor(position).astype(int)
    f = (position - i).astype(np.float32)
    weights = (((2 - f) * f - 1) * f / 2, ((3 * f - 5) * f**2 + 2) / 2, ((4 - 3 * f) * f + 1) * f / 2,
               (f - 1) * f**2 / 2)
    return sum(w * rows[..., np.clip(i + j, 0, rows.shape[-1] - 1)] for j, w in zip(range(-1, 3), weights, strict=True))

