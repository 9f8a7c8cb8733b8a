"""What training draws for a measurement: its views, its scanner and its noise."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch_radon import transmission_noise

from datasets.loader import Part
from models.degradation import Degradation
from models.levels import LEVELS
from models.presets import Preset
from models.scanner import PublishedScanner, Scanner, merged_bins
from utils.units import FIELD_CM, pixel_cm

# Lengths in mm: source to axis, axis to detector, detector pitch; and bins. A parallel beam has no source.
SCANNERS = (
    (595.0, 490.6, 1.2858, 736),     # Siemens Definition AS+ (headers of TCIA LDCT-and-Projection-data)
    (570.0, 470.0, 1.40, 672),       # Siemens Sensation (DICOM headers; pitch from its field of 500 mm)
    (541.0, 408.075, 1.0239, 888),   # GE LightSpeed (Wang et al., IEEE TMI 25(10), 2006)
    (1000.0, 500.0, 0.388, 1024),    # Varian On-Board Imager on a linear accelerator
    (410.66, 143.08, 0.2, 560),      # laboratory scanner of the Helsinki Tomography Challenge 2022 (Zenodo 6984868)
    (None, None, 0.7, 736),          # parallel beam: a synchrotron's, or a fan beam's rebinned
)
CHANGED = 0.1              # lengths and bins differ from a row's by up to this share
OFFSET = 2.0               # bins by which the middle of a whole detector is off at most; clinical ones have a quarter
FIELD = (0.5, 1.0)         # side of the image in diameters of the circle that a rotation sees
SHORT, LONGEST = 0.2, 270  # share of short scans among fan beams: from 180 degrees and the fan to these degrees
HALF = 0.2                 # share of detectors that see one side, off by
BESIDE = (0.2, 0.4)        # this share of their width (On-Board Imager, half fan: 148 of 397 mm)


def draw_views(u: float, preset: Preset) -> int:
    """Views n_T of a measurement from a uniform draw u.

    With probability `any_view_share` any count from 18 to 288, the angle between two views uniform; of the others, with
    probability `focus_share` one of `focus_views`, else a published level's.
    """
    if u < preset.any_view_share:
        densest, sparsest = 1 / LEVELS[0], 1 / LEVELS[-1]
        return round(1 / (sparsest - u / preset.any_view_share * (sparsest - densest)))
    u = (u - preset.any_view_share) / (1 - preset.any_view_share)
    if u < preset.focus_share:
        return preset.focused[int(u / preset.focus_share * len(preset.focused))]
    return LEVELS[int((u - preset.focus_share) / (1 - preset.focus_share) * len(LEVELS))]


@lru_cache(maxsize=1024)
def scanner_number(seed: int, number: int, n_views: int) -> Scanner:
    """A scan around one of SCANNERS with n views: a whole rotation, a short scan, or one with half a detector.

    It is scaled to the published field of view, so that a patient and his noise stay as large as they are.
    """
    rng = np.random.default_rng([seed, 3, number])
    *lengths, bins = SCANNERS[rng.integers(len(SCANNERS))]
    source, detector, pitch = (x and x * (1 + CHANGED * rng.uniform(-1, 1)) for x in lengths)
    bins = round(bins * (1 + CHANGED * rng.uniform(-1, 1)))
    kind, side, centre, beside, field, start, length = rng.random(7)
    half = kind >= 1 - HALF
    offset = (1 if side < 0.5 else -1) * pitch * (bins * _between(BESIDE, beside) if half else OFFSET * centre)
    reach = bins * pitch / 2 + (abs(offset) if half else -abs(offset))
    fan = 0.0 if source is None else math.atan(reach / (source + detector))
    radius = (source * math.sin(fan) if source else reach) * _between(FIELD, field)
    scale, arc, beam = 5 * FIELD_CM / radius, 360.0, {}
    if source:
        beam = {"source_distance_mm": source * scale, "detector_distance_mm": detector * scale}
        if kind < SHORT:
            arc = _between((180 + 2 * math.degrees(math.asin(radius / source)), LONGEST), length)
    elif not half:
        arc = 180.0
    angles = (360 * start + arc * np.arange(n_views) / n_views).tolist()
    scanner = Scanner(tuple(angles), bins, pitch * scale, 10 * FIELD_CM, beam="fan" if source else "parallel",
                      detector_offset_mm=offset * scale, **beam)
    return merged_bins(scanner, np.zeros((1, bins)), scanner.size)[0]  # as a measured scan is


def _between(ends: tuple[float, float], u: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * u


def draw_scanner(common: np.ndarray, preset: Preset, seed: int) -> PublishedScanner | Scanner:
    """The scanner of a batch, with probability `scanner_share` one of `scanners`. common: the batch's uniform draws."""
    if common is None or common[-5] >= preset.scanner_share:
        return PublishedScanner()
    return scanner_number(seed, int(common[-4] * preset.scanners), draw_views(common[0], preset))


def draw_noise(uniform: np.ndarray, preset: Preset) -> tuple[float, float]:
    """(photons a ray, deviation of the electronic noise in counts) of a slice from its uniform draws (3,).

    With probability `noise_share` photons are log-uniform and electronic noise is uniform; else (inf, 0): no noise.
    """
    if uniform[0] >= preset.noise_share:
        return math.inf, 0.0
    return preset.fewest_photons * (preset.most_photons / preset.fewest_photons) ** uniform[1], \
        preset.electronic * uniform[2]


def add_noise(sinograms: list[torch.Tensor], noise: list[tuple[float, float]], size: int, seed: int,
              indices) -> list[torch.Tensor]:
    """Noisy copies of sinograms (1, n, bins), one a slice: functions of the seed and the sample's index."""
    noisy = []
    for y, (photons, electronic), index in zip(sinograms, noise, indices, strict=True):
        if math.isfinite(photons):
            state = np.random.SeedSequence([seed, 2, index]).generate_state(1, np.uint64)[0]
            generator = torch.Generator(y.device).manual_seed(int(state >> 1))
            y = transmission_noise(y, photons, pixel_cm(size), electronic, generator)
        noisy.append(y)
    return noisy


def draw_measurement(part: Part, degrade: Degradation, preset: Preset):
    """(view counts, (photons, electronic noise) or nothing) of a part's slices; a drawn scanner has its own views."""
    angles = getattr(degrade.scanner, "angles", ())
    return ([len(angles) or draw_views(u[0], preset) for u in part.uniform],
            [draw_noise(u[-3:], preset) for u in part.uniform] if preset.noise_share else [])


def measure(part: Part, degrade: Degradation, x0: torch.Tensor, n_T: list[int], noise, seed: int) -> list[torch.Tensor]:
    """Sinograms (1, n, bins) of a part's truths x0 (B, 1, H, H), as `draw_measurement` drew them."""
    y = degrade.project(x0, n_T)
    return add_noise(y, noise, x0.shape[-1], seed, part.indices) if noise else y
