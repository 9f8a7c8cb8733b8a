"""Evaluation: from a ground truth to a measurement, and from an image to the rows of a result table."""

import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch_radon import transmission_noise

from datasets.counts import estimate_photons
from datasets.series import Refused
from datasets.sinograms import read_sinograms
from datasets.slices import number_in, read_manifest
from models.baselines import sirt
from models.degradation import Degradation
from models.estimate import Estimate
from models.geometry import take_photons
from models.graphs import PLAIN_CALLS
from models.reconstructor import Reconstructor
from models.samplers import SAMPLERS, redegrade, sequential
from models.scanner import PUBLISHED, Scanner, make_scanner, to_pixels
from utils.device import memory, synchronize
from utils.errors import InputError
from utils.files import atomic
from utils.metrics import score
from utils.progress import Progress
from utils.results import append
from utils.units import mu_to_hu

LOSS_AT_512 = 5.0  # dB, of spdps at 18 views: docs/results/size.json


@dataclass(frozen=True)
class Noise:
    """Of a simulated measurement."""

    photons: float | None = None  # I0, photons a ray; None: no noise
    electronic: float = 0.0       # standard deviation of electronic noise, counts
    seed: int = 0

    def truth(self, reconstructor: Reconstructor, mu: torch.Tensor) -> torch.Tensor:
        """What reconstructions of slices mu (B, 1, H, H) are compared with."""
        return reconstructor.degrade.full(mu)

    def measure(self, reconstructor: Reconstructor, x0: torch.Tensor, names: list[str], n_views: int):
        """(reconstructor of these views, their sinograms (B, 1, n, bins)) of slices with the truths x0."""
        return reconstructor, simulate_measurement(x0, n_views, names, reconstructor.degrade, self)

    def held_out(self, x0_hat: torch.Tensor, names: list[str], n_views: int) -> list[str]:
        """As of `Measured`: nothing, as no view is left over."""
        return [""] * len(names)


@dataclass(frozen=True, eq=False)
class Measured:
    """In the place of `Noise`: sinograms that a scanner measured, of which some views are taken and others held out."""

    lines: np.ndarray       # (N, views, bins), as measured
    scanner: Scanner
    index: dict[str, int]   # {name of a slice: which sinogram}
    photons: float | None = None
    electronic: float = 0.0

    def truth(self, reconstructor: Reconstructor, mu: torch.Tensor) -> torch.Tensor:
        """The slices themselves, the FBP of all views."""
        return mu

    def taken(self, names: list[str], chosen: np.ndarray, size: int) -> torch.Tensor:
        """Sinograms (B, 1, chosen, bins) of slices."""
        scanner = replace(self.scanner, angles=tuple(self.scanner.angles[i] for i in chosen))
        return torch.stack([to_pixels(scanner, self.lines[self.index[name]][chosen], size) for name in names])[:, None]

    def measure(self, reconstructor: Reconstructor, x0: torch.Tensor, names: list[str], n_views: int):
        """As of `Noise`."""
        scanner, chosen = self.scanner.thinned(n_views)
        y = self.taken(names, chosen, x0.shape[-1]).to(x0.device)
        return replace(reconstructor, scanner=scanner), y

    def held_out(self, x0_hat: torch.Tensor, names: list[str], n_views: int) -> list[str]:
        """|A x0_hat - y| / |y| of each slice over at most 360 of the views that were not used, as text."""
        rest = np.setdiff1d(np.arange(len(self.scanner.angles)), self.scanner.thinned(n_views)[1])
        if not len(rest):
            return [""] * len(names)
        rest = rest[:: math.ceil(len(rest) / 360)]
        y, size = self.taken(names, rest, x0_hat.shape[-1]).to(x0_hat.device), x0_hat.shape[-1]
        theta = np.array(self.scanner.theta(len(self.scanner.angles)))[rest]
        left = self.scanner.projector(size, tuple(theta.tolist())).forward(x0_hat) - y
        return [f"{one:.5f}" for one in (left.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).tolist()]


def read_measured(data: Path, files: list[Path]) -> Measured:
    """The sinograms of slices in DATA, which datasets.rebin --truth wrote. Raises InputError."""
    try:
        lines, told = read_sinograms(data)
    except Refused as error:
        raise InputError(f"{data} {error}.") from error
    index = {row["file"]: number_in(row, "index") for row in read_manifest(files[0].parent)}
    if missing := [f.name for f in files if index.get(f.name) not in range(len(lines))]:
        raise InputError(f"The manifest.csv of {files[0].parent} does not say of which sinogram {missing[0]} is; write "
                         "the slices by python -m datasets.rebin --truth.")
    photons = take_photons(told) or estimate_photons(np.asarray(lines[len(lines) // 2]))
    return Measured(lines, make_scanner(told), {f.name: int(index[f.name]) for f in files}, photons)


def simulate_measurement(x0: torch.Tensor, n_views: int, names: list[str], degrade: Degradation,
                         noise: Noise) -> torch.Tensor:
    """What the scanner gives of slices x0 (B, 1, H, H): sinograms (B, 1, n, bins).

    Noise is a function of seed, name and views. It is drawn on the CPU, so that it does not depend on the device.
    """
    y = degrade.project(x0, n_views)
    if noise.photons is None:
        return y
    noisy, cm = [], degrade.scanner.pixel_cm(x0.shape[-1])
    for sinogram, name in zip(y.cpu(), names, strict=True):
        digest = hashlib.sha256(f"{noise.seed}/{name}/{n_views}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noisy.append(transmission_noise(sinogram, noise.photons, cm, noise.electronic, generator))
    return torch.stack(noisy).to(y.device)


@torch.no_grad()
def warm_up(reconstructor: Reconstructor, y: torch.Tensor, size: int) -> None:
    """Compile kernels, build tables, make graphs and let libraries choose algorithms before anything is timed."""
    degrade, n = reconstructor.degrade, y.shape[-2]
    estimate = Estimate(lambda x, n_t: x[:, :1], degrade, degrade.fbp(y, size), n)
    for _ in range(1 + PLAIN_CALLS if y.is_cuda else 1):
        sequential(estimate, degrade, estimate.x_T, reconstructor.chain(n), redegrade)
        reconstructor.run("one-step", y, size)
    sirt(degrade, y, size, iterations=1)


def timed(reconstructor: Reconstructor, method: str, y: torch.Tensor, size: int, **options):
    """(x0_hat, calls, seconds a slice, GiB of this process at most) of `Reconstructor.run`."""
    device = str(y.device)
    synchronize(device)
    start = time.perf_counter()
    x0_hat, calls = reconstructor.run(method, y, size, **options)
    synchronize(device)
    return x0_hat, calls, (time.perf_counter() - start) / len(y), memory(device)


def score_rows(x0_hat: torch.Tensor, x0: torch.Tensor, windows, common: list[dict]) -> list[dict]:
    """Result rows, one a slice and window, the headline window first. common: what the rows of a slice share."""
    scores = [score(x0_hat, x0, *window, slow=window == windows[0]) for window in windows]
    values = [{name: value.tolist() for name, value in found.items()} for found in scores]
    return [{**about, "width": w[0], "centre": w[1], **{name: repr(value[i]) for name, value in found.items()}}
            for i, about in enumerate(common) for w, found in zip(windows, values, strict=True)]


def evaluate(args, reconstructor: Reconstructor, noise: Noise | Measured, mu: torch.Tensor, names: list[str],
             patients: list[str], done: dict, rank: int, processes: int) -> None:
    """Add the rows of this process's batches that are not `done` to its part file, and save images if args say so.

    args: of test.py. noise: or what was measured. mu: slices (N, 1, H, H), CPU.
    """
    size, truths, warm = mu.shape[-1], {}, set()
    todo = [(n, i) for n in args.views for i in range(rank * args.batch, len(names), processes * args.batch)]
    with Progress(total=len(todo) * len(args.methods), unit="batch", disable=rank > 0) as bar:
        for n, i in todo:
            batch, y = names[i:i + args.batch], None
            for method in args.methods:
                bar.update()
                bar.set_description(f"{method}, {n} views")
                folder = args.out / "images" / f"{method}_{n}views"
                images = [folder / name for name in batch] if args.save_images else []
                if all((name, method, n) in done for name in batch) and all(image.is_file() for image in images):
                    continue
                if y is None:
                    if i not in truths:
                        truths[i] = noise.truth(reconstructor, mu[i:i + args.batch].to(args.device))
                    x0 = truths[i]
                    solver, y = noise.measure(reconstructor, x0, batch, n)
                if (n, len(batch)) not in warm:
                    warm.add((n, len(batch)))
                    warm_up(solver, y, size)
                x0_hat, calls, seconds, gib = timed(solver, method, y, size, photons=noise.photons,
                                                    electronic=noise.electronic, **args.options.get(method, {}))
                save_images(images, x0_hat)
                left = noise.held_out(x0_hat, batch, n)
                rows = score_rows(x0_hat, x0, args.windows, [
                    {"file": name, "patient": patients[i + j], "method": method, "views": n, "nfe": calls[j],
                     "held_out": left[j], "seconds_per_slice": f"{seconds:.5f}", "peak_gib": f"{gib:.3f}"}
                    for j, name in enumerate(batch)])
                append(args.out, rank, rows)
                bar.set_postfix(dB=f"{float(rows[0]['psnr']):.1f}", refresh=False)


def cautions(reconstructor: Reconstructor, methods: list[str], size: int, photons: float | None,
             again: dict | str) -> list[str]:
    """What a person should know of these weights on slices of `size` pixels, measured by so many photons a ray.

    again: of datasets.leakage.met_again. Nothing where no method uses the weights.
    """
    if not SAMPLERS.keys() & set(methods):
        return []
    header = reconstructor.header
    trained, preset = header.get("size", PUBLISHED["size"]), header.get("training", {}).get("preset", {})
    texts, least = [], preset.get("fewest_photons")
    if size != trained:
        texts.append(f"the weights were trained on slices of {trained} pixels a side, and these have {size}. At "
                     f"512 pixels weights of 256 lost {LOSS_AT_512} dB (docs/results.md, Other sizes).")
    if photons and not preset.get("noise_share"):
        texts.append(f"the weights were trained without noise, and {photons:g} photons a ray are simulated.")
    elif photons and isinstance(least, int | float) and photons < least:
        texts.append(f"the weights saw noise of {least:g} photons a ray or more, and {photons:g} are simulated.")
    if isinstance(again, dict) and any(again.values()):
        texts.append(f"{again['slices']} of these slices and {again['patients']} of their patients, by name, took part "
                     "in the training of the weights: the numbers look better than they are.")
    return texts


def save_images(paths: list[Path], x0_hat: torch.Tensor) -> None:
    """Write mu (B, 1, H, H) as HU `.npy` (H, H) to as many paths; nothing where there are none."""
    for path, image in zip(paths, mu_to_hu(x0_hat).cpu().numpy() if paths else (), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial, open(partial, "wb") as file:
            np.save(file, image[0])
