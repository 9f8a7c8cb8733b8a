"""Plain PyTorch backend: any device, float32 or float64. The readable statement of the mathematics; not fast."""

import numpy as np
import torch
import torch.nn.functional as F

from .filtering import detector_weight, frequency_response
from .geometry import Geometry, pixel_bins, ray_samples, used_bins

CHUNK = 1 << 23  # samples in memory at once


def _per_view(views: int, samples: int):
    size = max(1, CHUNK // samples)
    return [slice(i, min(i + size, views)) for i in range(0, views, size)]


def _rays(geometry: Geometry, views: slice, bins: slice, like: torch.Tensor):
    table = ray_samples(geometry, np.asarray(geometry.angles, np.float64)[views], geometry.bins[bins])
    most = max(int(table["count"].max()), 1)
    j = np.arange(most)
    x, y = (table[p][..., None] + j * table["d" + p][..., None] for p in "xy")
    grid = np.stack([(2 * x + 1) / geometry.width - 1, (2 * y + 1) / geometry.height - 1], axis=-1)
    weight = (j < table["count"][..., None]) * table["h"][..., None].astype(np.float64)
    return torch.from_numpy(grid).to(like), torch.from_numpy(weight).to(like)


def _forward_views(image, grid, weight):
    batch, (views, bins, samples) = len(image), weight.shape
    values = F.grid_sample(image[None], grid.view(1, views * bins, samples, 2), align_corners=False)
    return (values.view(batch, views, bins, samples) * weight).sum(-1)


def _read(geometry: Geometry, views: slice, like: torch.Tensor):
    tables = [pixel_bins(geometry, theta) for theta in np.asarray(geometry.angles, np.float64)[views]]
    position, weight = (np.stack(part) for part in zip(*tables, strict=True))
    # Bins -1 and det_count hold zeros; further out both neighbours do.
    position = np.clip(position + 1, -1, geometry.det_count + 2)
    lower = np.floor(position)
    upper_weight = torch.from_numpy((position - lower) * weight).to(like)
    lower_weight = torch.from_numpy((1 - position + lower) * weight).to(like)
    lower = torch.from_numpy(lower.astype(np.int64)).to(like.device)
    return lower + 1, lower_weight, upper_weight


def _backproject_views(sinogram, lower, lower_weight, upper_weight):
    padded = F.pad(sinogram, (2, 3))
    batch, (views, height, width) = len(sinogram), lower.shape
    index = lower.view(1, views, -1).expand(batch, -1, -1)
    low, high = padded.gather(2, index), padded.gather(2, index + 1)
    return (low * lower_weight.view(views, -1) + high * upper_weight.view(views, -1)).sum(1).view(batch, height, width)


def _transpose(linear, zeros, cotangent):
    """Transpose of a linear map by reverse-mode differentiation, at a tensor of zeros."""
    with torch.enable_grad():
        zeros.requires_grad_()
        return torch.autograd.grad(linear(zeros), zeros, cotangent)[0]


def forward(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B, views, bins)."""
    bins, views = slice(*used_bins(geometry)), len(geometry.angles)
    sinogram = image.new_zeros(len(image), views, geometry.det_count)
    for part in _per_view(views, len(image) * geometry.det_count * (geometry.width + geometry.height)):
        sinogram[:, part, bins] = _forward_views(image, *_rays(geometry, part, bins, image))
    return sinogram


def forward_transpose(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) -> (B, H, W): the transpose of `forward`."""
    bins, views = slice(*used_bins(geometry)), len(geometry.angles)
    image = sinogram.new_zeros(len(sinogram), geometry.height, geometry.width)
    for part in _per_view(views, len(image) * geometry.det_count * (geometry.width + geometry.height)):
        grid, weight = _rays(geometry, part, bins, sinogram)
        image += _transpose(lambda x, g=grid, w=weight: _forward_views(x, g, w), torch.zeros_like(image),
                            sinogram[:, part, bins])
    return image


def backproject(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) -> (B, H, W)."""
    image = sinogram.new_zeros(len(sinogram), geometry.height, geometry.width)
    for part in _per_view(len(geometry.angles), image.numel()):
        image += _backproject_views(sinogram[:, part], *_read(geometry, part, sinogram))
    return image


def backproject_transpose(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B, views, bins): the transpose of `backproject`."""
    sinogram = image.new_zeros(len(image), len(geometry.angles), geometry.det_count)
    for part in _per_view(len(geometry.angles), image.numel()):
        table = _read(geometry, part, image)
        sinogram[:, part] = _transpose(lambda p, t=table: _backproject_views(p, *t),
                                       torch.zeros_like(sinogram[:, part]), image)
    return sinogram


def apply_filter(sinogram: torch.Tensor, name: str) -> torch.Tensor:
    """Row-wise linear convolution with the filter's taps, (..., bins); no view weight. In the tensor's precision."""
    bins = sinogram.shape[-1]
    response = torch.from_numpy(frequency_response(bins, name)).to(sinogram)
    spectrum = torch.fft.rfft(sinogram, n=2 * bins) * response
    return torch.fft.irfft(spectrum, n=2 * bins)[..., :bins]


def fbp(geometry: Geometry, image: torch.Tensor, view_weights: torch.Tensor, name: str) -> torch.Tensor:
    """Backprojection of the filtered projection of (B, H, W); view_weights: (views,), pi/(2N) for a plain FBP."""
    weight = torch.from_numpy(detector_weight(geometry)).to(image)
    sinogram = apply_filter(forward(geometry, image) * weight, name) * view_weights[:, None]
    return backproject(geometry, sinogram)
