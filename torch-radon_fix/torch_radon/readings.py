"""What a detector reads, in whole numbers, and the line integral that a reading stands for: torch-radon's readings.

A ray of line integral x gets N ~ Poisson(exp(signal - x)) photons, the electronics add a rounded normal number, and
the sum is divided by k, rounded down and kept within 0 .. bins - 1.
"""

import numpy as np
import torch

from .noise import NoiseGenerator, check_signal, check_sinogram
from .utils import save_arrays

VALUES = 1024  # different line integrals of a lookup table's prior; more are averaged in groups of like size
LARGEST_READING = 2**31 - 1


def _photons(x: torch.Tensor, signal: float, generator: NoiseGenerator) -> torch.Tensor:
    check_signal(signal)
    return torch.poisson(torch.exp(signal - x.double()), generator.on(x.device))


@torch.no_grad()
def emulate_readings(x: torch.Tensor, signal: float, density_normalization: float,
                     generator: NoiseGenerator) -> torch.Tensor:
    """Photon counts of a sinogram, any shape, as int32: Poisson(exp(signal - x/density_normalization))."""
    check_sinogram(x, density_normalization=density_normalization)
    return _photons(x.double() / density_normalization, signal, generator).clamp_max(LARGEST_READING).int()


@torch.no_grad()
def emulate_readings_new(x: torch.Tensor, signal: float, normal_std: float, k: int, bins: int,
                         generator: NoiseGenerator) -> torch.Tensor:
    """Readings 0 .. bins - 1 of a sinogram, any shape, as int32; normal_std: of the electronics, in counts."""
    check_sinogram(x, k=k, bins=bins)
    counts = _photons(x, signal, generator)
    electronic = torch.randn(x.shape, generator=generator.on(x.device), device=x.device, dtype=torch.float64)
    return ((counts + (electronic * normal_std).round()) // k).clamp(0, bins - 1).int()


def readings_lookup(sensor_readings: torch.Tensor, lookup_table: torch.Tensor) -> torch.Tensor:
    """lookup_table[reading] for readings of any shape; the table is (bins,). Raises ValueError for others."""
    lowest, highest = (int(edge) for edge in sensor_readings.aminmax())
    if lookup_table.ndim != 1 or lowest < 0 or highest >= len(lookup_table):
        raise ValueError(f"the readings run from {lowest} to {highest} and the lookup table is "
                         f"{tuple(lookup_table.shape)}; expected a table (bins,) with an entry for each reading")
    return lookup_table[sensor_readings.long()]


def _prior(sinogram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At most VALUES line integrals, ascending, and how often each occurs: (n,) float64."""
    values, counts = sinogram.double().flatten().unique(return_counts=True)
    if len(values) <= VALUES:
        return values, counts.double()
    groups = sinogram.double().flatten().sort().values.tensor_split(VALUES)
    return torch.stack([g.mean() for g in groups]), values.new_tensor([len(g) for g in groups])


def _step(values: torch.Tensor, weights: torch.Tensor, signal: float, bins: int, bright: float, share: float) -> int:
    """The least k for which at least `share` of the readings at or above bins k come from line integrals <= bright."""
    k, photons = 1, torch.exp(signal - values)
    while True:
        above = weights * torch.special.gammainc(torch.full_like(photons, bins * k), photons)  # P(N >= bins k)
        if above[values <= bright].sum() >= share * above.sum():
            return k
        k += 1


def _probabilities(photons: torch.Tensor, normal_std: float, k: int, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The readings that this expected count gives, (n,) int64 with repetitions, and their probabilities (n,)."""
    reach = int(np.ceil(8 * normal_std))
    wide = float(9 * photons.sqrt() + 30)
    first, last = max(0, int(photons - wide)), int(photons + wide)
    n = torch.arange(first, last + 1, dtype=torch.float64, device=photons.device)
    p = torch.exp(torch.xlogy(n, photons) - photons - torch.lgamma(n + 1))
    if reach:
        edges = torch.arange(-reach, reach + 2, dtype=torch.float64, device=photons.device) - 0.5
        normal = torch.special.ndtr(edges / normal_std).diff()
        size = len(p) + 2 * reach
        p = torch.fft.irfft(torch.fft.rfft(p, size) * torch.fft.rfft(normal, size), size).clamp_min(0)
    total = torch.arange(first - reach, last + reach + 1, device=photons.device)
    return (total // k).clamp(0, bins - 1), p


@torch.no_grad()
def compute_lookup_table(sinogram: torch.Tensor, signal: float, normal_std: float, bins: int = 4096,
                         eps: float = 0.01, eps_prob: float = 0.99, eps_k: float = 0.01, verbose: bool = False):
    """Mean and variance of the line integral behind each reading, (bins,) float32 each, and the k of the readings.

    The prior is how often each value occurs in `sinogram`, any shape. k is the least step for which at least eps_prob
    of the readings that do not fit into the bins come from rays through next to nothing: line integrals up to the
    sinogram's eps-quantile plus eps_k. A reading that the prior never gives gets its count's own logarithm as the
    mean, signal - log(k (reading + 1/2)), and one over that count as the variance. verbose: print k.
    """
    check_sinogram(sinogram, bins=bins)
    check_signal(signal)
    values, weights = _prior(sinogram)
    bright = np.quantile(sinogram.double().cpu().numpy(), eps) + eps_k
    k = _step(values, weights, signal, bins, bright, eps_prob)
    moments = values.new_zeros(3, bins)
    for value, weight in zip(values, weights, strict=True):
        reading, p = _probabilities(torch.exp(signal - value), normal_std, k, bins)
        powers = torch.stack([torch.ones_like(value), value, value**2])
        moments.index_add_(1, reading, powers[:, None] * (weight * p))
    total, first, second = moments
    count = (torch.arange(bins, device=values.device) + 0.5) * k
    known = total > 1e-12 * weights.sum()
    mean = torch.where(known, first / total, (signal - count.log()).clamp_min(0))
    variance = torch.where(known, (second / total - mean**2).clamp_min(0), 1 / count)
    if verbose:
        print(f"torch_radon: k = {k}, {int(known.sum())} of {bins} readings occur")
    return mean.float(), variance.float(), k


class ReadingsLookup:
    """Lookup tables of several doses ("levels") of one projector: readings of a sinogram, and back.

    radon: the projector whose random numbers are used; mu, sigma: mean and variance tables (bins,), one a level; ks,
    signals, normal_stds: of each level.
    """

    def __init__(self, radon, bins=4096, mu=None, sigma=None, ks=None, signals=None, normal_stds=None):
        self.radon, self.bins = radon, bins
        self.mu, self.sigma, self.ks, self.signals, self.normal_stds = (
            [] if values is None else list(values) for values in (mu, sigma, ks, signals, normal_stds))

    def add_lookup_table(self, sinogram, signal, normal_std, eps=0.01, eps_prob=0.99, eps_k=0.01, verbose=True):
        """Append a level: `compute_lookup_table` of these arguments."""
        mu, sigma, k = compute_lookup_table(sinogram, signal, normal_std, self.bins, eps, eps_prob, eps_k, verbose)
        for values, value in ((self.mu, mu), (self.sigma, sigma), (self.ks, k), (self.signals, signal),
                              (self.normal_stds, normal_std)):
            values.append(value)

    def emulate_readings(self, sinogram: torch.Tensor, level) -> torch.Tensor:
        """Readings of a sinogram (..., views, bins) at a level, or of each sample at its own, level (B,)."""
        if isinstance(level, torch.Tensor) and level.ndim:
            return torch.stack([self.emulate_readings(x, at) for x, at in zip(sinogram, level, strict=True)])
        return self.radon.emulate_readings_new(sinogram, self.signals[level], self.normal_stds[level], self.ks[level],
                                               self.bins)

    def lookup(self, readings: torch.Tensor, level) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the line integrals behind readings; level as in `emulate_readings`."""
        if isinstance(level, torch.Tensor) and level.ndim:
            pairs = [self.lookup(y, at) for y, at in zip(readings, level, strict=True)]
            return torch.stack([mu for mu, _ in pairs]), torch.stack([sigma for _, sigma in pairs])
        return tuple(readings_lookup(readings, tables[level].to(readings.device)) for tables in (self.mu, self.sigma))

    def save(self, path):
        """Write the tables to an .npz file; `from_file` reads it."""
        save_arrays(path, bins=self.bins, ks=self.ks, signals=self.signals, normal_stds=self.normal_stds,
                    mu=np.array([table.cpu().numpy() for table in self.mu]),
                    sigma=np.array([table.cpu().numpy() for table in self.sigma]))

    @staticmethod
    def from_file(path, radon) -> "ReadingsLookup":
        """The tables that `save` wrote to path."""
        with np.load(path, allow_pickle=False) as saved:
            return ReadingsLookup(radon, int(saved["bins"]), [torch.from_numpy(t) for t in saved["mu"]],
                                  [torch.from_numpy(t) for t in saved["sigma"]], saved["ks"].tolist(),
                                  saved["signals"].tolist(), saved["normal_stds"].tolist())
