"""Batches of training slices: everything random is a function of the seed and the global sample index."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.leakage import traces
from datasets.slices import evenly_spaced, find_slices, fingerprint, patients_of, read_slices, remarks, split_by_patient
from utils.distributed import shares
from utils.errors import printable
from utils.units import hu_to_mu


def load_slices(data, val_fraction: float, val_slices: int, seed: int, multiple: int, strict: bool,
                trust: bool = False, source: str | None = None):
    """((names, mu), (names, mu), fingerprints, traces) of training and validation slices; mu: (N, 1, H, H) in 1/cm.

    val_slices: how many validate, spread evenly over theirs; 0: all. trust, source: as of datasets.slices. What is odd
    about the slices is said. Traces: of both, as datasets.leakage makes them.
    """
    train = find_slices(data, "train")
    one_folder = train[0].parent == Path(data)
    train, val = (split_by_patient(train, val_fraction, seed, source) if one_folder
                  else (train, find_slices(data, "val")))
    splits, prints, owners, seen = [], [], [], []
    for files, part in ((train, "train"), (val, "validate")):
        files, hu = read_slices(files, multiple, strict, trust)
        if val_slices and splits:
            chosen = evenly_spaced(len(hu), val_slices)
            files, hu = [files[i] for i in chosen], hu[chosen]
        owners.append(set(patients_of(files, source)))
        seen.append(traces(files, hu, source))
        print(f"{len(files)} slices of {len(owners[-1])} patient(s) {part}.")
        for text in remarks(files, hu) if source is None else ():
            print(f"Warning: {text}")
        prints.append(fingerprint(files, hu))
        splits.append(([f.name for f in files], hu_to_mu(torch.from_numpy(hu))[:, None]))
    if common := owners[0] & owners[1]:
        print(f"Warning: {len(common)} patient(s) train and validate, such as {printable(min(common))}; validation "
              "looks better than it is.")
    return *splits, prints, seen


def batches(count: int, batch: int, images: int):
    """(first, last) global sample indices of every batch: none crosses the end of a pass over the data."""
    first = 0
    while first < images:
        last = min(first + batch, (first // count + 1) * count, images)
        yield first, last
        first = last


def sample_at(index: int, count: int, seed: int, draws: int):
    """Slice, symmetry and uniform draws (draws,) of a global sample index: a function of (seed, index) alone."""
    order = np.random.default_rng([seed, 0, index // count]).permutation(count)
    rng = np.random.default_rng([seed, 1, index])
    return order[index % count], rng.integers(8), rng.random(draws)


@dataclass
class Part:
    """What one forward and backward call works on."""

    indices: range             # global sample indices
    slices: list[int]          # which slices these are
    x: torch.Tensor            # they, mu (B, 1, H, W)
    uniform: list[np.ndarray]  # draws of each: levels (1 + 2 hops), scanner (2), noise (3)
    common: np.ndarray | None = None  # those of the batch's first, for its scanner


def load_batch(mu: torch.Tensor, span: tuple[int, int], seed: int, preset, rank: int = 0, processes: int = 1,
               pin: bool = False) -> tuple[tuple[int, int], list[Part], float]:
    """This process's share of the batch of global indices `span`, and the weight of each of its slices in the loss.

    mu: all slices (N, 1, H, H); preset: fields of a models.presets.Preset; pin: for asynchronous copies to a GPU.
    """
    parts, weight = shares(*span, rank, processes, preset.accumulate)
    loaded, draws = [], 1 + 2 * preset.hops + 2 + 3  # levels, scanner, noise
    common = sample_at(span[0], len(mu), seed, draws)[2]
    for indices in parts:
        order, symmetry, uniform = zip(*(sample_at(i, len(mu), seed, draws) for i in indices), strict=True)
        x = mu[list(order)]
        x = flip_and_turn(x, symmetry) if preset.augment else x
        levels = uniform if preset.per_sample_levels else [common] * len(x)  # else one t and one t' a batch
        loaded.append(Part(indices, [int(i) for i in order], x.pin_memory() if pin else x, list(levels),
                           common))
    return span, loaded, weight


def flip_and_turn(x: torch.Tensor, symmetries) -> torch.Tensor:
    """The symmetry 0..7 of each slice: quarter turns, mirrored from 4 on. They commute with the full-view scan R."""
    out = torch.empty_like(x)
    for g in set(symmetries):
        index = [i for i, symmetry in enumerate(symmetries) if symmetry == g]
        out[index] = torch.rot90(x[index].flip(-1) if g >= 4 else x[index], int(g % 4), (-2, -1))
    return out


def prefetch(function, items):
    """function(item) of all items in order; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            ready, waiting = waiting, pool.submit(function, item)
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()
