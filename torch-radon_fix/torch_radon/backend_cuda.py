"""CUDA backend: Triton kernels, several images a program, on PyTorch's current stream, capturable by CUDA graphs.

A few images of one scan (LANES: four of float32, eight of float16, 16 bytes) lie side by side at every texel and bin,
so that one address and one set of weights serves them all in one load. They are a block. A launch has blocks of any
scans: the row of `blocks` that a program reads says where its scan's table lies, how many views it has, and which
images are its lanes. Coordinates are fixed-point, made from float64 on the host: stepping along a ray or across an
image is exact to 5e-7 pixels, and the integer part is a register. Images are packed twice, as they are and transposed:
each view reads the copy in which neighbouring rays are neighbours in memory. Storage is the input's (float32, or
float16 where the caller passes it), arithmetic float32 and never TF32. Every value is written by one program: results
are the same at every call.

The transposes gather, without atomics. A view's samples lie about a pixel apart, so each pixel meets about four: with
atomics, 720 views of 256 x 256 pixels add 191 million floats a slice, at least 150 us of an H200's L2 cache (160 G
sectors/s) even if eight always met in one sector; measured were 1440 us, where the projection takes 98. Gathered, a
pixel looks at three or four rays of a view and at four samples of each, about 500 instructions of compiled code for one
image and 550 for eight side by side: 47 million pixels x 550 / 29 T instructions/s = 110 us for a slice of eight. The
transposed backprojection walks along the rays as the projection does and reads four to six pixels of each row: about
250 instructions for four images, 150 us a slice.
"""

import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from . import backend_torch
from .filtering import detector_weight, filter_matrix
from .geometry import PAD, Geometry, Stacked, ray_samples, used_bins

TAKES_STACKS = True
RAY_BITS = tl.constexpr(32)    # binary places of ray coordinates
STEP_BITS = tl.constexpr(30)   # and of the steps between samples, at most 1
STEP = tl.constexpr(2.0**-30)
PIXEL_BITS = tl.constexpr(40)  # and of pixel coordinates, which are multiplied by a bin number
PIXEL = tl.constexpr(2.0**-40)
BEFORE, AFTER = tl.constexpr(2), tl.constexpr(1)  # zero bins around a packed sinogram row: bins 0 and 1 read nothing
MARGIN = tl.constexpr(PAD)
VIEW = tl.constexpr(8)         # words of a view in a scan's table
ENTRY = tl.constexpr(2)        # words of a block before its lanes
STEPS, BINS = 8, 32            # samples and rays of a program that follows rays; a warp is 32 rays at one step
TILE = 16                      # a program of `_smear` holds TILE x TILE pixels
SMALL_TILE = 8                 # one of `_project_transpose`: its loop is long, so there are more of them
CELLS = 256                    # texels or bins of a program of `_pack`
ROWS, COLUMNS, DEPTH = 32, 64, 16  # tile of the filter's matrix product
TABLE_BYTES = 2 << 30          # of scans kept on a device: every even count up to 720 views, published scanner: 1.5 GB
LARGEST_MATRIX = 2048          # bins up to which the filter is a matrix; wider detectors are filtered by FFT

# No launch compiles anew for a size that is 1 or a multiple of 16: what was compiled once serves every size.
SIZES = ("rows", "columns", "source_rows", "source_columns", "first", "n_blocks", "height", "width", "used",
         "bins", "n_max", "batch", "chunks", "diameter", "each")


@triton.jit
def _fraction(fixed, BITS: tl.constexpr):
    """Fraction in [0, 1) of a fixed-point number: its leading 23 bits as the mantissa of a float in [1, 2), minus 1."""
    mantissa = ((fixed >> (BITS - 23)) & 0x7FFFFF) | 0x3F800000
    return mantissa.to(tl.int32).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _block(blocks, width: tl.constexpr):
    """The table, the views and the row of images of a program's block (its second index); width: the row's lanes."""
    entry = blocks + tl.program_id(1) * (ENTRY + width)
    return tl.load(entry).to(tl.pointer_type(tl.int64)), tl.load(entry + 1).to(tl.int32), entry + ENTRY


@triton.jit
def _rays(table, views, view, k, used, inside):
    """First sample (RAY_BITS), step (STEP_BITS, int32), number of samples and their distance of rays k of a view."""
    ray = table + views * VIEW + view * 4 * used + k
    x, y = tl.load(ray, mask=inside, other=0), tl.load(ray + used, mask=inside, other=0)
    step, rest = tl.load(ray + 2 * used, mask=inside, other=0), tl.load(ray + 3 * used, mask=inside, other=0)
    return (x, y, (step >> 32).to(tl.int32), step.to(tl.int32), (rest >> 32).to(tl.int32),
            rest.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _position(record, q, r, i, j, FAN: tl.constexpr):
    """Bin position N / D in a packed row of the pixel i columns and j rows from pixel (q, r), and 1 / D.

    N and D are affine in column and row. The position is an integer, that of (q, r), and the rest: exact at (q, r), and
    what the few pixels to the others add is small, so that float32 is enough for it.
    """
    n_q, n_r = tl.load(record + 2), tl.load(record + 3)
    n = tl.load(record + 1) + n_q * q + n_r * r
    step_q, step_r = n_q.to(tl.float32) * PIXEL, n_r.to(tl.float32) * PIXEL
    if FAN:
        d_q, d_r = tl.load(record + 5), tl.load(record + 6)
        d = tl.load(record + 4) + d_q * q + d_r * r
        inverse = 16777216.0 / (d >> (PIXEL_BITS - 24)).to(tl.int32).to(tl.float32)
        whole = ((n >> (PIXEL_BITS - 16)).to(tl.int32).to(tl.float32) * (inverse / 65536.0)).to(tl.int32)
        rest = ((n - whole * d) >> (PIXEL_BITS - 24)).to(tl.int32).to(tl.float32) * (inverse / 16777216.0)
        depth_q, depth_r = d_q.to(tl.float32) * PIXEL, d_r.to(tl.float32) * PIXEL
        bin = whole.to(tl.float32) + rest
        inverse = 1 / (d.to(tl.float32) * PIXEL + depth_q * i + depth_r * j)
        rest += ((step_q - bin * depth_q) * i + (step_r - bin * depth_r) * j) * inverse
    else:
        whole, inverse = (n >> PIXEL_BITS).to(tl.int32), 1.0
        rest = _fraction(n, PIXEL_BITS) + step_q * i + step_r * j
    return whole, rest, inverse


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("source",))
def _pack(source, target, blocks, rows, columns, source_rows, source_columns, first, diameter, n_blocks,
          ROW_PAD: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, SINOGRAM: tl.constexpr, TURNED: tl.constexpr,
          CELLS: tl.constexpr, LANES: tl.constexpr):
    """(batch, source_rows, source_columns) -> (blocks, ROW_PAD + rows + ROW_PAD, FRONT + columns + BACK, LANES).

    Zeros around; of a sinogram the columns from `first` and the views that the block has, of an image the pixels at
    most diameter/2 from the centre. With TURNED also the transpose of rows and columns, behind.
    """
    table, views, lanes = _block(blocks, LANES)
    block = tl.program_id(1).to(tl.int64)
    height, width = rows + 2 * ROW_PAD, columns + FRONT + BACK
    i = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    r, q = i // width, i % width
    y, x = r - ROW_PAD, q - FRONT
    lane = tl.arange(0, LANES)
    b = tl.load(lanes + lane)[None, :]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    if SINOGRAM:
        inside = inside & (y < views)
    else:
        u, v = 2 * x - columns + 1, 2 * y - rows + 1
        inside = inside & (u * u + v * v <= diameter * diameter)
    place = source + b * (source_rows * source_columns) + (y * source_columns + x + first)[:, None]
    value = tl.load(place, mask=inside[:, None] & (b >= 0), other=0.0)
    whole = (i < height * width)[:, None]
    size = (height * width).to(tl.int64)
    target += block * size * LANES
    tl.store(target + i[:, None] * LANES + lane[None, :], value, mask=whole)
    if TURNED:
        target += n_blocks * size * LANES
        tl.store(target + (q * height + r)[:, None] * LANES + lane[None, :], value, mask=whole)


@triton.jit(do_not_specialize=SIZES)
def _project(image, sinogram, blocks, height, width, first, used, bins, n_max, n_blocks,
             STEPS: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr):
    """Packed images -> sinograms (batch, n_max, bins); zero outside the used bins and beyond a slice's views."""
    table, views, lanes = _block(blocks, LANES)
    parts = tl.cdiv(bins, BINS)
    view, block = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) % parts * BINS + tl.arange(0, BINS)
    inside = (k >= first) & (k < tl.where(view < views, first + used, 0))
    own = tl.minimum(view, views - 1)
    x, y, dx, dy, count, length = _rays(table, views, own, k - first, used, inside)
    flip = tl.load(table + own * VIEW) & 1
    row_length = tl.where(flip != 0, height, width) + 2 * MARGIN
    size = ((height + 2 * MARGIN) * (width + 2 * MARGIN)).to(tl.int64)
    image += (flip * n_blocks + block) * size * LANES

    lane = tl.arange(0, LANES)
    total = tl.zeros((STEPS, BINS, LANES), tl.float32)
    j = tl.arange(0, STEPS)[:, None]
    dx, dy = dx.to(tl.int64) << (RAY_BITS - STEP_BITS), dy.to(tl.int64) << (RAY_BITS - STEP_BITS)
    x, y = x[None, :] + j * dx[None, :], y[None, :] + j * dy[None, :]
    for start in range(0, tl.max(count), STEPS):
        active = start + j < count[None, :]
        at = (y >> RAY_BITS).to(tl.int32) * row_length + (x >> RAY_BITS).to(tl.int32)
        at = tl.where(active, at, 0)  # texel 0 and its neighbours are margin: zeros, cheaper than masked loads
        upper = image + at[:, :, None] * LANES + lane[None, None, :]
        lower = upper + row_length * LANES
        fx, fy = _fraction(x, RAY_BITS)[:, :, None], _fraction(y, RAY_BITS)[:, :, None]
        total = tl.fma(tl.load(upper).to(tl.float32), (1 - fx) * (1 - fy), total)
        total = tl.fma(tl.load(upper + LANES).to(tl.float32), fx * (1 - fy), total)
        total = tl.fma(tl.load(lower).to(tl.float32), (1 - fx) * fy, total)
        total = tl.fma(tl.load(lower + LANES).to(tl.float32), fx * fy, total)
        x += dx[None, :] * STEPS
        y += dy[None, :] * STEPS
    b = tl.load(lanes + lane)[None, :]
    place = sinogram + (b * n_max + view) * bins + k[:, None]
    tl.store(place, tl.sum(total, axis=0) * length[:, None], mask=(k < bins)[:, None] & (b >= 0))


@triton.jit(do_not_specialize=SIZES)
def _project_transpose(sinogram, image, blocks, height, width, used, n_max, batch, chunks, FAN: tl.constexpr,
                       TILE: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr):
    """Packed sinograms -> images (chunks, batch, height, width), each the sum over its share of the views.

    A sample of a ray adds to the texels less than a pixel from it along x and along y. So a pixel reads the rays that
    come that near, `candidates` from the first that can, and of each the four samples from the first that can: they are
    more than half a pixel apart along the ray's main direction, or the ray has no more than four.
    """
    table, views, lanes = _block(blocks, LANES * GROUPS)
    tiles = tl.cdiv(width, TILE)
    block, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i = tl.arange(0, TILE * TILE)
    r_0, q_0 = tl.program_id(0) // tiles * TILE, tl.program_id(0) % tiles * TILE
    r, q = r_0 + i // TILE, q_0 + i % TILE
    lane = tl.arange(0, LANES)[None, :]
    sinogram += block * n_max * used * (LANES * GROUPS)
    total = tl.zeros((TILE * TILE, LANES), tl.float32)
    if GROUPS == 2:
        second = tl.zeros((TILE * TILE, LANES), tl.float32)
    for view in range(chunk * views // chunks, (chunk + 1) * views // chunks):
        record = table + view * VIEW
        flip, window = tl.load(record) & 1, tl.load(record + 7)
        candidates = (window >> 32).to(tl.int32)
        reach = window.to(tl.int32).to(tl.float32, bitcast=True)
        whole, rest, inverse = _position(record, q_0, r_0, (q - q_0).to(tl.float32), (r - r_0).to(tl.float32), FAN)
        lowest = tl.where(candidates >= used, 0, whole - BEFORE + 1 + tl.floor(rest - reach).to(tl.int32))
        column, row = tl.where(flip != 0, r, q) + MARGIN, tl.where(flip != 0, q, r) + MARGIN
        column, row = column.to(tl.int64) << RAY_BITS, row.to(tl.int64) << RAY_BITS
        for candidate in range(0, candidates):
            k = lowest + candidate
            inside = (k >= 0) & (k < used)
            k = tl.where(inside, k, 0)
            x, y, dx, dy, count, length = _rays(table, views, view, k, used, inside)
            x, y = x - column, y - row
            step_x, step_y = dx.to(tl.float32) * STEP, dy.to(tl.float32) * STEP
            steep = tl.abs(step_y) > tl.abs(step_x)
            step = tl.where(steep, step_y, step_x)
            offset = (tl.where(steep, y, x) >> (RAY_BITS - 16)).to(tl.int32).to(tl.float32) / 65536.0
            start = (tl.where(step > 0, -offset, offset) - 1.001) / tl.where(count > 0, tl.abs(step), 1.0)
            start = tl.maximum(tl.minimum(tl.floor(start).to(tl.int32) + 1, count - 4), 0)
            x += (start.to(tl.int64) * dx.to(tl.int64)) << (RAY_BITS - STEP_BITS)
            y += (start.to(tl.int64) * dy.to(tl.int64)) << (RAY_BITS - STEP_BITS)
            fx = (x >> RAY_BITS).to(tl.int32).to(tl.float32) + _fraction(x, RAY_BITS)
            fy = (y >> RAY_BITS).to(tl.int32).to(tl.float32) + _fraction(y, RAY_BITS)
            weight = tl.zeros((TILE * TILE,), tl.float32)
            for j in tl.static_range(4):
                near = tl.maximum(1 - tl.abs(fx), 0.0) * tl.maximum(1 - tl.abs(fy), 0.0)
                weight += tl.where(start + j < count, near, 0.0)
                fx += step_x
                fy += step_y
            weight = (weight * length)[:, None]
            place = sinogram + (view * used + k)[:, None] * (LANES * GROUPS) + lane
            total = tl.fma(tl.load(place), weight, total)
            if GROUPS == 2:
                second = tl.fma(tl.load(place + LANES), weight, second)
    exists = ((r < height) & (q < width))[:, None]
    pixel = (r * width + q)[:, None]
    b = tl.load(lanes + lane)
    tl.store(image + (chunk * batch + b) * (height * width) + pixel, total, mask=exists & (b >= 0))
    if GROUPS == 2:
        b = tl.load(lanes + LANES + lane)
        tl.store(image + (chunk * batch + b) * (height * width) + pixel, second, mask=exists & (b >= 0))


@triton.jit(do_not_specialize=SIZES)
def _smear(sinogram, image, blocks, height, width, bins, n_max, diameter, scale, FAN: tl.constexpr,
           SQUARED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr):
    """Packed sinograms -> images (batch, height, width). The weight is scale / D, or scale / D^2 if SQUARED."""
    table, views, lanes = _block(blocks, LANES)
    tiles = tl.cdiv(width, TILE)
    i = tl.arange(0, TILE * TILE)
    r_0, q_0 = tl.program_id(0) // tiles * TILE, tl.program_id(0) % tiles * TILE
    r, q = r_0 + i // TILE, q_0 + i % TILE
    x, y = 2 * q - width + 1, 2 * r - height + 1  # twice the coordinates: integers
    seen = (r < height) & (q < width) & (x * x + y * y <= diameter * diameter)
    lane = tl.arange(0, LANES)[None, :]
    row_length = bins + BEFORE + AFTER
    sinogram += tl.program_id(1).to(tl.int64) * n_max * row_length * LANES
    total = tl.zeros((TILE * TILE, LANES), tl.float32)
    for view in range(views):
        record = table + view * VIEW
        whole, rest, weight = _position(record, q_0, r_0, (q - q_0).to(tl.float32), (r - r_0).to(tl.float32), FAN)
        lower = tl.floor(rest)
        k, f = whole + lower.to(tl.int32), rest - lower
        if SQUARED:
            weight *= weight
        hit = (k >= BEFORE - 1) & (k < bins + BEFORE)
        place = sinogram + (view * row_length + tl.where(hit, k, 0))[:, None] * LANES + lane
        total = tl.fma(tl.load(place).to(tl.float32), (weight * (1 - f))[:, None], total)
        total = tl.fma(tl.load(place + LANES).to(tl.float32), (weight * f)[:, None], total)
    b = tl.load(lanes + lane)
    place = image + b * (height * width) + (r * width + q)[:, None]
    exists = ((r < height) & (q < width))[:, None] & (b >= 0)
    tl.store(place, tl.where(seen[:, None], total * scale, 0.0), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def _smear_transpose(image, sinogram, blocks, height, width, first, used, bins, n_max, n_blocks, scale,
                     FAN: tl.constexpr, SQUARED: tl.constexpr, STEPS: tl.constexpr, BINS: tl.constexpr,
                     LANES: tl.constexpr):
    """Packed images -> sinograms (batch, n_max, bins): each bin reads the pixels whose position is less than 1 from it.

    Along the rows of the copy that its view reads: in a row those are at most `across` neighbours, from where the line
    of positions one bin away crosses the row.
    """
    table, views, lanes = _block(blocks, LANES)
    parts = tl.cdiv(bins, BINS)
    view, block = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) % parts * BINS + tl.arange(0, BINS)
    inside = (k >= first) & (k < tl.where(view < views, first + used, 0))
    record = table + tl.minimum(view, views - 1) * VIEW
    flip, across = tl.load(record) & 1, (tl.load(record) >> 1).to(tl.int32)
    n_q, n_r = tl.load(record + 2 + flip), tl.load(record + 3 - flip)
    d_q, d_r = tl.load(record + 5 + flip), tl.load(record + 6 - flip)
    rows, columns = tl.where(flip != 0, width, height), tl.where(flip != 0, height, width)
    row_length = columns + 2 * MARGIN
    size = ((height + 2 * MARGIN) * (width + 2 * MARGIN)).to(tl.int64)
    lane = tl.arange(0, LANES)
    image += (flip * n_blocks + block) * size * LANES
    bin = tl.where(inside, k - first + BEFORE, BEFORE).to(tl.int64)[None, :]
    slope = n_q - bin * d_q
    step_e, step_d = slope.to(tl.float32) * PIXEL, d_q.to(tl.float32) * PIXEL
    total = tl.zeros((STEPS, BINS, LANES), tl.float32)
    for top in range(0, tl.where(tl.max(inside.to(tl.int32)) > 0, rows, 0), STEPS):
        r = top + tl.arange(0, STEPS)[:, None]
        n, d = tl.load(record + 1) + n_r * r, tl.load(record + 4) + d_r * r
        error = n - bin * d
        edge = tl.minimum(-(error + d).to(tl.float32) / (slope + d_q).to(tl.float32),
                          -(error - d).to(tl.float32) / (slope - d_q).to(tl.float32))
        edge = tl.minimum(tl.maximum(edge, -2.0 - across), columns + 2.0)
        start = tl.where(across >= columns, 0, tl.floor(edge - 0.001).to(tl.int32) + 1)
        error = (error + slope * start).to(tl.float32) * PIXEL
        depth = (d + d_q * start).to(tl.float32) * PIXEL
        for c in range(0, across):
            q = start + c
            okay = inside[None, :] & (r < rows) & (q >= 0) & (q < columns)
            distance = error + step_e * (c * 1.0)
            if FAN:
                weight = 1 / tl.where(okay, depth + step_d * (c * 1.0), 1.0)
                near = tl.maximum(1 - tl.abs(distance * weight), 0.0) * weight
                if SQUARED:
                    near *= weight
            else:
                near = tl.maximum(1 - tl.abs(distance), 0.0)
            at = tl.where(okay, (r + MARGIN) * row_length + q + MARGIN, 0)[:, :, None] * LANES + lane[None, None, :]
            total = tl.fma(tl.load(image + at), tl.where(okay, near, 0.0)[:, :, None], total)
    b = tl.load(lanes + lane)[None, :]
    place = sinogram + (b * n_max + view) * bins + k[:, None]
    tl.store(place, tl.sum(total, axis=0) * scale, mask=(k < bins)[:, None] & (b >= 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("sinogram", "view_weights"))
def _filter(sinogram, matrix, rows_of, view_weights, each, target, batch, n_max, bins, width,
            WEIGHTED: tl.constexpr, PACKED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Rows (batch, n_max, bins) times matrix (bins, width) times their view's weight, packed or (batch, n_max, width).

    rows_of: (batch, 4) int64, of each image its views, block, lane and, as the bits of a float, the weight of its views
    where they are not WEIGHTED; then view_weights has a row of n_max for `each` images. Views that an image does not
    have are not read; unpacked they become zeros.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b, view = row // n_max, row % n_max
    entry = rows_of + b * 4
    exists = view < tl.load(entry, mask=b < batch, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, tl.where(tl.max(exists.to(tl.int32)) > 0, bins, 0), DEPTH):
        k = first + tl.arange(0, DEPTH)
        p = tl.load(sinogram + row[:, None].to(tl.int64) * bins + k[None, :],
                    mask=exists[:, None] & (k < bins)[None, :], other=0.0).to(tl.float32)
        taps = tl.load(matrix + k[:, None] * width + column[None, :],
                       mask=(k < bins)[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(p, taps, total, input_precision="ieee")
    if WEIGHTED:
        weight = tl.load(view_weights + b // each * n_max + view, mask=exists, other=0.0)
    else:
        weight = tl.load(entry + 3, mask=exists, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    total *= weight[:, None]
    if PACKED:
        block, lane = tl.load(entry + 1, mask=exists, other=0), tl.load(entry + 2, mask=exists, other=0)
        place = (block * n_max + view) * width * LANES + lane
        kept = exists
    else:
        place = row.to(tl.int64) * width
        kept = b < batch
    tl.store(target + place[:, None] + column[None, :] * LANES, total, mask=kept[:, None] & (column < width)[None, :])


_compiled = {}  # what _launch has compiled


def _launch(kernel, grid: tuple[int, int, int], arguments: tuple, constants: dict, num_warps: int = 4):
    """kernel[grid](*arguments, **constants). Constants in the order of the kernel's own.

    What a kernel is compiled for is decided by its constants and the types of its tensors alone (SIZES), so it is found
    by those, without Triton's look at every argument, which takes longer than the launch itself.
    """
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    key = (kernel.__name__, tensors[0].get_device(), *[a.dtype for a in tensors], *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **constants, num_warps=num_warps)  # None from the interpreter
    else:
        compiled[grid](*arguments, *constants.values())


def _pixel_table(geometry: Geometry, theta: np.ndarray, first: int) -> np.ndarray:
    """Coefficients (constant, per column, per row) of N, then of D, for every view, (views, 6) int64."""
    cos, sin = np.cos(theta), np.sin(theta)
    near = geometry.source_distance if geometry.fan else np.inf
    gain = _gain(geometry)
    centre = geometry.det_count / 2 - 0.5 - geometry.det_offset / geometry.det_spacing - first + BEFORE.value
    x, y = 0.5 - geometry.width / 2, 0.5 - geometry.height / 2
    across = np.stack([x * cos - y * sin, cos, -sin], axis=1)
    depth = np.stack([1 - (x * sin + y * cos) / near, -sin / near, -cos / near], axis=1)
    table = np.concatenate([gain * across + centre * depth, depth], axis=1)
    reach = gain * np.hypot(x, y) / (1 - np.hypot(x, y) / near) + abs(centre)
    if reach >= 2**15:
        raise ValueError(f"the image spans {2 * reach:.0f} bins of the detector; the CUDA kernels take less than 65536 "
                         "(choose a larger det_spacing)")
    return np.rint(table * 2.0**PIXEL_BITS.value).astype(np.int64)


def _gain(geometry: Geometry) -> float:
    """Bins a pixel at the centre of rotation."""
    return (1 + geometry.det_distance / (geometry.source_distance or np.inf)) / geometry.det_spacing


def _windows(geometry: Geometry, theta: np.ndarray, used: int) -> tuple[np.ndarray, np.ndarray]:
    """How far the transposes have to look, (views,) each: bins to either side of a pixel's position, float32, within
    which every ray lies that comes less than a pixel near it along both axes; and pixels of a row that read one bin.

    At depth t towards the source, on a ray that the fan turns by g, a pixel spans gain S/(cos g (S - t)) bins across
    the rays, and its square |cos| + |sin| of the ray's angle times as many.
    """
    half = np.hypot(geometry.height, geometry.width) / 2 + 2
    toward = np.abs(np.sin(theta)) * (geometry.width / 2 + 1) + np.abs(np.cos(theta)) * (geometry.height / 2 + 1)
    to_axis = np.abs((theta + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    fan, densest, sparsest = 0.0, 1.0, 1.0
    if geometry.fan:
        near = geometry.source_distance
        fan = np.arcsin(min(half / near, 1.0))
        densest = near / np.maximum((near - toward) * np.cos(fan), 1e-3)
        sparsest = near / (near + 1.1 * half)
    reach = np.sqrt(2) * np.cos(np.maximum(np.pi / 4 - to_axis - fan, 0)) * _gain(geometry) * densest
    reach = np.minimum(reach + 0.01, used)  # then every ray is looked at
    turned = to_axis + fan
    pixels = np.floor(2.1 / (_gain(geometry) * sparsest * np.maximum(np.cos(turned), 1e-3))) + 2
    size = max(geometry.height, geometry.width)
    return reach.astype(np.float32), np.where((turned > 1.3) | (pixels > size), size, pixels).astype(np.int64)


def _scan_table(geometry: Geometry, device: torch.device) -> torch.Tensor:
    """All that the kernels know of a scan, int64: VIEW words a view, then (views, 4, used bins) of rays.

    A view: 1 where it reads the transposed copy, plus twice the pixels of `_windows`; `_pixel_table`; how many rays
    come near a pixel and their reach. A ray: x, y of its first sample in the padded copy, both steps, count and length.
    """
    first, stop = used_bins(geometry)
    theta, used = np.asarray(geometry.angles, np.float64), stop - first
    rays = ray_samples(geometry, theta, geometry.bins[first:stop])
    along_rows = np.abs(np.sin(theta)) > np.abs(np.cos(theta))
    place, step = (np.stack([rays[a], rays[b]], axis=1) for a, b in (("x", "y"), ("dx", "dy")))
    place, step = (np.where(along_rows[:, None, None], p[:, ::-1], p) for p in (place + PAD, step))
    table = np.empty((len(theta), 4, used), np.int64)
    table[:, :2] = np.rint(place * 2.0**RAY_BITS.value)
    step = np.rint(step * 2.0**STEP_BITS.value).astype(np.int64)
    table[:, 2] = (step[:, 0] << 32) | (step[:, 1] & 0xFFFFFFFF)
    table[:, 3] = (rays["count"].astype(np.int64) << 32) | rays["h"].view(np.int32)
    reach, pixels = _windows(geometry, theta, used)
    views = np.empty((len(theta), VIEW.value), np.int64)
    views[:, 0] = along_rows + 2 * pixels
    views[:, 1:7] = _pixel_table(geometry, theta, first)
    views[:, 7] = (np.minimum(np.floor(2 * reach).astype(np.int64) + 1, used) << 32) | reach.view(np.int32)
    return torch.from_numpy(np.concatenate([views.ravel(), table.ravel()])).to(device)


class _Tables:
    """The scans' tables on one device, and the blocks made of them.

    Beyond TABLE_BYTES the tables go that were put into blocks longest ago, and all blocks, which hold their addresses.
    """

    def __init__(self, device: torch.device):
        self.device, self.tables, self.bytes, self.blocks = device, OrderedDict(), 0, OrderedDict()

    def scan(self, geometry: Geometry, keep) -> torch.Tensor:
        table = self.tables.get(geometry.key)
        if table is None:
            table = self.tables[geometry.key] = _scan_table(geometry, self.device)
            self.bytes += table.nbytes
            self._shrink(keep)
        else:
            self.tables.move_to_end(geometry.key)
        return table

    def _shrink(self, keep):
        old = [key for key in self.tables if key not in keep] if self.bytes > TABLE_BYTES else []
        if old and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # another stream may still read what is dropped
        for key in old:
            if self.bytes <= TABLE_BYTES:
                break
            self.bytes -= self.tables.pop(key).nbytes
            self.blocks.clear()


@dataclass(frozen=True, eq=False)
class _Blocks:
    """How a batch is spread over blocks, and what all its scans share."""

    scan: Geometry         # without its angles
    first: int             # the used bins are first .. first + used of the detector
    used: int
    diameter: int          # pixels further out than half of it get nothing
    scale: float           # of the backprojection
    lanes: int
    count: int             # blocks
    rows: torch.Tensor     # (count, ENTRY + lanes) int64: address of the scan's table, views, images or -1
    images: torch.Tensor   # (batch, 4) int64: views, block, lane and pi/(2 views) as the bits of a float
    n_max: int
    tables: list           # what `rows` points to


def _spread(scans: tuple[Geometry, ...], batch: int, most: int) -> tuple[int, list[tuple[int, list[int]]]]:
    """Lanes, and blocks of (scan, images): images of one scan side by side; those of most views first.

    Lanes that stay empty cost what full ones do. A block costs its lanes and, for its coordinates, about two more.
    """
    groups, each = {}, batch // len(scans)
    for i, scan in enumerate(scans):
        groups.setdefault(scan.key, (i, []))[1].extend(range(i * each, (i + 1) * each))

    def blocks(lanes):
        return sum(-(-len(images) // lanes) for _, images in groups.values())

    lanes = min((1 << i for i in range(most.bit_length())), key=lambda n: (blocks(n) * (n + 2), -n))
    spread = [(i, images[j:j + lanes]) for i, images in groups.values() for j in range(0, len(images), lanes)]
    return lanes, sorted(spread, key=lambda block: -scans[block[0]].n_angles)


def _make_blocks(geometry: Geometry | Stacked, batch: int, most: int, tables: _Tables) -> _Blocks:
    scans, device = geometry.scans, tables.device
    lanes, spread = _spread(scans, batch, most)
    different = {scan.key: scan for scan in scans}
    on_device = {key: tables.scan(scan, different) for key, scan in different.items()}
    rows, images = np.full((len(spread), ENTRY.value + lanes), -1, np.int64), np.empty((batch, 4), np.int64)
    for block, (i, members) in enumerate(spread):
        views, table = scans[i].n_angles, on_device[scans[i].key]
        rows[block, :2] = table.data_ptr(), views
        rows[block, 2:2 + len(members)] = members
        images[members, :2], images[members, 2] = (views, block), range(len(members))
        images[members, 3] = np.float32(math.pi / 2 / views).view(np.int32)
    scan = scans[0].without_angles
    first, stop = used_bins(scan)
    diameter = scan.det_count if scan.clip_to_circle else scan.height + scan.width
    # From pageable memory, and at once in the order of this stream: nobody waits.
    rows, images = (torch.from_numpy(a).to(device, non_blocking=True) for a in (rows, images))
    return _Blocks(scan, first, stop - first, diameter, _gain(scan), lanes, len(spread), rows, images,
                   geometry.n_angles, list(on_device.values()))


BLOCKS_KEPT = 1024       # of a few kilobytes
_devices = {}            # device -> _Tables
_captured = set()        # what graphs replay with: the caches may forget it, its memory must not be freed


def _blocks(geometry: Geometry | Stacked, batch: int, most: int, device: torch.device) -> _Blocks:
    """The blocks of a batch, of at most `most` lanes each, a power of two.

    A stream has its own, copied to the device in its order.
    """
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    tables = _devices.get(device)
    if tables is None:
        tables = _devices[device] = _Tables(device)
    key = geometry.key, batch, most, stream
    blocks = tables.blocks.get(key)
    if blocks is None and capturing:
        key = next((k for k in tables.blocks if k[:3] == key[:3]), key)  # of the stream that warmed up: long finished
        blocks = tables.blocks.get(key)
        if blocks is None:
            raise RuntimeError("this scan's tables are not on the GPU; apply the operator to a batch of this size once "
                               "before capturing a graph")
    if blocks is None:
        blocks = _make_blocks(geometry, batch, most, tables)
        tables.blocks[key] = blocks
        if len(tables.blocks) > BLOCKS_KEPT:
            tables.blocks.popitem(last=False)
    if capturing:
        _captured.add(blocks)
    return blocks


@lru_cache(maxsize=32)
def _matrix(scan: Geometry, name: str, first: int, stop: int, front: int, back: int, transposed: bool,
            device: torch.device) -> torch.Tensor:
    """The filter with the detector weights, its rows the bins it reads, between the zero bins it writes."""
    matrix = filter_matrix(scan.det_count, name, first, stop) * detector_weight(scan)[first:stop, None]
    matrix = np.pad(matrix.T if transposed else matrix, ((0, 0), (front, back)))
    return torch.from_numpy(np.ascontiguousarray(matrix, np.float32)).to(device)


def _filter_matrix(*key) -> torch.Tensor:
    matrix = _matrix(*key)
    if key[-1].type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.add(matrix)
    return matrix


_here = nullcontext()


def _on(device: torch.device):
    """The device as the current one: launches go to the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _here
    return torch.cuda.device(device)


def _launch_pack(blocks: _Blocks, source: torch.Tensor, target: torch.Tensor, rows: int, columns: int, first: int,
                 diameter: int, pads: tuple[int, int, int], sinogram: bool, turned: bool):
    row_pad, front, back = pads
    size = (rows + 2 * row_pad) * (columns + front + back)
    _launch(_pack, (-(-size // CELLS), blocks.count, 1),
            (source, target, blocks.rows, rows, columns, *source.shape[1:], first, diameter, blocks.count),
            {"ROW_PAD": row_pad, "FRONT": front, "BACK": back, "SINOGRAM": sinogram, "TURNED": turned, "CELLS": CELLS,
             "LANES": blocks.lanes})


def _pack_image(blocks: _Blocks, image: torch.Tensor, diameter: int) -> torch.Tensor:
    """Both padded copies of images (B, H, W), in one launch; zero further than diameter/2 pixels from the centre."""
    height, width = image.shape[1:]
    packed = image.new_empty(2 * blocks.count * (height + 2 * PAD) * (width + 2 * PAD) * blocks.lanes)
    _launch_pack(blocks, image, packed, height, width, 0, diameter, (PAD, PAD, PAD), False, True)
    return packed


def _pack_sinogram(blocks: _Blocks, sinogram: torch.Tensor, front: int, back: int, dtype: torch.dtype) -> torch.Tensor:
    """The used bins of sinograms (B, n_max, bins), in one launch."""
    packed = sinogram.new_empty(blocks.count * blocks.n_max * (blocks.used + front + back) * blocks.lanes, dtype=dtype)
    _launch_pack(blocks, sinogram, packed, blocks.n_max, blocks.used, blocks.first, 0, (0, front, back), True, False)
    return packed


def _launch_project(blocks: _Blocks, packed: torch.Tensor, sinogram: torch.Tensor, first: int):
    scan, bins = blocks.scan, sinogram.shape[-1]
    few = blocks.count * blocks.n_max < 256 or blocks.lanes < 4  # little work: more warps a ray, each with fewer steps
    _launch(_project, (-(-bins // BINS) * blocks.n_max, blocks.count, 1),
            (packed, sinogram, blocks.rows, scan.height, scan.width, first, blocks.used, bins, blocks.n_max,
             blocks.count),
            {"STEPS": 2 * STEPS if few else STEPS, "BINS": BINS, "LANES": blocks.lanes}, 8 if few else 4)


def _launch_smear(blocks: _Blocks, packed: torch.Tensor, image: torch.Tensor):
    scan = blocks.scan
    _launch(_smear, (-(-scan.height // TILE) * -(-scan.width // TILE), blocks.count, 1),
            (packed, image, blocks.rows, scan.height, scan.width, blocks.used, blocks.n_max, blocks.diameter,
             blocks.scale),
            {"FAN": scan.fan, "SQUARED": scan.fan and scan.weights == "fdk", "TILE": TILE, "LANES": blocks.lanes}, 2)


def _launch_filter(blocks: _Blocks, sinogram: torch.Tensor, matrix: torch.Tensor, view_weights: torch.Tensor | None,
                   target: torch.Tensor, packed: bool):
    batch, n_max, bins = sinogram.shape
    width, weighted = matrix.shape[1], view_weights is not None
    each = batch // len(view_weights) if weighted and view_weights.ndim == 2 else batch
    _launch(_filter, (-(-batch * n_max // ROWS), -(-width // COLUMNS), 1),
            (sinogram, matrix, blocks.images, view_weights if weighted else matrix, each, target, batch, n_max, bins,
             width),
            {"WEIGHTED": weighted, "PACKED": packed, "LANES": blocks.lanes if packed else 1, "ROWS": ROWS,
             "COLUMNS": COLUMNS, "DEPTH": DEPTH}, 8)


def _sixteen_bytes(tensor: torch.Tensor) -> int:
    return 16 // tensor.element_size()


def forward(geometry: Geometry | Stacked, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 or float16 -> (B, views, bins) float32."""
    with _on(image.device):
        blocks = _blocks(geometry, len(image), _sixteen_bytes(image), image.device)
        packed = _pack_image(blocks, image, image.shape[1] + image.shape[2])
        sinogram = image.new_empty((len(image), blocks.n_max, blocks.scan.det_count), dtype=torch.float32)
        _launch_project(blocks, packed, sinogram, blocks.first)
    return sinogram


def forward_transpose(geometry: Geometry | Stacked, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 or float16 -> (B, H, W) float32: the transpose of `forward`."""
    batch = len(sinogram)
    with _on(sinogram.device):
        blocks = _blocks(geometry, batch, 8, sinogram.device)
        packed = _pack_sinogram(blocks, sinogram, 0, 0, torch.float32)
        scan, groups = blocks.scan, max(blocks.lanes // 4, 1)
        # Enough programs to fill a GPU, and loops short enough to end together: a few blocks share their views out.
        chunks = max(1, min(8, 16 // blocks.count, blocks.n_max // 16))
        image = sinogram.new_empty((chunks, batch, scan.height, scan.width), dtype=torch.float32)
        tiles = -(-scan.height // SMALL_TILE) * -(-scan.width // SMALL_TILE)
        _launch(_project_transpose, (tiles, blocks.count, chunks),
                (packed, image, blocks.rows, scan.height, scan.width, blocks.used, blocks.n_max, batch, chunks),
                {"FAN": scan.fan, "TILE": SMALL_TILE, "LANES": blocks.lanes // groups, "GROUPS": groups}, 1)
        return image[0] if chunks == 1 else image.sum(0)


def backproject(geometry: Geometry | Stacked, sinogram: torch.Tensor) -> torch.Tensor:
    """(B, views, bins) float32 or float16 -> (B, H, W) float32."""
    with _on(sinogram.device):
        blocks = _blocks(geometry, len(sinogram), _sixteen_bytes(sinogram), sinogram.device)
        packed = _pack_sinogram(blocks, sinogram, BEFORE.value, AFTER.value, sinogram.dtype)
        image = sinogram.new_empty((len(sinogram), blocks.scan.height, blocks.scan.width), dtype=torch.float32)
        _launch_smear(blocks, packed, image)
    return image


def backproject_transpose(geometry: Geometry | Stacked, image: torch.Tensor) -> torch.Tensor:
    """(B, H, W) float32 or float16 -> (B, views, bins) float32: the transpose of `backproject`."""
    with _on(image.device):
        image = image.float()
        blocks = _blocks(geometry, len(image), 4, image.device)
        scan = blocks.scan
        packed = _pack_image(blocks, image, blocks.diameter)
        sinogram = image.new_empty((len(image), blocks.n_max, scan.det_count), dtype=torch.float32)
        _launch(_smear_transpose, (-(-scan.det_count // BINS) * blocks.n_max, blocks.count, 1),
                (packed, sinogram, blocks.rows, scan.height, scan.width, blocks.first, blocks.used, scan.det_count,
                 blocks.n_max, blocks.count, blocks.scale),
                {"FAN": scan.fan, "SQUARED": scan.fan and scan.weights == "fdk", "STEPS": STEPS, "BINS": BINS,
                 "LANES": blocks.lanes})
    return sinogram


def filter_rows(geometry: Geometry | Stacked, sinogram: torch.Tensor, name: str, transposed: bool) -> torch.Tensor:
    """(B, views, bins) float32 or float16 -> the same, float32: filtered and weighted by pi/(2 views).

    A matrix product in one launch; wider detectors than LARGEST_MATRIX by FFT.
    """
    with _on(sinogram.device):
        batch, bins = len(sinogram), sinogram.shape[-1]
        if bins > LARGEST_MATRIX:
            return backend_torch.by_scan(backend_torch.filter_rows, geometry, sinogram, name, transposed)
        blocks = _blocks(geometry, batch, 4, sinogram.device)
        matrix = _filter_matrix(blocks.scan, name, 0, bins, 0, 0, transposed, sinogram.device)
        filtered = sinogram.new_empty(sinogram.shape, dtype=torch.float32)
        _launch_filter(blocks, sinogram, matrix, None, filtered, False)
    return filtered


def fbp(geometry: Geometry | Stacked, image: torch.Tensor, view_weights: torch.Tensor | None,
        name: str) -> torch.Tensor:
    """Backprojection of the filtered projection of (B, H, W) float32 or float16, in four launches, float32.

    view_weights: (views,) float32, or of a stack (scans, views), the factor of each view; pi/(2 views) if None. With
    float16 the filtered sinogram is stored as float16 too; the one before the filter never is.
    """
    batch = len(image)
    with _on(image.device):
        blocks = _blocks(geometry, batch, _sixteen_bytes(image), image.device)
        matrix = _filter_matrix(blocks.scan, name, blocks.first, blocks.first + blocks.used, BEFORE.value, AFTER.value,
                                False, image.device)
        packed = _pack_image(blocks, image, image.shape[1] + image.shape[2])
        sinogram = image.new_empty((batch, blocks.n_max, blocks.used), dtype=torch.float32)
        _launch_project(blocks, packed, sinogram, 0)
        filtered = image.new_empty(blocks.count * blocks.n_max * matrix.shape[1] * blocks.lanes)
        _launch_filter(blocks, sinogram, matrix, view_weights, filtered, True)
        result = image.new_empty(image.shape, dtype=torch.float32)
        _launch_smear(blocks, filtered, result)
    return result
