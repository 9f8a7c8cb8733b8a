"""From a measurement to an image: the only place where a checkpoint, a scanner and sinograms come together.

    r = Reconstructor.from_checkpoint("tiny")
    y = r.simulate(hu, views=36)
    x0_hat, calls = r.run("spdps", y)

`simulate` measures the slice itself. test.py measures x0 = R(slice), its full-view FBP, and compares with that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from models.baselines import BASELINES
from models.checkpoint import load_checkpoint
from models.consistency import ITERATIONS, data_consistency
from models.degradation import Degradation
from models.estimate import Estimate, denoiser
from models.graphs import Graphs
from models.levels import LEVELS, chain_levels, levels_for
from models.methods import METHODS
from models.samplers import SAMPLERS, redegrade, shift
from models.scanner import PublishedScanner, Scanner, to_pixels
from models.trust import FEW, half_widths, load_error_network, scale_at, undetermined
from models.unet import UNet, to_bf16
from models.weights import find_checkpoint
from utils.device import chosen_device
from utils.errors import InputError
from utils.units import FIELD_CM, hu_to_mu

CHOICES = {"protocol": ("cvg", "cvg-official"), "precision": ("fp32", "bf16")}


@dataclass
class Reconstructor:
    """A network, a scanner and how they work together. Without a network it has the baselines alone."""

    network: UNet | None = None
    scanner: PublishedScanner | Scanner = field(default_factory=PublishedScanner)
    device: str = "cpu"
    precision: str = "fp32"                     # of the network: fp32 or bf16
    protocol: str = "cvg"                       # cvg-official: D' = D R on estimates, which are not clipped
    dc: int = 0                                 # iterations of data consistency after every network call
    mirror: bool = False                        # every second network call sees the image mirrored
    levels: tuple[int, ...] | None = None       # chains pass through these, where denser than the measurement
    published_levels: tuple[int, ...] = LEVELS  # those that the network was trained for
    header: dict = field(default_factory=dict)  # of the checkpoint
    path: Path | None = None                    # and its file
    graphs: Callable = field(default_factory=Graphs, repr=False, compare=False)  # models.graphs.directly: without

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"The {name} is {getattr(self, name)!r}; expected {' or '.join(choices)}.")
        if self.dc < 0 or self.levels is not None and not self.levels:
            raise InputError(f"dc is {self.dc} and levels are {self.levels}; expected 0 or more, and some or None.")

    @classmethod
    def from_checkpoint(cls, name: str | Path = "tiny", *, device: str | None = None, **given) -> "Reconstructor":
        """What a checkpoint says, unless a keyword says otherwise.

        name: a known name (tiny, cvg-diff), a file, or hf://owner/repository/file. device: a GPU if there is one.
        given: scanner, precision, protocol, dc, mirror and levels, as above; None is as if it were not given. Weights
        that were trained with data consistency have dc 24 and mirrored calls by default, others neither; with dc 0
        calls are not mirrored. Raises InputError with a sentence for what cannot be.
        """
        device, path = chosen_device(device), find_checkpoint(str(name))
        network, header = load_checkpoint(path)
        if header.get("predicts"):
            raise InputError(f"{path} predicts errors, not images; it serves the checkpoint beside it by --trust.")
        trained_with = header.get("training", {}).get("preset", {}).get("dc", 0)
        said = {"protocol": header.get("protocol", "cvg"), "dc": ITERATIONS if trained_with else 0}
        said |= {key: value for key, value in given.items() if value is not None}
        said.setdefault("mirror", bool(trained_with and said["dc"]))
        return cls(to_device(network, device, said.get("precision", "fp32")), device=device, header=header, path=path,
                   published_levels=tuple(header.get("levels", LEVELS)), **said)

    @property
    def degrade(self) -> Degradation:
        """D in the scanner's geometry."""
        return Degradation(self.scanner, self.protocol == "cvg-official", self.graphs)

    @property
    def multiple(self) -> int:
        """Sides of images must be divisible by this."""
        return self.network.config.multiple if self.network else 1

    def simulate(self, hu: np.ndarray | torch.Tensor, views: int) -> torch.Tensor:
        """Sinograms y = P_n x of HU slices (H, H) or (B, H, H), without noise: (B, 1, n, bins). Raises InputError."""
        mu = hu_to_mu(torch.as_tensor(np.asarray(hu), dtype=torch.float32))
        if mu.ndim not in (2, 3) or mu.shape[-2] != mu.shape[-1] or views < 1:
            raise InputError(f"The slices are {tuple(mu.shape)} and the views {views}; expected HU, (H, H) or "
                             "(B, H, H), and one view or more.")
        return self.degrade.project(mu.reshape(-1, 1, *mu.shape[-2:]).to(self.device), views)

    def sinograms(self, lines: np.ndarray) -> torch.Tensor:
        """Line integrals (views, bins) or (B, views, bins), as the real scanner measured them, for `run`."""
        y = to_pixels(self.scanner, np.asarray(lines), self.scanner.size)
        return y.reshape(-1, 1, *y.shape[-2:]).to(self.device)

    def chain(self, n_views: int) -> tuple[int, ...]:
        """The levels that a chain from n_views visits, densest first."""
        if self.levels is not None:
            return levels_for(n_views, self.levels)
        kind = self.network.config.conditioning if self.network else "level"
        return chain_levels(n_views, kind, self.dc, self.published_levels)

    def check(self, method: str) -> None:
        """Raises InputError with a sentence where there is no such method or the network cannot do it."""
        if method not in METHODS:
            raise InputError(f"There is no method {method}; expected one of {', '.join(METHODS)}.")
        if method in SAMPLERS and self.network is None:
            raise InputError(f"{method} needs a network; give a checkpoint, or choose {', '.join(BASELINES)}.")
        if method in SAMPLERS and SAMPLERS[method].two_pass:
            config = self.network.config
            if config.channels < 2 or config.anchored:
                raise InputError(f"{method} needs a network with a two-pass residual channel, and this checkpoint "
                                 f"({self.path}) has none; choose another method, or a checkpoint trained with "
                                 "--preset reco, or --channels 2 --residual-channel two-pass.")

    def told(self, photons: float | None, size: int) -> float | None:
        """The photons that give as much noise in the published field of view, which is what networks know."""
        return photons and photons * (self.scanner.pixel_cm(size) * size / FIELD_CM) ** 2

    @torch.no_grad()
    def run(self, method: str, y: torch.Tensor, size: int | None = None, *, photons: float | None = None,
            electronic: float = 0.0, callback=None, **options) -> tuple[torch.Tensor, list[int]]:
        """(x0_hat (B, 1, size, size) in mu, network calls of each slice) from sinograms of one view count.

        y: (B, 1, n, bins) in 1/cm x pixels, as `simulate` and `sinograms` give them; nothing else of the truth is seen.
        size: the scanner's for such a y, if None. photons, electronic: of a noisy measurement, where known (see
        models/consistency.py). callback(slices, n_t, x0_hat): sees every network call. options: the method's own.
        """
        self.check(method)
        size, n, degrade = size or self.scanner.size_of(y.shape[-1]), y.shape[-2], self.degrade
        if method in BASELINES:
            return BASELINES[method].run(degrade, y, size, **options), [0] * len(y)
        consistency = data_consistency(degrade, y, self.dc, photons, electronic)
        x_T = degrade.fbp(y, size)
        denoise = denoiser(self.network, self.protocol == "cvg", self.precision, self.published_levels,
                           self.told(photons, size), self.graphs)
        update, sampler = redegrade if consistency else shift, SAMPLERS[method]
        estimate = Estimate(denoise, degrade, x_T, n, consistency, self.network.config.anchored, callback,
                            self.mirror and not sampler.two_pass)  # whose second passes would all be mirrored
        if sampler.wraps and self.protocol == "cvg-official" and not consistency:
            options = {"below": self.published_levels} | options
        return sampler.run(estimate, degrade, x_T, self.chain(n), update, **options), estimate.calls

    @torch.no_grad()
    def half_width(self, x0_hat: torch.Tensor, n_views: int, photons: float | None = None, trusted=None):
        """Half width of the 90 % interval of images of n views (models/trust.py), (B, 1, H, H) in mu.

        trusted: (error network, its header) in the place of the one beside the checkpoint. None where there is none.
        Raises InputError for a wrong one.
        """
        if (trusted := trusted or self.error_network) is None:
            return None
        network, header = trusted
        told = self.told(photons, x0_hat.shape[-1])
        width = half_widths(network, x0_hat, undetermined(self.degrade, x0_hat, n_views, FEW),
                            [n_views] * len(x0_hat), x0_hat.new_full((len(x0_hat),), told or torch.inf))
        return width * scale_at(header["scales"], n_views, told)

    @cached_property
    def error_network(self):
        """(error network, its header) of the checkpoint, or None. Raises InputError."""
        return load_error_network(self.path, self.device) if self.path else None


def to_device(network: UNet, device: str, precision: str) -> UNet:
    """The network for evaluation on a device, its weights channels last where convolutions are faster so.

    That is on a GPU, and in bf16 on a CPU; in fp32 a CPU's group norm of such images loses two digits.
    """
    faster = torch.device(device).type == "cuda" or precision == "bf16"
    network.to(device, memory_format=torch.channels_last if faster else torch.contiguous_format)
    return to_bf16(network) if precision == "bf16" else network
