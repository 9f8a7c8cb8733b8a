"""Plain PyTorch backend: any device, float32 or float64. The readable statement of the mathematics; not fast.

Every map is a list of reads: value = sum of weight * source[index]. Its transpose writes where it read.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from .filtering import detector_weight, frequency_response
from .geometry import PAD, Geometry, Stacked, pixel_bins, ray_samples, used_bins

CHUNK = 1 << 22  # reads in memory at once


def _per_view(views: int, reads: int):
    size = max(1, CHUNK // reads)
    return [slice(i, min(i + size, views)) for i in range(0, views, size)]


def _ray_views(geometry: Geometry, batch: int):
    most = geometry.det_count * (geometry.width + geometry.height)
    return _per_view(len(geometry.angles), batch * most)


def _ray_reads(geometry: Geometry, views: slice, like: torch.Tensor):
    """The four texels of every sample: (index into an image padded by PAD, weight), each (views, bins, samples)."""
    bins = geometry.bins[slice(*used_bins(geometry))]
    table = ray_samples(geometry, np.asarray(geometry.angles, np.float64)[views], bins)
    j = np.arange(max(int(table["count"].max()), 1))
    valid = j < table["count"][..., None]
    x, y = (np.where(valid, table[p][..., None] + j * table["d" + p][..., None], 0) for p in "xy")
    column, row = np.floor(x), np.floor(y)
    fx, fy = x - column, y - row
    first = ((row + PAD) * (geometry.width + 2 * PAD) + column + PAD).astype(np.int64)
    h = valid * table["h"][..., None].astype(np.float64)
    for step, weight in ((0, (1 - fx) * (1 - fy)), (1, fx * (1 - fy)), (geometry.width + 2 * PAD, (1 - fx) * fy),
                         (geometry.width + 2 * PAD + 1, fx * fy)):
        yield torch.from_numpy(first + step).to(like.device), torch.from_numpy(weight * h).to(like)


def forward(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B, views, bins)."""
    batch, used = len(image), slice(*used_bins(geometry))
    sinogram = image.new_zeros(batch, len(geometry.angles), geometry.det_count)
    source = F.pad(image, (PAD,) * 4).flatten(1)
    for views in _ray_views(geometry, batch):
        for index, weight in _ray_reads(geometry, views, image):
            sinogram[:, views, used] += (source[:, index.flatten()].view(batch, *index.shape) * weight).sum(-1)
    return sinogram


def forward_transpose(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) -> (B, H, W): the transpose of `forward`."""
    batch, used = len(sinogram), slice(*used_bins(geometry))
    image = sinogram.new_zeros(batch, geometry.height + 2 * PAD, geometry.width + 2 * PAD)
    for views in _ray_views(geometry, batch):
        for index, weight in _ray_reads(geometry, views, sinogram):
            values = sinogram[:, views, used, None] * weight
            image.view(batch, -1).index_add_(1, index.flatten(), values.view(batch, -1))
    return image[:, PAD:-PAD, PAD:-PAD].contiguous()


def _pixel_reads(geometry: Geometry, views: slice, like: torch.Tensor):
    """The two bins of every pixel: (index into a row with two bins more in front, weight), each (views, H * W)."""
    tables = [pixel_bins(geometry, theta) for theta in np.asarray(geometry.angles, np.float64)[views]]
    position, weight = (np.stack(part).reshape(len(tables), -1) for part in zip(*tables, strict=True))
    position = np.clip(position, -2, geometry.det_count + 1)  # further out both neighbours are zeros
    lower = np.floor(position)
    for step, share in ((0, 1 - position + lower), (1, position - lower)):
        index = torch.from_numpy(lower.astype(np.int64) + 2 + step)
        yield index.to(like.device), torch.from_numpy(share * weight).to(like)


def backproject(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) -> (B, H, W)."""
    batch = len(sinogram)
    image = sinogram.new_zeros(batch, geometry.height, geometry.width)
    source = F.pad(sinogram, (2, 3))
    for views in _per_view(len(geometry.angles), image.numel()):
        for index, weight in _pixel_reads(geometry, views, sinogram):
            read = source[:, views].gather(2, index.expand(batch, -1, -1))
            image += (read * weight).sum(1).view_as(image)
    return image


def backproject_transpose(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B, views, bins): the transpose of `backproject`."""
    batch = len(image)
    sinogram = image.new_zeros(batch, len(geometry.angles), geometry.det_count + 5)
    for views in _per_view(len(geometry.angles), image.numel()):
        for index, weight in _pixel_reads(geometry, views, image):
            sinogram[:, views].scatter_add_(2, index.expand(batch, -1, -1), image.view(batch, 1, -1) * weight)
    return sinogram[:, :, 2:-3].contiguous()


@lru_cache(maxsize=16)  # kept where they are used: a copy from the host at every call cannot go into a CUDA graph
def _response(det_count: int, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(frequency_response(det_count, name)).to(device, dtype)


@lru_cache(maxsize=16)
def bin_weights(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Weight of each bin before the filter, (det_count,)."""
    return torch.from_numpy(detector_weight(geometry)).to(device, dtype)


def apply_filter(sinogram: torch.Tensor, name: str) -> torch.Tensor:
    """Row-wise linear convolution with the filter's taps, (..., bins); no view weight. In the tensor's precision."""
    bins = sinogram.shape[-1]
    spectrum = torch.fft.rfft(sinogram, n=2 * bins) * _response(bins, name, sinogram.dtype, sinogram.device)
    return torch.fft.irfft(spectrum, n=2 * bins)[..., :bins]


def filter_rows(geometry: Geometry, sinogram: torch.Tensor, name: str, transposed: bool) -> torch.Tensor:
    """(B, views, bins) filtered and weighted by pi/(2 views); the convolution is its own transpose."""
    p = sinogram.float() if sinogram.dtype == torch.float16 else sinogram
    weight, scale = bin_weights(geometry, p.dtype, p.device), math.pi / 2 / geometry.n_angles
    return apply_filter(p, name) * (scale * weight) if transposed else apply_filter(p * weight, name) * scale


def fbp(geometry: Geometry, image: torch.Tensor, view_weights: torch.Tensor | None, name: str) -> torch.Tensor:
    """Backprojection of the filtered projection of (B, H, W); view_weights: (views,), pi/(2N) for all if None."""
    if view_weights is None:
        view_weights = image.new_full((geometry.n_angles,), math.pi / 2 / geometry.n_angles)
    sinogram = forward(geometry, image) * bin_weights(geometry, image.dtype, image.device)
    return backproject(geometry, apply_filter(sinogram, name) * view_weights[:, None])


def by_scan(kernel, stacked: Stacked, x: torch.Tensor, *arguments) -> torch.Tensor:
    """A kernel of any backend for a stack of scans, images or padded sinograms (B, ..., ...), scan by scan.

    The fast CPU kernels give each image of a batch what it gets alone, so equal scans go together; the sums of this
    module may be cut differently, so here every slice goes alone, as it does where it has view weights of its own.
    """
    share, fast = len(x) // len(stacked.scans), kernel.__module__ != __name__
    weights = arguments[0] if kernel.__name__ == "fbp" else None
    groups = {}
    for i, scan in enumerate(stacked.scans):
        key = scan.key if fast and weights is None else i
        groups.setdefault(key, (i, []))[1].extend(range(i * share, (i + 1) * share))
    scan, result = stacked.scans[0], None
    reads_views = kernel.__name__ in ("forward_transpose", "backproject", "filter_rows")
    writes_views = kernel.__name__ in ("forward", "backproject_transpose", "filter_rows")
    for i, members in groups.values():
        scan = stacked.scans[i]
        if weights is not None:
            arguments = weights[i, :scan.n_angles].contiguous(), *arguments[1:]
        part = kernel(scan, (x[members, :scan.n_angles] if reads_views else x[members]).contiguous(), *arguments)
        if result is None:
            rows = stacked.n_angles if writes_views else scan.height
            result = part.new_zeros(len(x), rows, part.shape[-1])
        result[members, :part.shape[1]] = part
    return result
