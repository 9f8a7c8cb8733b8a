"""CUDA backend: Triton kernels, several images a program, on PyTorch's current stream, capturable by CUDA graphs.

A few images (LANES: four of float32, eight of float16, 16 bytes) lie side by side at every texel and bin, so that one
address and one set of weights serves them all in one load. Coordinates are fixed-point int64, made from float64 on the
host: stepping along a ray or across an image is exact to 1e-7 pixels, the integer part is a register, and no float is
ever floored. Images are packed twice, as they are and transposed: each view reads the copy in which neighbouring rays
are neighbours in memory. The transposes run the same kernels backwards with atomic additions: the samples of a ray
start where the ray enters, so a gather would have to search them, and the same coordinates make the transpose exact.
Storage is the input's (float32, or float16 where the caller passes it), arithmetic float32 and never TF32.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from .filtering import detector_weight, filter_matrix
from .geometry import PAD, Geometry, ray_samples, used_bins

RAY_BITS = tl.constexpr(32)    # binary places of ray coordinates
PIXEL_BITS = tl.constexpr(40)  # and of pixel coordinates, which are multiplied by a bin number
BEFORE, AFTER = tl.constexpr(2), tl.constexpr(1)  # zero bins around a packed sinogram row: bins 0 and 1 read nothing
MARGIN = tl.constexpr(PAD)
STEPS, BINS = 4, 32            # samples and rays of a program of `_project`; a warp is 32 rays at one step
TILE = 16                      # a program of `_smear` holds TILE x TILE pixels
CELLS = 256                    # texels or bins of a program of `_pack`
ROWS, COLUMNS, DEPTH = 32, 64, 16  # tile of the filter's matrix product


@triton.jit
def _fraction(fixed, BITS: tl.constexpr):
    """Fraction in [0, 1) of a fixed-point number: its leading 23 bits as the mantissa of a float in [1, 2), minus 1."""
    mantissa = ((fixed >> (BITS - 23)) & 0x7FFFFF) | 0x3F800000
    return mantissa.to(tl.int32).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _pack(source, target, batch, rows, columns, stride_b, stride_r, plane, ROW_PAD: tl.constexpr,
          FRONT: tl.constexpr, BACK: tl.constexpr, TURNED: tl.constexpr, CELLS: tl.constexpr, LANES: tl.constexpr):
    """(batch, rows, columns) -> (blocks, ROW_PAD + rows + ROW_PAD, FRONT + columns + BACK, LANES), zeros around.

    With TURNED also the transpose of rows and columns, `plane` cells further on.
    """
    block = tl.program_id(1).to(tl.int64)
    height, width = rows + 2 * ROW_PAD, columns + FRONT + BACK
    i = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    r, q = i // width, i % width
    y, x = r - ROW_PAD, q - FRONT
    lane = tl.arange(0, LANES)[None, :]
    b = block * LANES + lane
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    value = tl.load(source + b * stride_b + (y * stride_r + x)[:, None], mask=inside[:, None] & (b < batch), other=0.0)
    whole = (i < height * width)[:, None]
    target += block * height * width * LANES
    tl.store(target + i[:, None] * LANES + lane, value, mask=whole)
    if TURNED:
        target += plane.to(tl.int64) * LANES
        tl.store(target + (q * height + r)[:, None] * LANES + lane, value, mask=whole)


@triton.jit
def _project(image, sinogram, rays, counts, lengths, turned, batch, height, width, bins, stride_b, stride_v, plane,
             SCATTER: tl.constexpr, STEPS: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr):
    """Packed images -> sinograms (batch, views, bins) with strides; with SCATTER the transpose, added to `image`.

    rays: (views, 4, bins) int64, x, y of the first sample and the steps dx, dy in the padded copy that the view reads.
    """
    blocks = tl.cdiv(bins, BINS)
    view, block = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) % blocks * BINS + tl.arange(0, BINS)
    inside = k < bins
    ray = rays + view * 4 * bins + k
    x, y = tl.load(ray, mask=inside, other=0), tl.load(ray + bins, mask=inside, other=0)
    dx, dy = tl.load(ray + 2 * bins, mask=inside, other=0), tl.load(ray + 3 * bins, mask=inside, other=0)
    count = tl.load(counts + view * bins + k, mask=inside, other=0)
    length = tl.load(lengths + view * bins + k, mask=inside, other=0.0)
    flip = tl.load(turned + view)
    row_length = tl.where(flip != 0, height, width) + 2 * MARGIN
    image += (flip * plane + block * ((height + 2 * MARGIN) * (width + 2 * MARGIN))) * LANES

    lane = tl.arange(0, LANES)
    b = block * LANES + lane[None, :]
    place = sinogram + b * stride_b + (view * stride_v + k)[:, None]
    exists = inside[:, None] & (b < batch)
    if SCATTER:
        value = tl.load(place, mask=exists, other=0.0).to(tl.float32) * length[:, None]
    total = tl.zeros((STEPS, BINS, LANES), tl.float32)
    j = tl.arange(0, STEPS)[:, None]
    x, y = x[None, :] + j * dx[None, :], y[None, :] + j * dy[None, :]
    for first in range(0, tl.max(count), STEPS):
        active = first + j < count[None, :]
        at = (y >> RAY_BITS).to(tl.int32) * row_length + (x >> RAY_BITS).to(tl.int32)
        at = tl.where(active, at, 0)  # texel 0 and its neighbours are margin: zeros, cheaper than masked loads
        upper = image + at[:, :, None] * LANES + lane[None, None, :]
        lower = upper + row_length * LANES
        fx, fy = _fraction(x, RAY_BITS)[:, :, None], _fraction(y, RAY_BITS)[:, :, None]
        if SCATTER:
            mask = active[:, :, None] & (b < batch)[None, :, :]
            tl.atomic_add(upper, value[None, :, :] * ((1 - fx) * (1 - fy)), mask=mask, sem="relaxed")
            tl.atomic_add(upper + LANES, value[None, :, :] * (fx * (1 - fy)), mask=mask, sem="relaxed")
            tl.atomic_add(lower, value[None, :, :] * ((1 - fx) * fy), mask=mask, sem="relaxed")
            tl.atomic_add(lower + LANES, value[None, :, :] * (fx * fy), mask=mask, sem="relaxed")
        else:
            total = tl.fma(tl.load(upper).to(tl.float32), (1 - fx) * (1 - fy), total)
            total = tl.fma(tl.load(upper + LANES).to(tl.float32), fx * (1 - fy), total)
            total = tl.fma(tl.load(lower).to(tl.float32), (1 - fx) * fy, total)
            total = tl.fma(tl.load(lower + LANES).to(tl.float32), fx * fy, total)
        x += dx[None, :] * STEPS
        y += dy[None, :] * STEPS
    if not SCATTER:
        tl.store(place, tl.sum(total, axis=0) * length[:, None], mask=exists)


@triton.jit
def _smear(sinogram, image, pixels, batch, height, width, views, bins, diameter, scale, SCATTER: tl.constexpr,
           FAN: tl.constexpr, SQUARED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr):
    """Packed sinograms -> images (batch, height, width); with SCATTER the transpose, added to `sinogram`.

    pixels: (views, 6) int64. Bin position N / D of a pixel, N and D affine in its column and row: floor and remainder
    of that division are exact in integers. Weight scale / D, or scale / D^2 if SQUARED; D is 1 for a parallel beam.
    """
    tiles = tl.cdiv(width, TILE)
    block = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, TILE * TILE)
    r, q = tl.program_id(0) // tiles * TILE + i // TILE, tl.program_id(0) % tiles * TILE + i % TILE
    x, y = 2 * q - width + 1, 2 * r - height + 1  # twice the coordinates: integers
    seen = (r < height) & (q < width) & (x * x + y * y <= diameter * diameter)
    lane = tl.arange(0, LANES)[None, :]
    b = block * LANES + lane
    place = image + b * (height * width) + (r * width + q)[:, None]
    exists = ((r < height) & (q < width))[:, None] & (b < batch)
    row_length = bins + BEFORE + AFTER
    sinogram += block * views * row_length * LANES
    if SCATTER:
        value = tl.load(place, mask=exists & seen[:, None], other=0.0).to(tl.float32) * scale
    total = tl.zeros((TILE * TILE, LANES), tl.float32)
    for view in range(views):
        table = pixels + view * 6
        n = tl.load(table) + tl.load(table + 1) * q + tl.load(table + 2) * r
        if FAN:
            d = tl.load(table + 3) + tl.load(table + 4) * q + tl.load(table + 5) * r
            weight = 16777216.0 / (d >> (PIXEL_BITS - 24)).to(tl.int32).to(tl.float32)  # 1 / D
            k = ((n >> (PIXEL_BITS - 16)).to(tl.int32).to(tl.float32) * (weight / 65536.0)).to(tl.int32)
            f = ((n - k * d) >> (PIXEL_BITS - 24)).to(tl.int32).to(tl.float32) * (weight / 16777216.0)
        else:
            k, f, weight = (n >> PIXEL_BITS).to(tl.int32), _fraction(n, PIXEL_BITS), 1.0
        if SQUARED:
            weight *= weight
        hit = (k >= BEFORE - 1) & (k < bins + BEFORE)
        lower = sinogram + (view * row_length + tl.where(hit, k, 0))[:, None] * LANES + lane
        if SCATTER:
            mask = (hit & seen)[:, None] & (b < batch)
            tl.atomic_add(lower, value * (weight * (1 - f))[:, None], mask=mask, sem="relaxed")
            tl.atomic_add(lower + LANES, value * (weight * f)[:, None], mask=mask, sem="relaxed")
        else:
            total = tl.fma(tl.load(lower).to(tl.float32), (weight * (1 - f))[:, None], total)
            total = tl.fma(tl.load(lower + LANES).to(tl.float32), (weight * f)[:, None], total)
    if not SCATTER:
        tl.store(place, tl.where(seen[:, None], total * scale, 0.0), mask=exists)


@triton.jit
def _filter(sinogram, matrix, view_weights, target, rows, bins, views, LANES: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Rows (batch * views, bins) times matrix (bins, BEFORE + bins + AFTER) times their view's weight, packed."""
    width = bins + BEFORE + AFTER
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, bins, DEPTH):
        k = first + tl.arange(0, DEPTH)
        p = tl.load(sinogram + row[:, None].to(tl.int64) * bins + k[None, :],
                    mask=(row < rows)[:, None] & (k < bins)[None, :], other=0.0)
        taps = tl.load(matrix + k[:, None] * width + column[None, :],
                       mask=(k < bins)[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(p, taps, total, input_precision="ieee")
    view, b = row % views, row // views
    total *= tl.load(view_weights + view)[:, None]
    place = ((b // LANES).to(tl.int64) * views + view) * width * LANES + b % LANES
    tl.store(target + place[:, None] + column[None, :] * LANES, total,
             mask=(row < rows)[:, None] & (column < width)[None, :])


@dataclass(frozen=True, eq=False)
class _Tables:
    """Tables of one geometry on one device."""

    bins: slice            # the used ones
    rays: torch.Tensor     # (views, 4, used) int64
    counts: torch.Tensor   # (views, used) int32: samples
    lengths: torch.Tensor  # (views, used) float32: pixels between samples
    turned: torch.Tensor   # (views,) int64: 1 where the view reads the transposed copy
    pixels: torch.Tensor   # (views, 6) int64
    diameter: int          # pixels further out than half of it get nothing
    scale: float

    @property
    def used(self) -> int:
        return self.bins.stop - self.bins.start


def _pixel_table(geometry: Geometry, theta: np.ndarray, first: int) -> tuple[np.ndarray, float]:
    """Coefficients (constant, per column, per row) of N, then of D, for every view, (views, 6) int64; the weight."""
    cos, sin = np.cos(theta), np.sin(theta)
    near = geometry.source_distance if geometry.fan else np.inf
    gain = (1 + geometry.det_distance / near) / geometry.det_spacing
    centre = geometry.det_count / 2 - 0.5 - geometry.det_offset / geometry.det_spacing - first + BEFORE.value
    x, y = 0.5 - geometry.width / 2, 0.5 - geometry.height / 2
    across = np.stack([x * cos - y * sin, cos, -sin], axis=1)
    depth = np.stack([1 - (x * sin + y * cos) / near, -sin / near, -cos / near], axis=1)
    table = np.concatenate([gain * across + centre * depth, depth], axis=1)
    reach = gain * np.hypot(x, y) / (1 - np.hypot(x, y) / near) + abs(centre)
    if reach >= 2**15:
        raise ValueError(f"the image spans {2 * reach:.0f} bins of the detector; the CUDA kernels take less than 65536 "
                         "(choose a larger det_spacing)")
    return np.rint(table * 2.0**PIXEL_BITS.value).astype(np.int64), gain


@lru_cache(maxsize=512)  # training on any view count comes to some 350 scans
def _build(geometry: Geometry, device: torch.device) -> _Tables:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("this scan's tables are not on the GPU; apply the operator once before capturing a graph")
    bins, theta = slice(*used_bins(geometry)), np.asarray(geometry.angles, np.float64)
    rays = ray_samples(geometry, theta, geometry.bins[bins])
    along_rows = np.abs(np.sin(theta)) > np.abs(np.cos(theta))
    pairs = np.stack([rays["x"] + PAD, rays["y"] + PAD, rays["dx"], rays["dy"]], axis=1)
    pairs = np.where(along_rows[:, None, None], pairs[:, [1, 0, 3, 2]], pairs)
    pixels, scale = _pixel_table(geometry, theta, bins.start)
    diameter = geometry.det_count if geometry.clip_to_circle else geometry.height + geometry.width
    tables = (np.rint(pairs * 2.0**RAY_BITS.value).astype(np.int64), rays["count"], rays["h"],
              along_rows.astype(np.int64), pixels)
    return _Tables(bins, *(torch.from_numpy(np.ascontiguousarray(t)).to(device) for t in tables), diameter, scale)


@lru_cache(maxsize=128)
def _matrix(geometry: Geometry, name: str, device: torch.device) -> torch.Tensor:
    """The filter with the detector weights, its rows the bins it reads, between the zero bins it writes."""
    first, stop = used_bins(geometry)
    matrix = filter_matrix(geometry.det_count, name, first, stop) * detector_weight(geometry)[first:stop, None]
    return torch.from_numpy(np.pad(matrix, ((0, 0), (BEFORE.value, AFTER.value)))).float().to(device)


_captured = {}  # what graphs replay with: the caches above may forget it, its memory must not be freed


def _on_device(build, *key):
    tables = build(*key)
    if key[-1].type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[build, *key] = tables
    return tables


def _lanes(tensor: torch.Tensor) -> int:
    """Images side by side: 16 bytes of them, or all of a small batch."""
    return min(16 // tensor.element_size(), triton.next_power_of_2(len(tensor)))


def _launch_pack(source: torch.Tensor, lanes: int, row_pad: int, front: int, back: int, copies: int) -> torch.Tensor:
    batch, rows, columns = source.shape
    blocks, size = triton.cdiv(batch, lanes), (rows + 2 * row_pad) * (columns + front + back)
    target = source.new_empty(copies, blocks, size, lanes)
    _pack[triton.cdiv(size, CELLS), blocks](source, target, batch, rows, columns, source.stride(0), source.stride(1),
                                            blocks * size, row_pad, front, back, copies == 2, CELLS, lanes)
    return target


def _launch_project(tables: _Tables, packed: torch.Tensor, sinogram: torch.Tensor, size: tuple, scatter: bool):
    batch, views, _ = sinogram.shape
    _, blocks, _, lanes = packed.shape
    _project[triton.cdiv(tables.used, BINS) * views, blocks](
        packed, sinogram, tables.rays, tables.counts, tables.lengths, tables.turned, batch, *size, tables.used,
        sinogram.stride(0), sinogram.stride(1), blocks * packed.shape[2], scatter, STEPS, BINS, lanes)


def _launch_smear(geometry: Geometry, tables: _Tables, packed: torch.Tensor, image: torch.Tensor, scatter: bool):
    batch, height, width = image.shape
    blocks, lanes = packed.shape[1], packed.shape[-1]
    _smear[triton.cdiv(height, TILE) * triton.cdiv(width, TILE), blocks](
        packed, image, tables.pixels, batch, height, width, len(geometry.angles), tables.used, tables.diameter,
        tables.scale, scatter, geometry.fan, geometry.fan and geometry.weights == "fdk", TILE, lanes)


def forward(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 or float16 -> (B, views, bins) float32."""
    with torch.cuda.device_of(image):
        tables = _on_device(_build, geometry, image.device)
        packed = _launch_pack(image, _lanes(image), PAD, PAD, PAD, 2)
        sinogram = image.new_zeros(len(image), len(geometry.angles), geometry.det_count, dtype=torch.float32)
        _launch_project(tables, packed, sinogram[:, :, tables.bins], image.shape[1:], False)
    return sinogram


def forward_transpose(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 or float16 -> (B, H, W) float32: the transpose of `forward`."""
    batch, height, width = len(sinogram), geometry.height, geometry.width
    with torch.cuda.device_of(sinogram):
        tables, lanes = _on_device(_build, geometry, sinogram.device), min(4, triton.next_power_of_2(batch))
        packed = sinogram.new_zeros(2, triton.cdiv(batch, lanes), (height + 2 * PAD) * (width + 2 * PAD), lanes,
                                    dtype=torch.float32)
        _launch_project(tables, packed, sinogram[:, :, tables.bins], (height, width), True)
    upright = packed[0].view(-1, height + 2 * PAD, width + 2 * PAD, lanes)[:, PAD:-PAD, PAD:-PAD]
    turned = packed[1].view(-1, width + 2 * PAD, height + 2 * PAD, lanes)[:, PAD:-PAD, PAD:-PAD]
    return (upright + turned.transpose(1, 2)).permute(0, 3, 1, 2).reshape(-1, height, width)[:batch].contiguous()


def backproject(geometry: Geometry, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 or float16 -> (B, H, W) float32."""
    with torch.cuda.device_of(sinogram):
        tables = _on_device(_build, geometry, sinogram.device)
        packed = _launch_pack(sinogram[:, :, tables.bins], _lanes(sinogram), 0, BEFORE.value, AFTER.value, 1)
        image = sinogram.new_empty(len(sinogram), geometry.height, geometry.width, dtype=torch.float32)
        _launch_smear(geometry, tables, packed, image, False)
    return image


def backproject_transpose(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 or float16 -> (B, views, bins) float32: the transpose of `backproject`."""
    batch, views = len(image), len(geometry.angles)
    with torch.cuda.device_of(image):
        tables, lanes = _on_device(_build, geometry, image.device), min(4, triton.next_power_of_2(batch))
        packed = image.new_zeros(1, triton.cdiv(batch, lanes), views * (tables.used + 3), lanes, dtype=torch.float32)
        _launch_smear(geometry, tables, packed, image, True)
    rows = packed.view(-1, views, tables.used + 3, lanes)[:, :, BEFORE.value:-AFTER.value].permute(0, 3, 1, 2)
    sinogram = image.new_zeros(batch, views, geometry.det_count, dtype=torch.float32)
    sinogram[:, :, tables.bins] = rows.reshape(-1, views, tables.used)[:batch]
    return sinogram


def fbp(geometry: Geometry, image: torch.Tensor, view_weights: torch.Tensor, name: str) -> torch.Tensor:
    """Backprojection of the filtered projection of (B, H, W) float32 or float16, in four launches, float32.

    view_weights: (views,) float32, the factor of each view (pi/(2N) for a plain FBP over N views). With float16 the
    filtered sinogram is stored as float16 too; the one before the filter never is.
    """
    batch, views, lanes = len(image), len(geometry.angles), _lanes(image)
    with torch.cuda.device_of(image):
        tables = _on_device(_build, geometry, image.device)
        matrix = _on_device(_matrix, geometry, name, image.device)
        packed = _launch_pack(image, lanes, PAD, PAD, PAD, 2)
        sinogram = image.new_empty(batch, views, tables.used, dtype=torch.float32)
        _launch_project(tables, packed, sinogram, image.shape[1:], False)
        filtered = image.new_empty(1, triton.cdiv(batch, lanes), views * matrix.shape[1], lanes)
        _filter[triton.cdiv(batch * views, ROWS), triton.cdiv(matrix.shape[1], COLUMNS)](
            sinogram, matrix, view_weights, filtered, batch * views, tables.used, views, lanes, ROWS, COLUMNS, DEPTH)
        result = image.new_empty(image.shape, dtype=torch.float32)
        _launch_smear(geometry, tables, filtered, result, False)
    return result
