"""CPU backend: Numba kernels over blocks of eight images (or symmetric copies), parallel over views and rows.

Images live as (block, row, column, lane) with PAD zeros around, sinograms as (block, representative view, bin, lane)
with one zero bin at either end, lane = one of the batch's images seen through one element of the symmetry group.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from numba.core import event

from . import simd
from .filtering import detector_weight, filter_matrix
from .geometry import PAD, Geometry, ray_samples, used_bins
from .simd import LANES
from .symmetry import choose, pixel_map

log = logging.getLogger("torch_radon")
CHUNK = 64  # samples of a ray whose coordinates are computed together
jit = njit(nogil=True, cache=True, error_model="numpy")


@jit
def _pack_image(image, maps, packed, start, stop):
    blocks, height, width, lanes = packed.shape
    source, step = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for i in range(start, stop):
        block, r = i // (height - 2 * PAD), i % (height - 2 * PAD)
        for lane in range(lanes):
            offset, row, column = maps[block, lane]
            source[lane], step[lane] = offset + r * row, column
        for q in range(width - 2 * PAD):
            for lane in range(lanes):
                packed[block, r + PAD, q + PAD, lane] = image[source[lane] + q * step[lane]]


@jit
def _unpack_image(packed, maps, image, start, stop):
    batch, height, width = image.shape
    elements = maps.shape[1]
    source, step = np.empty(elements, np.int64), np.empty(elements, np.int64)
    for i in range(start, stop):
        b, r = i // height, i % height
        for j in range(elements):
            offset, row, column = maps[b, j]
            source[j], step[j] = offset + (r + PAD) * row + PAD * column, column
        for q in range(width):
            total = np.float32(0)
            for j in range(elements):
                total += packed[source[j] + q * step[j]]
            image[b, r, q] = total


@jit
def _pack_sinogram(sinogram, maps, packed, start, stop):
    blocks, views, bins, lanes = packed.shape
    for i in range(start, stop):
        block, v = i // views, i % views
        for lane in range(lanes):
            b, view, reverse = maps[block, v, lane]
            if view >= 0:
                for k in range(bins - 2):
                    packed[block, v, k + 1, lane] = sinogram[b, view, bins - 3 - k if reverse else k]


@jit
def _unpack_sinogram(packed, maps, sinogram, start, stop):
    blocks, views, bins, lanes = packed.shape
    for i in range(start, stop):
        block, v = i // views, i % views
        for lane in range(lanes):
            b, view, reverse = maps[block, v, lane]
            if view >= 0:
                for k in range(bins - 2):
                    sinogram[b, view, bins - 3 - k if reverse else k] = packed[block, v, k + 1, lane]


@jit
def _samples(x, y, dx, dy, start, stop, width, at, weights):
    """Flat texel index and four bilinear weights of samples start..stop of a ray; a loop that vectorises."""
    for j in range(start, stop):
        fx, fy = x + j * dx, y + j * dy
        q, r = np.int32(fx), np.int32(fy)
        wx, wy = np.float32(fx - q), np.float32(fy - r)
        i = j - start
        at[i] = (r * np.int32(width) + q) * np.int32(LANES)
        weights[0, i] = (np.float32(1) - wx) * (np.float32(1) - wy)
        weights[1, i] = wx * (np.float32(1) - wy)
        weights[2, i] = (np.float32(1) - wx) * wy
        weights[3, i] = wx * wy


@jit
def _forward(image, shape, x, y, dx, dy, count, h, sinogram, start, stop):
    height, width = shape
    views, bins = x.shape
    at, w = np.empty(CHUNK, np.int32), np.empty((4, CHUNK), np.float32)
    for i in range(start, stop):
        v, base = i % views, i // views * height * width * LANES
        for k in range(bins):
            total = simd.zero()
            for first in range(0, count[v, k], CHUNK):  # partial sums: less rounding than one long one
                last = min(first + CHUNK, count[v, k])
                _samples(x[v, k], y[v, k], dx[v, k], dy[v, k], first, last, width, at, w)
                part = simd.zero()
                for j in range(last - first):
                    upper = base + at[j]
                    lower = upper + width * LANES
                    value = simd.mul(simd.load(image, upper), w[0, j])
                    value = simd.mul_add(simd.load(image, upper + LANES), w[1, j], value)
                    value = simd.mul_add(simd.load(image, lower), w[2, j], value)
                    value = simd.mul_add(simd.load(image, lower + LANES), w[3, j], value)
                    part = simd.add(part, value)
                total = simd.add(total, part)
            simd.store(sinogram, (i * (bins + 2) + k + 1) * LANES, simd.mul(total, h[v, k]))


@jit
def _forward_transpose(sinogram, shape, x, y, dx, dy, count, h, image, block, workers, start, stop):
    height, width = shape
    views, bins = x.shape
    at, w = np.empty(CHUNK, np.int32), np.empty((4, CHUNK), np.float32)
    for i in range(start * views, stop * views):
        v, base = i % views, i // views * height * width * LANES
        for k in range(bins if v % workers == i // views else 0):
            value = simd.mul(simd.load(sinogram, ((block * views + v) * (bins + 2) + k + 1) * LANES), h[v, k])
            for first in range(0, count[v, k], CHUNK):
                last = min(first + CHUNK, count[v, k])
                _samples(x[v, k], y[v, k], dx[v, k], dy[v, k], first, last, width, at, w)
                for j in range(last - first):
                    for corner in range(4):
                        to = base + at[j] + (corner % 2 + corner // 2 * width) * LANES
                        simd.store(image, to, simd.mul_add(value, w[corner, j], simd.load(image, to)))


@jit
def _row(v, r, rows, columns, bins, views, scan, at, weights):
    """Lower bin (counted from the zero bin in front) and two weights of each pixel of a row in one view."""
    near, span, spacing, centre, radius, fdk = scan
    cos, sin = views[v]
    y = r - rows / 2 + 0.5
    for q in range(columns):
        x = q - columns / 2 + 0.5
        u, weight = x * cos - y * sin, 1 / spacing
        if near > 0:
            magnification = span / (near - x * sin - y * cos)
            u *= magnification
            weight *= magnification * magnification * near / span if fdk else magnification
        b = u / spacing + centre
        if b < 0 or b >= bins - 1 or (radius > 0 and x * x + y * y > radius * radius):
            b = weight = 0.0
        k = np.int32(b)
        at[q] = k * np.int32(LANES)
        weights[0, q] = (1 - b + k) * weight
        weights[1, q] = (b - k) * weight


@jit
def _backproject(sinogram, shape, bins, views, scan, image, start, stop):
    height, width = shape
    rows, columns = height - 2 * PAD, width - 2 * PAD
    at, w = np.empty(columns, np.int32), np.empty((2, columns), np.float32)
    for i in range(start, stop):
        block, r = i // rows, i % rows
        row = ((block * height + r + PAD) * width + PAD) * LANES
        for v in range(len(views)):
            _row(v, r, rows, columns, bins, views, scan, at, w)
            base = (block * len(views) + v) * bins * LANES
            for q in range(columns):
                value = simd.mul_add(simd.load(sinogram, base + at[q]), w[0, q], simd.load(image, row + q * LANES))
                value = simd.mul_add(simd.load(sinogram, base + at[q] + LANES), w[1, q], value)
                simd.store(image, row + q * LANES, value)


@jit
def _backproject_transpose(image, shape, bins, views, scan, sinogram, start, stop):
    height, width = shape
    rows, columns = height - 2 * PAD, width - 2 * PAD
    at, w = np.empty(columns, np.int32), np.empty((2, columns), np.float32)
    for i in range(start, stop):
        block, v = i // len(views), i % len(views)
        base = i * bins * LANES
        for r in range(rows):
            _row(v, r, rows, columns, bins, views, scan, at, w)
            row = ((block * height + r + PAD) * width + PAD) * LANES
            for q in range(columns):
                value, lower = simd.load(image, row + q * LANES), base + at[q]
                upper = lower + LANES
                simd.store(sinogram, lower, simd.mul_add(value, w[0, q], simd.load(sinogram, lower)))
                simd.store(sinogram, upper, simd.mul_add(value, w[1, q], simd.load(sinogram, upper)))


class _Announce(event.Listener):
    """Says once that kernels are being compiled: later runs load them from Numba's cache."""

    said = False

    def on_start(self, event):
        if not _Announce.said:
            _Announce.said = True
            log.warning("torch_radon: compiling the CPU kernels (once, about ten seconds; cached for later runs)")

    def on_end(self, event):
        """Nothing to say at the end of a compilation."""


_announce = _Announce()
_pool = None


def _forget_pool():
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # a forked data loader has none of its parent's threads


def _run(kernel, items: int, *arguments):
    """Call kernel(*arguments, start, stop) over range(items) in parallel; the kernels release the GIL."""
    global _pool
    workers = torch.get_num_threads()
    if _pool is None or _pool[0] != workers:
        _pool = workers, ThreadPoolExecutor(workers, thread_name_prefix="torch_radon")
    if not kernel.signatures:  # compile or load before the threads would queue for it
        with event.install_listener("numba:compile", _announce):
            kernel(*arguments, 0, 0)
    pieces = min(items, workers)  # all items cost the same, and this thread does the first piece itself
    edges = [items * i // pieces for i in range(pieces + 1)]
    others = [_pool[1].submit(kernel, *arguments, *edges[i:i + 2]) for i in range(1, pieces)]
    kernel(*arguments, *edges[:2])
    for other in others:
        other.result()


@dataclass(frozen=True)
class _Plan:
    """Tables of one geometry at one batch size."""

    blocks: int
    views: int                # representatives
    first: int                # the used bins are first..stop of the detector
    stop: int
    rays: dict
    trigonometry: np.ndarray  # (views, 2) cos, sin
    scan: tuple
    image_in: np.ndarray      # (blocks, LANES, 3): flat offset in the batch, row and column step (image 0 if unused)
    image_out: np.ndarray     # (batch, elements, 3): the same into the packed images, of the inverse element
    sinogram: np.ndarray      # (blocks, views, LANES, 3): batch index, view or -1, reversed
    shape: tuple              # padded (height, width)

    def images(self, count):
        return np.zeros((count, *self.shape, LANES), np.float32)

    def sinograms(self):
        return np.zeros((self.blocks, self.views, self.stop - self.first + 2, LANES), np.float32)


@lru_cache(maxsize=64)
def _plan(geometry: Geometry, batch: int) -> _Plan:
    first, stop = used_bins(geometry)
    if geometry.det_offset == 0:  # a mirrored view reads its bins backwards: keep the cropped detector symmetric
        first = min(first, geometry.det_count - stop)
        stop = geometry.det_count - first
    reduction = choose(geometry, batch, LANES)
    elements, views = len(reduction.group), len(reduction.angles)
    blocks = -(-elements * batch // LANES)
    height, width = geometry.height, geometry.width
    padded = height + 2 * PAD, width + 2 * PAD
    image_in = np.zeros((blocks * LANES, 3), np.int64)
    image_out = np.zeros((batch, elements, 3), np.int64)
    sinogram = np.full((blocks * LANES, views, 3), -1, np.int64)
    for j, element in enumerate(reduction.group):
        k, s = element
        inverse = ((-k) % 4, 1) if s > 0 else element
        for b in range(batch):
            lane = j * batch + b
            image_in[lane] = pixel_map(element, height, width)
            image_in[lane, 0] += b * height * width
            image_out[b, j] = np.array(pixel_map(inverse, *padded)) * LANES
            image_out[b, j, 0] += lane // LANES * padded[0] * padded[1] * LANES + lane % LANES
            sinogram[lane] = np.stack([np.full(views, b), reduction.views[:, j], np.full(views, s < 0)], axis=1)
    rays = ray_samples(geometry, reduction.angles, geometry.bins[first:stop])
    rays["x"], rays["y"] = rays["x"] + PAD, rays["y"] + PAD
    centre = geometry.det_count / 2 - 0.5 - geometry.det_offset / geometry.det_spacing - first + 1
    scan = (geometry.source_distance or 0.0, (geometry.source_distance or 0.0) + geometry.det_distance,
            float(geometry.det_spacing), centre, geometry.det_count / 2 if geometry.clip_to_circle else 0.0,
            geometry.weights == "fdk")
    return _Plan(blocks, views, first, stop, rays, np.stack([np.cos(reduction.angles), np.sin(reduction.angles)], 1),
                 scan, image_in.reshape(blocks, LANES, 3), image_out,
                 np.ascontiguousarray(sinogram.reshape(blocks, LANES, views, 3).transpose(0, 2, 1, 3)),
                 padded)


def _pack_images(plan, image):
    packed = plan.images(plan.blocks)
    rows = image.shape[1]
    _run(_pack_image, plan.blocks * rows, image.reshape(-1), plan.image_in, packed)
    return packed


def _unpack_images(plan, packed, geometry, batch):
    image = np.empty((batch, geometry.height, geometry.width), np.float32)
    _run(_unpack_image, batch * geometry.height, packed.reshape(-1), plan.image_out, image)
    return image


def _pack_sinograms(plan, sinogram):
    packed = plan.sinograms()
    _run(_pack_sinogram, plan.blocks * plan.views, np.ascontiguousarray(sinogram[:, :, plan.first:plan.stop]),
         plan.sinogram, packed)
    return packed


def _unpack_sinograms(plan, packed, geometry, batch):
    used = np.zeros((batch, len(geometry.angles), plan.stop - plan.first), np.float32)
    _run(_unpack_sinogram, plan.blocks * plan.views, packed, plan.sinogram, used)
    sinogram = np.zeros((batch, len(geometry.angles), geometry.det_count), np.float32)
    sinogram[:, :, plan.first:plan.stop] = used
    return sinogram


def _project(plan, packed):
    sinogram, rays = plan.sinograms(), plan.rays
    _run(_forward, plan.blocks * plan.views, packed.reshape(-1), plan.shape, rays["x"], rays["y"], rays["dx"],
         rays["dy"], rays["count"], rays["h"], sinogram.reshape(-1))
    return sinogram


def _smear(plan, packed):
    image = plan.images(plan.blocks)
    _run(_backproject, plan.blocks * (plan.shape[0] - 2 * PAD), packed.reshape(-1), plan.shape, packed.shape[2],
         plan.trigonometry, plan.scan, image.reshape(-1))
    return image


def forward(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 -> (B, views, bins)."""
    image = image.numpy()
    plan = _plan(geometry, len(image))
    return torch.from_numpy(_unpack_sinograms(plan, _project(plan, _pack_images(plan, image)), geometry, len(image)))


def backproject(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 -> (B, H, W)."""
    sinogram = sinogram.numpy()
    plan = _plan(geometry, len(sinogram))
    packed = _smear(plan, _pack_sinograms(plan, sinogram))
    return torch.from_numpy(_unpack_images(plan, packed, geometry, len(sinogram)))


def forward_transpose(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 -> (B, H, W): the transpose of `forward`."""
    sinogram = sinogram.numpy()
    plan, workers = _plan(geometry, len(sinogram)), torch.get_num_threads()
    packed, rays, result = _pack_sinograms(plan, sinogram), plan.rays, plan.images(plan.blocks)
    for block in range(plan.blocks):
        partial = plan.images(workers)  # rays of different views write to the same pixels: one image a thread
        _run(_forward_transpose, workers, packed.reshape(-1), plan.shape, rays["x"], rays["y"], rays["dx"], rays["dy"],
             rays["count"], rays["h"], partial.reshape(-1), block, workers)
        partial.sum(axis=0, out=result[block])
    return torch.from_numpy(_unpack_images(plan, result, geometry, len(sinogram)))


def backproject_transpose(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 -> (B, views, bins): the transpose of `backproject`."""
    image = image.numpy()
    plan = _plan(geometry, len(image))
    packed, sinogram = _pack_images(plan, image), plan.sinograms()
    bins = sinogram.shape[2]
    _run(_backproject_transpose, plan.blocks * plan.views, packed.reshape(-1), plan.shape, bins, plan.trigonometry,
         plan.scan, sinogram.reshape(-1))
    sinogram[:, :, 0] = sinogram[:, :, -1] = 0
    return torch.from_numpy(_unpack_sinograms(plan, sinogram, geometry, len(image)))


@lru_cache(maxsize=16)
def _filter(geometry: Geometry, name: str, first: int, stop: int) -> torch.Tensor:
    matrix = filter_matrix(geometry.det_count, name, first, stop) * detector_weight(geometry)[first:stop]
    padded = np.zeros((stop - first + 2, stop - first + 2))
    padded[1:-1, 1:-1] = matrix
    return torch.from_numpy(padded).float()


def fbp(geometry: Geometry, image: torch.Tensor, view_weights: torch.Tensor, name: str) -> torch.Tensor:
    """Backprojection of the filtered projection of (B, H, W) float32, without leaving the packed layout.

    view_weights: (views,) float32, the factor of each view (pi/(2N) for a plain FBP over N views).
    """
    array = image.numpy()
    plan = _plan(geometry, len(array))
    sinogram = torch.from_numpy(_project(plan, _pack_images(plan, array)))
    views = torch.from_numpy(plan.sinogram[..., 1])  # -1 for lanes that hold no view
    sinogram *= torch.where(views < 0, 0, view_weights[views])[:, :, None, :]
    filtered = torch.matmul(_filter(geometry, name, plan.first, plan.stop), sinogram)
    return torch.from_numpy(_unpack_images(plan, _smear(plan, filtered.numpy()), geometry, len(array)))
