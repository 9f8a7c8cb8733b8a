"""What training draws for a measurement beside its views: the scanner of a batch, and the noise of each slice."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch_radon import transmission_noise

from models.presets import Preset
from models.scanner import PublishedScanner, Scanner
from utils.units import FIELD_CM, pixel_cm

# Lengths in mm: source to axis, axis to detector, detector pitch; and bins. A parallel beam has no source.
SCANNERS = (
    (595.0, 490.6, 1.2858, 736),     # Siemens Definition AS+ (headers of TCIA LDCT-and-Projection-data)
    (570.0, 470.0, 1.40, 672),       # Siemens Sensation (DICOM headers; pitch from its 500 mm field)
    (541.0, 408.075, 1.0239, 888),   # GE LightSpeed (Wang et al., IEEE TMI 25(10), 2006)
    (1000.0, 500.0, 0.388, 1024),    # Varian On-Board Imager on a linear accelerator, full fan
    (410.66, 143.08, 0.2, 560),      # laboratory scanner of the Helsinki Tomography Challenge 2022 (Zenodo 6984868)
    (None, None, 0.7, 736),          # parallel beam, as of a synchrotron, or a fan beam that was rebinned
)
CHANGED = 0.1        # lengths and bins differ from a row's by up to this share
OFFSET = 2.0         # bins by which the detector's middle is off at most; clinical scanners have a quarter
FIELD = (0.5, 1.0)   # side of the image in diameters of the circle that all views see


@lru_cache(maxsize=1024)
def scanner_number(seed: int, number: int) -> Scanner:
    """A scanner around one of SCANNERS, with n equally spaced views from an angle on.

    It is scaled to the published field of view, so that a patient and his noise stay as large as they are.
    """
    rng = np.random.default_rng([seed, 3, number])
    *lengths, bins = SCANNERS[rng.integers(len(SCANNERS))]
    source, detector, pitch = (x and x * (1 + CHANGED * rng.uniform(-1, 1)) for x in lengths)
    bins = round(bins * (1 + CHANGED * rng.uniform(-1, 1)))
    offset = pitch * OFFSET * rng.uniform(-1, 1)
    reach = bins * pitch / 2 - abs(offset)
    radius = reach if source is None else source * math.sin(math.atan(reach / (source + detector)))
    scale = 10 * FIELD_CM / (2 * radius * rng.uniform(*FIELD))
    beam = {"beam": "parallel"} if source is None else {"source_distance_mm": source * scale,
                                                        "detector_distance_mm": detector * scale}
    return Scanner(angles=(rng.uniform(0, 360),), detector_count=bins, detector_pitch_mm=pitch * scale,
                   detector_offset_mm=offset * scale, field_of_view_mm=10 * FIELD_CM, **beam)


def draw_scanner(uniform: np.ndarray, preset: Preset, seed: int) -> PublishedScanner | Scanner:
    """The scanner of a batch from its uniform draws (2,): with probability `scanner_share` one of `scanners`."""
    if uniform[0] >= preset.scanner_share:
        return PublishedScanner()
    return scanner_number(seed, int(uniform[1] * preset.scanners))


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
