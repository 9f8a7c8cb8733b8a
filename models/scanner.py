"""Scanners: the published one in pixels, and any real one in mm and degrees.

Both have `theta(n)`, the angles of n views, radians; `shares(n)`, the share of the rotation that each view (n,) or ray
(n, bins) stands for, times n, None where all have the same; `projector(size, theta)` of torch_radon; `resampled(n)`,
the scanner that has n views; `padded`, the one whose detector FBP needs, and `padding`, the bins that it has more in
front and behind; `pixel_cm(size)`, by which a sinogram becomes line integrals; `size_of(bins)`, the pixels of a side
whose sinogram has so many bins; and `from_zero()`, the scanner that ground truths are made with.

A real scanner in pixels of p = field_of_view_mm / size, for torch_radon's equations (torch-radon_fix/README.md):

    S, D, du, det_offset = (source_distance_mm, detector_distance_mm, detector_pitch_mm, detector_offset_mm) / p
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
from typing import Literal, get_args

import numpy as np
import torch
import yaml
from torch_radon import Radon, RadonFanbeam

from models.redundancy import ray_coverage, ray_weights, view_shares
from utils.errors import InputError
from utils.units import MU_WATER, pixel_cm

PUBLISHED = {"size": 256, "source_distance": 1075, "det_distance": 1075, "det_count": 672, "det_spacing": 2}  # pixels

MOST_GEOMETRY = 4 << 20  # bytes of a geometry file
MOST_NUMBERS = 100_000  # views, bins or pixels of a side: more is a mistake

cached = lru_cache(maxsize=512)  # by value, as scanners are frozen; more than any view count makes of levels


@dataclass(frozen=True)
class PublishedScanner:
    """CvG-Diff's fan beam with n equally spaced views. Other sizes than 256 keep the field of view."""

    start: float = 0.0  # angle of the first view, radians
    padding = 0, 0

    @property
    def padded(self) -> "PublishedScanner":
        return self

    def resampled(self, n_views: int) -> "PublishedScanner":
        return self

    @cached
    def theta(self, n_views: int) -> tuple[float, ...]:
        """start + 2 pi a/n, a = 0..n-1."""
        return tuple((self.start + 2 * np.pi * np.arange(n_views) / n_views).tolist())

    def shares(self, n_views: int) -> None:
        """None: every view counts the same."""

    @cached
    def projector(self, size: int, theta: tuple[float, ...], weights: str = "published") -> RadonFanbeam:
        """S = D = 1075 f, 672 f bins (an even number) 2 pixels apart, f = size/256."""
        f = size / PUBLISHED["size"]
        bins = 2 * math.ceil(PUBLISHED["det_count"] * f / 2)
        return RadonFanbeam(size, theta, PUBLISHED["source_distance"] * f, PUBLISHED["det_distance"] * f, bins,
                            float(PUBLISHED["det_spacing"]), weights=weights)

    def pixel_cm(self, size: int) -> float:
        return pixel_cm(size)

    def size_of(self, bins: int) -> int:
        return bins * PUBLISHED["size"] // PUBLISHED["det_count"]

    def from_zero(self) -> "PublishedScanner":
        return PublishedScanner()


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
    beam: Literal["fan", "parallel"] = "fan"
    source_distance_mm: float = 0.0      # source to axis (fan beam)
    detector_distance_mm: float = 0.0    # axis to detector (fan beam)
    detector_shape: Literal["flat", "curved"] = "flat"
    detector_offset_mm: float = 0.0      # shift of the detector's middle towards growing bins, as they are stored
    water_per_cm: float = MU_WATER       # attenuation of water in this beam
    slice_spacing_mm: float = 1.0        # between sinograms of a volume, feet to head
    angle_offset: float = 0.0            # degrees added to every angle
    direction: Literal["ccw", "cw"] = "ccw"  # in which the source moves as angles grow
    flip_detector: bool = False          # bins grow to the left as seen from the source
    flip_image: Literal["none", "left-right", "up-down"] = "none"
    first_slice_mm: float = 0.0          # height of the first sinogram's plane
    patient_position: Literal["HFS", "HFP", "HFDR", "HFDL", "FFS", "FFP", "FFDR", "FFDL"] = "HFS"  # for DICOM alone

    @property
    def arc(self) -> float:
        """Degrees after which the lines repeat: a rotation, or half of one for a whole detector in a parallel beam."""
        return 360.0 if self.beam == "fan" or any(self.padding) else 180.0

    @property
    def reversed(self) -> bool:
        """Whether bins reach the projector in reversed order."""
        return self.flip_detector != (self.flip_image != "none")

    @property
    def turn(self) -> int:
        """1 where the projector's angles grow with the scanner's, else -1."""
        return (1 if self.direction == "ccw" else -1) * (1 if self.flip_image == "none" else -1)

    @cached
    def theta(self, n_views: int) -> tuple[float, ...]:
        """The angles of `resampled`."""
        theta = self.turn * (np.array(self.resampled(n_views).angles) + self.angle_offset)
        theta += 180 * (self.flip_image == "up-down")
        return tuple(np.radians(np.mod(theta, 360)).tolist())  # small angles keep their digits in float32

    @cached
    def shares(self, n_views: int) -> np.ndarray:
        """Of the views of `resampled`, or of its rays where they do not make a whole rotation on a whole detector."""
        scan = self.resampled(n_views)
        shares, arcs = view_shares(scan.angles, scan.arc)
        shares = (shares * n_views / scan.arc).astype(np.float32)
        if scan.arc == 180 or not (len(arcs) or any(scan.padding)):
            return shares
        low, high = scan.padded.ends
        bins = np.arange(low + scan.detector_pitch_mm / 2, high, scan.detector_pitch_mm)
        return (shares[:, None] * ray_weights(scan.coverage(np.array(scan.angles), bins))).astype(np.float32)

    def coverage(self, angles: np.ndarray, u: np.ndarray) -> np.ndarray:
        """`ray_coverage` of views at these degrees and flat bins at these mm, as the projector has them."""
        arcs, R = view_shares(self.angles, 360)[1], self.source_distance_mm + self.detector_distance_mm
        gamma = self.turn * np.degrees(np.arctan(u / R)) if self.beam == "fan" else 0 * u
        return ray_coverage(angles, gamma, u, arcs, self.ends if any(self.padding) else None)

    @property
    def ends(self) -> tuple[float, float]:
        """Where the flat detector begins and ends, mm from the axis, as the projector has its bins."""
        count, offset, _ = _flat_bins(self)
        offset = -offset if self.reversed else offset
        return offset - count * self.detector_pitch_mm / 2, offset + count * self.detector_pitch_mm / 2

    @property
    def reach(self) -> float:
        """Where the outermost rays through the field of view meet the detector, mm from the axis."""
        r, S = self.field_of_view_mm / 2, self.source_distance_mm
        return r if self.beam == "parallel" else r * (S + self.detector_distance_mm) / math.sqrt(S**2 - r**2)

    @property
    @cached
    def padding(self) -> tuple[int, int]:
        """Bins without measurement that bring the short side of the flat detector to the length of the long one.

        None where the short side sees the whole field of view, or is less than a bin shorter.
        """
        low, high = self.ends
        short, long = sorted((-low, high))
        if long - short <= self.detector_pitch_mm or short >= self.reach:
            return 0, 0
        missing = math.ceil((min(long, self.reach + self.detector_pitch_mm) - short) / self.detector_pitch_mm)
        return (missing, 0) if high > -low else (0, missing)

    @property
    @cached
    def padded(self) -> "Scanner":
        """The scanner with these bins. What the ramp filter spreads into them belongs to the image."""
        if not any(self.padding):
            return self
        count, offset, _ = _flat_bins(self)
        before, after = self.padding
        shift = (after - before) * self.detector_pitch_mm / 2
        return replace(self, detector_shape="flat", detector_count=count + before + after,
                       detector_offset_mm=offset + (-shift if self.reversed else shift))

    @cached
    def projector(self, size: int, theta: tuple[float, ...], weights: str = "fdk") -> Radon | RadonFanbeam:
        """The scan of a size x size image in pixels. The detector is flat: see `to_pixels`."""
        p, (count, offset, _) = self.field_of_view_mm / size, _flat_bins(self)
        du, offset = self.detector_pitch_mm / p, (-offset if self.reversed else offset) / p
        with warnings.catch_warnings():  # a scanner sees a circle, an image is a square: see `scanner_warnings`
            warnings.filterwarnings("ignore", message=".*truncated")
            if self.beam == "parallel":
                return Radon(size, theta, count, du, det_offset=offset)
            return RadonFanbeam(size, theta, self.source_distance_mm / p, self.detector_distance_mm / p, count, du,
                                det_offset=offset, weights=weights)

    def pixel_cm(self, size: int) -> float:
        return self.field_of_view_mm / 10 / size * self.water_per_cm / MU_WATER

    def size_of(self, bins: int) -> int:
        return self.size

    def from_zero(self) -> "Scanner":
        return self

    def thinned(self, n_views: int) -> tuple["Scanner", np.ndarray]:
        """The scan of `n_views` of the views, spread evenly, and their indices."""
        if not 1 <= n_views <= len(self.angles):
            raise InputError(f"--views {n_views}: the sinogram holds {len(self.angles)} views; expected at most these.")
        steps = np.sign(np.diff(self.angles))
        order = np.arange(len(self.angles)) if abs(steps.sum()) == len(steps) else np.argsort(self.angles)
        chosen = np.sort(order[np.arange(n_views) * len(self.angles) // n_views])
        return replace(self, angles=tuple(self.angles[i] for i in chosen)), chosen

    @cached
    def resampled(self, n_views: int) -> "Scanner":
        """The scanner with `n_views` views: its own where they are as many, with even steps between neighbours where
        they are a multiple and make a rotation, else equally spaced from the first angle on, with a whole detector."""
        if n_views == len(self.angles):
            return self
        factor, rest = divmod(n_views, len(self.angles))
        if rest or not factor or any(self.padding) or len(view_shares(self.angles, self.arc)[1]):
            scan = self.padded
            return replace(scan, angles=tuple(self.angles[0] + scan.arc * np.arange(n_views) / n_views))
        own = np.sort(np.mod(self.angles, self.arc))
        steps = np.diff(own, append=own[0] + self.arc)[:, None] * np.arange(factor) / factor
        return replace(self, angles=tuple((own[:, None] + steps).ravel()))


def read_geometry(path: str | Path) -> dict:
    """Fields of a geometry file, JSON or YAML, unchecked. Raises InputError with a sentence."""
    parse = _parse_yaml if str(path).lower().endswith((".yaml", ".yml")) else json.loads
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > MOST_GEOMETRY:
            raise ValueError(f"no regular file of at most {MOST_GEOMETRY >> 20} MiB")
        found = parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # PyYAML's has several lines
        raise InputError(f"The geometry {path} cannot be read ({reason}); expected JSON, or YAML named .yaml") from None
    if not isinstance(found, dict):
        raise InputError(f"The geometry {path} holds a {type(found).__name__}; expected fields and their values")
    return found


def _parse_yaml(text: str):
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 9:
            raise ValueError("it nests deeply or repeats parts by *name, which can make a few lines endless")
    return yaml.load(text, loader)


def make_scanner(found: dict) -> Scanner:
    """A Scanner from fields as a file holds them. Raises InputError with a sentence for what is missing or absurd."""
    known = {field.name: field.type for field in fields(Scanner)}
    if unknown := sorted(map(str, set(found) - set(known))):
        raise InputError(f"The geometry has unknown fields {', '.join(unknown)}; expected some of {', '.join(known)}")
    needed = [field.name for field in fields(Scanner) if field.default is MISSING]
    if found.get("beam", "fan") == "fan":
        needed += ["source_distance_mm", "detector_distance_mm"]
    if missing := [name for name in needed if name not in found]:
        raise InputError(f"The geometry lacks {', '.join(missing)}")
    scanner = Scanner(**{name: _angles(value) if name == "angles" else _checked(name, value, known[name])
                         for name, value in found.items()})
    for name in ("detector_count", "detector_pitch_mm", "field_of_view_mm", "size", "water_per_cm", "slice_spacing_mm"):
        if getattr(scanner, name) <= 0:
            raise InputError(f"The geometry's {name} is {getattr(scanner, name)}; expected more than 0")
    corners = scanner.field_of_view_mm / math.sqrt(2)
    if scanner.beam == "fan" and scanner.source_distance_mm <= corners:
        raise InputError(f"The geometry's source_distance_mm {scanner.source_distance_mm:g} lies inside the image, "
                         f"whose corners are {corners:.0f} mm from the axis")
    if scanner.detector_distance_mm < 0 or (scanner.beam == "parallel" and scanner.detector_shape == "curved"):
        raise InputError("The geometry has a detector_distance_mm below 0, or a curved detector in a parallel beam")
    if max(scanner.size, scanner.detector_count) > MOST_NUMBERS:
        raise InputError(f"The geometry's size or detector_count is over {MOST_NUMBERS}")
    if min(-scanner.ends[0], scanner.ends[1]) <= 0:
        raise InputError(f"The geometry's detector_offset_mm {scanner.detector_offset_mm:g} puts the axis of rotation "
                         f"beside the detector, which reaches from {scanner.ends[0]:.4g} to {scanner.ends[1]:.4g} mm")
    return scanner


def _checked(name: str, value, kind):
    """The value as what a field's annotation says: one of a Literal's choices, a bool, or an int or float."""
    if choices := get_args(kind):
        fits, expected = value in choices, " or ".join(choices)
    elif kind is bool:
        fits, expected = isinstance(value, bool), "true or false"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
        fits, expected = fits and value == kind(value), {int: "a whole number", float: "a finite number"}[kind]
    if not fits:
        raise InputError(f"The geometry's {name} is {value!r:.60}; expected {expected}")
    return kind(value) if kind in (int, float) else value


def _angles(found) -> tuple[float, ...]:
    if isinstance(found, dict):
        if set(found) != {"start", "step", "count"}:
            raise InputError(f"The geometry's angles hold {', '.join(map(str, found))}; expected start, step and count")
        start, step = (_checked(f"angles.{key}", found[key], float) for key in ("start", "step"))
        count = _checked("angles.count", found["count"], int)
        if count > MOST_NUMBERS:
            raise InputError(f"The geometry's angles.count is {count}; expected at most {MOST_NUMBERS}")
        found = [start + step * i for i in range(count)]
    if not isinstance(found, list | tuple) or not found:
        raise InputError("The geometry's angles are no list; expected degrees, one a view, or start, step and count")
    return tuple(_checked("angles", value, float) for value in found)


def merged_bins(scanner: Scanner, lines: np.ndarray, size: int) -> tuple[Scanner, np.ndarray]:
    """Scanner and lines (..., views, bins) with the means of neighbouring bins where they are finer than pixels.

    As many are merged as are at most a pixel wide on the axis, of `size` pixels a side. An image cannot show what finer
    bins add, and what their ramp filter adds are streaks. Bins left over at the end are dropped.
    """
    S, R = scanner.source_distance_mm, scanner.source_distance_mm + scanner.detector_distance_mm
    on_axis = scanner.detector_pitch_mm * (S / R if scanner.beam == "fan" else 1)
    k = math.floor(scanner.field_of_view_mm / size / on_axis + 0.1)
    count = scanner.detector_count // max(k, 1)
    if k < 2 or count < 2:
        return scanner, lines
    shift = (count * k - scanner.detector_count) / 2 * scanner.detector_pitch_mm
    scanner = replace(scanner, detector_count=count, detector_pitch_mm=k * scanner.detector_pitch_mm,
                      detector_offset_mm=scanner.detector_offset_mm + shift)
    lines = np.asarray(lines, np.float32)[..., :count * k]
    return scanner, lines.reshape(*lines.shape[:-1], count, k).mean(-1)


def scanner_warnings(scanner: Scanner) -> list[str]:
    """What no method can make up for, as sentences that go on from the name of a scan."""
    end, found = max(-scanner.ends[0], scanner.ends[1]), []
    if end + scanner.detector_pitch_mm < scanner.reach:
        found.append(f"sees the inner {end / scanner.reach:.0%} of its field of view alone: the image is wrong further "
                     "out; give a smaller field_of_view_mm")
    reach = min(scanner.reach, end)
    unseen = (scanner.coverage(np.arange(360.0), np.linspace(-reach, reach, 65)).sum(0) == 0).mean()
    if unseen < 0.03:
        return found
    arcs, fan = view_shares(scanner.angles, 360)[1], 0.0
    if scanner.beam == "fan":
        fan = 2 * math.degrees(math.asin(scanner.field_of_view_mm / 2 / scanner.source_distance_mm))
    needed = "360 are needed, as its detector sees only one side" if any(scanner.padding) else (
        f"{180 + fan:.0f} in one piece are needed")
    return [*found,
            f"leaves {unseen:.0%} of the lines through the field of view unmeasured: its views cover "
            f"{arcs[:, 1].sum() if len(arcs) else 360:.0f} degrees, and {needed}. Edges along those lines are not in "
            "the data; methods with data consistency do better than fbp"]


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
    if scanner.reversed:
        lines = lines[..., ::-1]
    return torch.from_numpy(np.multiply(lines, 1 / scanner.pixel_cm(size), dtype=np.float32))


def _cubic(rows: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rows (..., n) at fractional indices, by Keys' cubic convolution (a = -1/2); the ends repeat."""
    i = np.floor(position).astype(int)
    f = (position - i).astype(np.float32)
    weights = (((2 - f) * f - 1) * f / 2, ((3 * f - 5) * f**2 + 2) / 2, ((4 - 3 * f) * f + 1) * f / 2,
               (f - 1) * f**2 / 2)
    return sum(w * rows[..., np.clip(i + j, 0, rows.shape[-1] - 1)] for j, w in zip(range(-1, 3), weights, strict=True))

