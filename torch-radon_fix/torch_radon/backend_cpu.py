"""CPU backend: Numba kernels over blocks of eight images (or symmetric copies), parallel over views and rows.

Images live as (block, row, column, lane) with PAD zeros around, sinograms as (block, representative view, bin, lane)
with one zero bin at either end, lane = one of the batch's images seen through one element of the symmetry group.
"""

import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from numba.core import event
from numba.core.caching import FunctionCache

from . import simd
from .filtering import detector_weight, impulse_response
from .geometry import PAD, Geometry, ray_samples, used_bins
from .simd import LANES
from .symmetry import choose, pixel_map

log = logging.getLogger("torch_radon")
CHUNK = 64  # samples of a ray whose coordinates are computed together


class _Cache(FunctionCache):
    """Numba's cache of kernels: what is damaged in it is compiled again, what cannot be written is not kept."""

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except Exception:  # cut short by a full disk or a kill: unpickling fails in many ways
            with suppress(OSError):
                self.flush()

    def save_overload(self, *args):
        with suppress(OSError):
            super().save_overload(*args)


def jit(function):
    """Compile a kernel at its first call, or load it from Numba's cache if there is a folder for one."""
    kernel = njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # neither the package's folder nor one of the user's can be written
        kernel._cache = _Cache(function)
    return kernel


@jit
def _pack_image(image, maps, packed, start, stop):
    blocks, height, width, lanes = packed.shape
    columns = width - 2 * PAD
    for i in range(start, stop):
        block, r = i // height, i % height - PAD
        packed[block, r + PAD, :PAD] = packed[block, r + PAD, width - PAD:] = 0
        if r < 0 or r >= height - 2 * PAD:
            packed[block, r + PAD] = 0
            continue
        for lane in range(lanes):
            offset, row, column = maps[block, lane]
            source = offset + r * row
            for q in range(columns):
                packed[block, r + PAD, q + PAD, lane] = image[source + q * column] if offset >= 0 else np.float32(0)


@jit
def _sum_planes(planes, maps, image, start, stop):
    """Images from their symmetric copies in the planes."""
    batch, height, width = image.shape
    for i in range(start, stop):
        b, r = i // height, i % height
        for j in range(maps.shape[1]):
            offset, row, column = maps[b, j]
            source = offset + r * row
            for q in range(width):
                image[b, r, q] = planes[source + q * column] + (image[b, r, q] if j > 0 else np.float32(0))


@jit
def _pack_sinogram(sinogram, maps, packed, first, start, stop):
    blocks, views, bins, lanes = packed.shape
    for i in range(start, stop):
        block, v = i // views, i % views
        for lane in range(lanes):
            b, view, reverse = maps[block, v, lane]
            if view >= 0:
                for k in range(bins - 2):
                    packed[block, v, k + 1, lane] = sinogram[b, view, first + (bins - 3 - k if reverse else k)]


@jit
def _unpack_sinogram(packed, maps, sinogram, first, start, stop):
    blocks, views, bins, lanes = packed.shape
    for i in range(start, stop):
        block, v = i // views, i % views
        for lane in range(lanes):
            b, view, reverse = maps[block, v, lane]
            if view >= 0:
                for k in range(bins - 2):
                    sinogram[b, view, first + (bins - 3 - k if reverse else k)] = packed[block, v, k + 1, lane]


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
def _project_view(image, base, width, x, y, dx, dy, count, h, at, w, row, to):
    """One view into row[to + k * LANES]."""
    for k in range(len(x)):
        total = simd.zero()
        for first in range(0, count[k], CHUNK):  # partial sums: less rounding than one long one
            last = min(first + CHUNK, count[k])
            _samples(x[k], y[k], dx[k], dy[k], first, last, width, at, w)
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
        simd.store(row, to + k * LANES, simd.mul(total, h[k]))


@jit
def _forward(image, shape, x, y, dx, dy, count, h, sinogram, start, stop):
    height, width = shape
    views, bins = x.shape
    at, w = np.empty(CHUNK, np.int32), np.empty((4, CHUNK), np.float32)
    for i in range(start, stop):
        v, base = i % views, i // views * height * width * LANES
        _project_view(image, base, width, x[v], y[v], dx[v], dy[v], count[v], h[v], at, w, sinogram,
                      (i * (bins + 2) + 1) * LANES)


@jit
def _forward_filtered(image, shape, x, y, dx, dy, count, h, maps, view_weights, bin_weights, centre, distance, tap,
                      sinogram, start, stop):
    """Projection, weights and filter, view by view: the projection of a view never leaves the cache.

    The filter's taps are `centre` and `tap[i]` at +-distance[i] bins; four bins are summed at once.
    """
    height, width = shape
    views, bins = x.shape
    at, w = np.empty(CHUNK, np.int32), np.empty((4, CHUNK), np.float32)
    row, lane_weights = np.zeros((3 * bins + 4) * LANES, np.float32), np.empty(LANES, np.float32)
    for i in range(start, stop):
        block, v = i // views, i % views
        _project_view(image, block * height * width * LANES, width, x[v], y[v], dx[v], dy[v], count[v], h[v], at, w,
                      row, bins * LANES)
        for lane in range(LANES):
            view = maps[block, v, lane, 1]
            lane_weights[lane] = view_weights[view] if view >= 0 else 0
        for k in range(bins):
            for lane in range(LANES):
                row[(bins + k) * LANES + lane] *= lane_weights[lane] * bin_weights[k]
        to = (i * (bins + 2) + 1) * LANES
        simd.store(sinogram, to - LANES, simd.zero())
        simd.store(sinogram, to + bins * LANES, simd.zero())
        for k in range(0, bins, 4):
            at_0 = (bins + k) * LANES
            a = simd.mul(simd.load(row, at_0), centre)
            b = simd.mul(simd.load(row, at_0 + LANES), centre)
            c = simd.mul(simd.load(row, at_0 + 2 * LANES), centre)
            d = simd.mul(simd.load(row, at_0 + 3 * LANES), centre)
            for j in range(len(tap)):
                if distance[j] > max(k + 3, bins - 1 - k):
                    break
                left, right = at_0 - distance[j] * LANES, at_0 + distance[j] * LANES
                a = simd.mul_add(simd.add(simd.load(row, left), simd.load(row, right)), tap[j], a)
                left, right = left + LANES, right + LANES
                b = simd.mul_add(simd.add(simd.load(row, left), simd.load(row, right)), tap[j], b)
                left, right = left + LANES, right + LANES
                c = simd.mul_add(simd.add(simd.load(row, left), simd.load(row, right)), tap[j], c)
                left, right = left + LANES, right + LANES
                d = simd.mul_add(simd.add(simd.load(row, left), simd.load(row, right)), tap[j], d)
            simd.store(sinogram, to + k * LANES, a)
            if k + 1 < bins:
                simd.store(sinogram, to + (k + 1) * LANES, b)
            if k + 2 < bins:
                simd.store(sinogram, to + (k + 2) * LANES, c)
            if k + 3 < bins:
                simd.store(sinogram, to + (k + 3) * LANES, d)


@jit
def _forward_transpose(sinogram, shape, x, y, dx, dy, count, h, image, block, workers, start, stop):
    """Rays of different views write to the same pixels: worker i adds every workers-th view to image i of its own."""
    height, width = shape
    views, bins = x.shape
    at, w = np.empty(CHUNK, np.int32), np.empty((4, CHUNK), np.float32)
    for worker in range(start, stop):
        base = worker * height * width * LANES
        image[base:base + height * width * LANES] = 0
        for v in range(worker, views, workers):
            for k in range(bins):
                value = simd.mul(simd.load(sinogram, ((block * views + v) * (bins + 2) + k + 1) * LANES), h[v, k])
                for first in range(0, count[v, k], CHUNK):
                    last = min(first + CHUNK, count[v, k])
                    _samples(x[v, k], y[v, k], dx[v, k], dy[v, k], first, last, width, at, w)
                    for j in range(last - first):
                        for corner in range(4):
                            to = base + at[j] + (corner % 2 + corner // 2 * width) * LANES
                            simd.store(image, to, simd.mul_add(value, w[corner, j], simd.load(image, to)))


@jit
def _sum_workers(image, workers, block, planes, start, stop):
    """Sum the workers' images, without their padding, into the planes of a block."""
    lanes, rows, columns = planes.shape
    width = columns + 2 * PAD
    size = (rows + 2 * PAD) * width * LANES
    for r in range(start, stop):
        for q in range(columns):
            at = ((r + PAD) * width + q + PAD) * LANES
            total = simd.load(image, at)
            for worker in range(1, workers):
                total = simd.add(total, simd.load(image, at + worker * size))
            simd.store(image, at, total)
        for lane in range(LANES):
            for q in range(columns):
                planes[block * LANES + lane, r, q] = image[((r + PAD) * width + q + PAD) * LANES + lane]


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
def _backproject(sinogram, bins, views, scan, planes, start, stop):
    lanes, rows, columns = planes.shape
    at, w = np.empty(columns, np.int32), np.empty((2, columns), np.float32)
    row = np.empty(columns * LANES, np.float32)
    for i in range(start, stop):
        block, r = i // rows, i % rows
        row[:] = 0
        for v in range(len(views)):
            _row(v, r, rows, columns, bins, views, scan, at, w)
            base = (block * len(views) + v) * bins * LANES
            for q in range(columns):
                value = simd.mul_add(simd.load(sinogram, base + at[q]), w[0, q], simd.load(row, q * LANES))
                value = simd.mul_add(simd.load(sinogram, base + at[q] + LANES), w[1, q], value)
                simd.store(row, q * LANES, value)
        for lane in range(LANES):
            for q in range(columns):
                planes[block * LANES + lane, r, q] = row[q * LANES + lane]


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
            log.warning("torch_radon: compiling the CPU kernels (about ten seconds; later runs load them where Numba's "
                        "cache can be written)")

    def on_end(self, event):
        """Nothing to say at the end of a compilation."""


_announce = _Announce()
_pool = None


def _forget_pool():
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # Windows forks nothing
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
    image_in: np.ndarray      # (blocks, LANES, 3): flat offset in the batch (-1: unused), row and column step
    image_out: np.ndarray     # (batch, elements, 3): the same into the planes, of the inverse element
    bin_weights: np.ndarray   # of the used bins, before the filter
    sinogram: np.ndarray      # (blocks, views, LANES, 3): batch index, view or -1, reversed
    shape: tuple              # padded (height, width)

    @property
    def row(self) -> int:
        """Bins of a packed row, its two zeros included."""
        return self.stop - self.first + 2


_local = threading.local()
KEPT = 1 << 22  # values


def _scratch(name: str, *shape: int) -> np.ndarray:
    """Uninitialised float32 memory that lives until the next call with this name in this thread: fresh pages cost as
    much time as a small projection. Above 16 MiB it is allocated anew, so that no large memory is held.
    """
    size = math.prod(shape)
    if size > KEPT:
        return np.empty(shape, np.float32)
    kept = _local.__dict__.get(name)
    if kept is None or kept.size < size:
        kept = _local.__dict__[name] = np.empty(size, np.float32)
    return kept[:size].reshape(shape)


@lru_cache(maxsize=64)
def _plan(geometry: Geometry, batch: int) -> _Plan:
    first, stop = used_bins(geometry)
    if geometry.det_offset == 0:  # a mirrored view reads its bins backwards: keep the cropped detector symmetric
        first = min(first, geometry.det_count - stop)
        stop = geometry.det_count - first
    reduction = choose(geometry, LANES)
    elements, views = len(reduction.group), len(reduction.angles)
    blocks = -(-elements * batch // LANES)
    height, width = geometry.height, geometry.width
    padded = height + 2 * PAD, width + 2 * PAD
    image_in = np.full((blocks * LANES, 3), -1, np.int64)
    image_out = np.zeros((batch, elements, 3), np.int64)
    sinogram = np.full((blocks * LANES, views, 3), -1, np.int64)
    for j, element in enumerate(reduction.group):
        k, s = element
        inverse = ((-k) % 4, 1) if s > 0 else element
        for b in range(batch):
            lane = j * batch + b
            image_in[lane] = pixel_map(element, height, width)
            image_in[lane, 0] += b * height * width
            image_out[b, j] = pixel_map(inverse, height, width)
            image_out[b, j, 0] += lane * height * width
            sinogram[lane] = np.stack([np.full(views, b), reduction.views[:, j], np.full(views, s < 0)], axis=1)
    rays = ray_samples(geometry, reduction.angles, geometry.bins[first:stop])
    rays["x"], rays["y"] = rays["x"] + PAD, rays["y"] + PAD
    centre = geometry.det_count / 2 - 0.5 - geometry.det_offset / geometry.det_spacing - first + 1
    scan = (geometry.source_distance or 0.0, (geometry.source_distance or 0.0) + geometry.det_distance,
            float(geometry.det_spacing), centre, geometry.det_count / 2 if geometry.clip_to_circle else 0.0,
            geometry.weights == "fdk")
    return _Plan(blocks, views, first, stop, rays, np.stack([np.cos(reduction.angles), np.sin(reduction.angles)], 1),
                 scan, image_in.reshape(blocks, LANES, 3), image_out,
                 detector_weight(geometry)[first:stop].astype(np.float32),
                 np.ascontiguousarray(sinogram.reshape(blocks, LANES, views, 3).transpose(0, 2, 1, 3)),
                 padded)


def _pack_images(plan, image):
    packed = _scratch("packed", plan.blocks, *plan.shape, LANES)
    _run(_pack_image, plan.blocks * plan.shape[0], image.reshape(-1), plan.image_in, packed)
    return packed.reshape(-1)


def _planes(plan, geometry):
    return _scratch("planes", plan.blocks * LANES, geometry.height, geometry.width)


def _unpack_planes(plan, planes, batch):
    image = np.empty((batch, *planes.shape[1:]), np.float32)
    _run(_sum_planes, batch * image.shape[1], planes.reshape(-1), plan.image_out, image)
    return torch.from_numpy(image)


def _pack_sinograms(plan, sinogram):
    packed = np.zeros((plan.blocks, plan.views, plan.row, LANES), np.float32)
    _run(_pack_sinogram, plan.blocks * plan.views, sinogram, plan.sinogram, packed, plan.first)
    return packed.reshape(-1)


def _unpack_sinograms(plan, packed, geometry, batch):
    sinogram = np.zeros((batch, len(geometry.angles), geometry.det_count), np.float32)
    _run(_unpack_sinogram, plan.blocks * plan.views, packed.reshape(plan.blocks, plan.views, plan.row, LANES),
         plan.sinogram, sinogram, plan.first)
    return torch.from_numpy(sinogram)


def _rays(plan):
    return plan.shape, *(plan.rays[name] for name in ("x", "y", "dx", "dy", "count", "h"))


def _smear(plan, packed, geometry, batch):
    planes = _planes(plan, geometry)
    _run(_backproject, plan.blocks * geometry.height, packed, plan.row, plan.trigonometry, plan.scan, planes)
    return _unpack_planes(plan, planes, batch)


def forward(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 -> (B, views, bins)."""
    plan = _plan(geometry, len(image))
    sinogram = _scratch("sinogram", plan.blocks * plan.views * plan.row * LANES)
    _run(_forward, plan.blocks * plan.views, _pack_images(plan, image.numpy()), *_rays(plan), sinogram)
    return _unpack_sinograms(plan, sinogram, geometry, len(image))


def backproject(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 -> (B, H, W)."""
    plan = _plan(geometry, len(sinogram))
    return _smear(plan, _pack_sinograms(plan, sinogram.numpy()), geometry, len(sinogram))


def forward_transpose(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 -> (B, H, W): the transpose of `forward`."""
    plan, workers = _plan(geometry, len(sinogram)), torch.get_num_threads()
    packed, planes = _pack_sinograms(plan, sinogram.numpy()), _planes(plan, geometry)
    image = _scratch("workers", workers * math.prod(plan.shape) * LANES)
    for block in range(plan.blocks):
        _run(_forward_transpose, workers, packed, *_rays(plan), image, block, workers)
        _run(_sum_workers, geometry.height, image, workers, block, planes)
    return _unpack_planes(plan, planes, len(sinogram))


def backproject_transpose(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 -> (B, views, bins): the transpose of `backproject`."""
    plan = _plan(geometry, len(image))
    sinogram = np.zeros((plan.blocks, plan.views, plan.row, LANES), np.float32)
    _run(_backproject_transpose, plan.blocks * plan.views, _pack_images(plan, image.numpy()), plan.shape, plan.row,
         plan.trigonometry, plan.scan, sinogram.reshape(-1))
    return _unpack_sinograms(plan, sinogram, geometry, len(image))


@lru_cache(maxsize=16)
def _filter(geometry: Geometry, name: str) -> tuple[np.float32, np.ndarray, np.ndarray]:
    """The filter's central tap, and distance and value of the others that are not zero."""
    taps = impulse_response(geometry.det_count, name).astype(np.float32)
    distance = np.flatnonzero(taps[1:]) + 1
    return taps[0], distance, taps[distance]


def fbp(geometry: Geometry, image: torch.Tensor, view_weights: torch.Tensor | None, name: str) -> torch.Tensor:
    """Backprojection of the filtered projection of (B, H, W) float32, without leaving the packed layout.

    view_weights: (views,) float32, the factor of each view; pi/(2N), a plain FBP over N views, if None.
    """
    if view_weights is None:
        view_weights = image.new_full((geometry.n_angles,), math.pi / 2 / geometry.n_angles)
    plan = _plan(geometry, len(image))
    sinogram = _scratch("sinogram", plan.blocks * plan.views * plan.row * LANES)
    _run(_forward_filtered, plan.blocks * plan.views, _pack_images(plan, image.numpy()), *_rays(plan), plan.sinogram,
         view_weights.numpy(), plan.bin_weights, *_filter(geometry, name), sinogram)
    return _smear(plan, sinogram, geometry, len(image))
