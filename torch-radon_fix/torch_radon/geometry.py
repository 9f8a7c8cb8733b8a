"""What is measured: one frozen description of a 2-D scan, and the coordinates of its rays and pixels in float64.

Conventions (pixel units, origin at the image centre, x right along columns, y down along rows):
pixel (row r, column q) has its centre at x = q - W/2 + 1/2, y = r - H/2 + 1/2; bin k lies at
u_k = (k - det_count/2 + 1/2) * det_spacing + det_offset; theta = 0 has the fan-beam source at (0, source_distance).
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

PAD = 2  # zeros around an image: bilinear samples at its border, and rounding there, never leave the array


@dataclass(frozen=True)
class Geometry:
    """A scan of an image of (height, width) pixels. Tables are found by its `key`, made once from all that it holds."""

    height: int
    width: int
    angles: tuple[float, ...]             # radians, the user's sign, each one a float32 value
    det_count: int
    det_spacing: float                    # pixels between bins
    source_distance: float | None = None  # pixels from source to centre; None: parallel beam
    det_distance: float = 0.0             # pixels from centre to detector (fan beam)
    det_offset: float = 0.0               # pixels by which the detector's centre is shifted along u
    clip_to_circle: bool = False
    weights: str = "published"            # "published": torch-radon's weights; "fdk": true fan-beam weights

    @cached_property
    def key(self) -> str:
        """The same in every process: compiled graphs, which know a geometry by it, are cached on disk."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:24]

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self is other or (isinstance(other, Geometry) and self.key == other.key)

    @cached_property
    def without_angles(self) -> "Geometry":
        """What the scans of a stack have in common."""
        return replace(self, angles=())

    @property
    def scans(self) -> tuple["Geometry", ...]:
        """The scan of every image: this one. `Stacked` has several."""
        return (self,)

    @property
    def fan(self) -> bool:
        return self.source_distance is not None

    @property
    def n_angles(self) -> int:
        return len(self.angles)

    @cached_property
    def source_inside(self) -> bool:
        """Whether the source passes through the image's circumscribed circle: some pixels then lie behind it."""
        return self.fan and self.source_distance <= np.hypot(self.height, self.width) / 2

    @property
    def bins(self) -> np.ndarray:
        """Detector coordinate u of every bin, (det_count,) float64, pixels."""
        return (np.arange(self.det_count) - self.det_count / 2 + 0.5) * self.det_spacing + self.det_offset


@dataclass(frozen=True, eq=False)
class Stacked:
    """The scans of a stack of slices, which differ in nothing but their angles.

    Of a batch, each scan has an equal share of the images, in order.
    """

    scans: tuple[Geometry, ...]

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(" ".join(scan.key for scan in self.scans).encode()).hexdigest()[:24]

    @cached_property
    def n_angles(self) -> int:
        """Rows of the padded sinogram: the most views of a slice."""
        return max(scan.n_angles for scan in self.scans)

    @property
    def source_inside(self) -> bool:
        return self.scans[0].source_inside


def used_bins(geometry: Geometry) -> tuple[int, int]:
    """First and one-past-last bin that a ray through the image hits or a pixel reads, at any angle.

    Every other bin holds zeros after projection and is never read by backprojection, so leaving it out is exact.
    """
    if geometry.clip_to_circle or geometry.source_inside:
        return 0, geometry.det_count
    reach = []
    for radius in (np.hypot(geometry.height, geometry.width) / 2,          # corner: the last ray that hits
                   np.hypot(geometry.height - 1, geometry.width - 1) / 2):  # corner pixel's centre: the last that reads
        if geometry.fan:
            span = geometry.source_distance + geometry.det_distance
            radius *= span / np.sqrt(geometry.source_distance**2 - radius**2)
        reach.append((np.array([-radius, radius]) - geometry.det_offset) / geometry.det_spacing
                     + geometry.det_count / 2 - 0.5)
    hit, read = reach
    first = min(np.ceil(hit[0] - 1e-6), np.floor(read[0] - 1e-6))
    last = max(np.floor(hit[1] + 1e-6), np.floor(read[1] + 1e-6) + 1)
    first = int(np.clip(first, 0, geometry.det_count - 1))
    return first, int(np.clip(last + 1, first + 1, geometry.det_count))


def ray_ends(geometry: Geometry, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, ...]:
    """A point and a direction of each ray: sx, sy, dx, dy, each (len(theta), len(u)) float64."""
    cos, sin = np.cos(theta)[:, None], np.sin(theta)[:, None]
    if geometry.fan:
        near, far = geometry.source_distance, geometry.det_distance
        sx, sy = near * sin + 0 * u, near * cos + 0 * u
    else:
        near = far = 0.71 * max(geometry.height, geometry.width)
        sx, sy = u * cos + near * sin, -u * sin + near * cos
    ex, ey = u * cos - far * sin, -u * sin - far * cos
    return sx, sy, ex - sx, ey - sy


def ray_samples(geometry: Geometry, theta: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
    """Sample positions of each ray of the forward projection (p = h * sum_j I(o + j * l / m), m = ceil(|l|)).

    Returns arrays of shape (len(theta), len(u)): `x`, `y` the first sample in texel indices (0 is the centre of the
    first column or row), `dx`, `dy` the step, float64; `count` int32, the samples that touch the image; `h` float32.
    """
    sx, sy, dx, dy = ray_ends(geometry, theta, u)
    half = np.array([geometry.width / 2, geometry.height / 2])
    with np.errstate(divide="ignore", invalid="ignore"):
        if geometry.clip_to_circle:
            a, b = dx**2 + dy**2, sx * dx + sy * dy
            q = np.sqrt(np.maximum(b**2 - a * (sx**2 + sy**2 - (geometry.det_count / 2) ** 2), 1.0))
            enter, leave = (-b - q) / a, (-b + q) / a
        else:
            enter, leave = np.full(dx.shape, -np.inf), np.full(dx.shape, np.inf)
            for s, d, v in ((sx, dx, half[0]), (sy, dy, half[1])):
                first, second = (-v - s) / d, (v - s) / d
                still, within = d == 0, np.abs(s) <= v
                low = np.where(still, np.where(within, -np.inf, np.inf), np.minimum(first, second))
                high = np.where(still, np.where(within, np.inf, -np.inf), np.maximum(first, second))
                enter, leave = np.maximum(enter, low), np.minimum(leave, high)
        length = np.where(leave > enter, (leave - enter) * np.hypot(dx, dy), 0.0)
        m = np.ceil(length)
        step = np.where(m > 0, (leave - enter) / m, 0.0)
        hit = m > 0
        x = np.where(hit, sx + enter * dx, 0.0) + half[0] - 0.5
        y = np.where(hit, sy + enter * dy, 0.0) + half[1] - 0.5
        dx, dy = np.where(hit, step * dx, 0.0), np.where(hit, step * dy, 0.0)
        # A circle larger than the image has samples that touch no texel: keep those with -1 <= x <= W, -1 <= y <= H.
        first, last = np.zeros(m.shape), np.where(hit, m, -1.0)
        for p, d, size in ((x, dx, geometry.width), (y, dy, geometry.height)):
            one, two = (-1 - p) / d, (size - p) / d
            still, within = d == 0, (p >= -1) & (p <= size)
            enter_at, leave_at = np.ceil(np.minimum(one, two) - 1e-9), np.floor(np.maximum(one, two) + 1e-9)
            first = np.maximum(first, np.where(still, np.where(within, 0, np.inf), enter_at))
            last = np.minimum(last, np.where(still, np.where(within, last, -1), leave_at))
        count = np.maximum(last - first + 1, 0)
        first = np.where(count > 0, first, 0)
        h = np.where(hit, length / np.maximum(m, 1), 0.0)
    return {"x": x + first * dx, "y": y + first * dy, "dx": dx, "dy": dy,
            "count": count.astype(np.int32), "h": h.astype(np.float32)}


def pixel_bins(geometry: Geometry, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Bin position b of every pixel in one view and its backprojection weight, each (height, width) float64.

    Fan beam: 1/(U du), for "fdk" S/(S+D)/(U^2 du); parallel beam: 1/du; zero outside the circle where clipped to it and
    where U = 0: a pixel beside the source, on no ray that meets the detector.
    """
    x = (np.arange(geometry.width) - geometry.width / 2 + 0.5)[None, :]
    y = (np.arange(geometry.height) - geometry.height / 2 + 0.5)[:, None]
    u = x * np.cos(theta) - y * np.sin(theta)
    weight = np.full(u.shape, 1 / geometry.det_spacing)
    if geometry.fan:
        near, span = geometry.source_distance, geometry.source_distance + geometry.det_distance
        depth = near - x * np.sin(theta) - y * np.cos(theta)
        magnification = np.divide(span, depth, out=np.zeros_like(depth), where=depth != 0)  # 1/U
        u = u * magnification
        weight *= magnification**2 * near / span if geometry.weights == "fdk" else magnification
    if geometry.clip_to_circle:
        weight = np.where(np.hypot(x, y) > geometry.det_count / 2, 0.0, weight)
    return (u - geometry.det_offset) / geometry.det_spacing + geometry.det_count / 2 - 0.5, weight
