"""Group norm with SiLU, and a residual sum, as one pass each over channels-last images on a GPU (Triton).

PyTorch's group norm on CUDA returns channels-first and runs in float32 under autocast, SiLU too: about 32 bytes an
element with the copies back, where the kernels below read twice and write once, 6 bytes in bf16. Statistics are float32
whatever the images are. Nothing is added with atomics, so the same input gives the same bits.

An image is (pixels, C) in memory. It is cut into tiles of a few pixels and channels, one a program, so that one slice
fills a GPU too. A norm takes three launches, forward and backward alike: sums over each tile, what the tiles of a group
give together, and the result.
"""

import torch
import triton
import triton.language as tl

GROUPS = 32
TILE = 4096  # elements of a program, 16 a thread
WARPS = 8
ROWS = 256   # tiles whose sums a program of `_merge` reads at once


@triton.jit
def _tile(pixels, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program: offset of its slice, offsets within it, which exist, slice times C plus channels, channels."""
    b = tl.program_id(2)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return b.to(tl.int64) * pixels * C, p[:, None] * C + c[None, :], (p < pixels)[:, None], b * C + c, c


@triton.jit
def _load(source, at, exists):
    return tl.load(source + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _normal(x, shift, mean, rstd, weight, bias, bc, c, C: tl.constexpr, GROUPS: tl.constexpr, SHIFTED: tl.constexpr):
    """((x + shift - mean) rstd, that times weight plus bias, rstd and weight a channel) of a tile of values."""
    group = bc // (C // GROUPS)  # of all slices' groups: C is a multiple of GROUPS
    centre, r, w = -tl.load(mean + group), tl.load(rstd + group), tl.load(weight + c).to(tl.float32)
    if SHIFTED:
        centre += tl.load(shift + bc).to(tl.float32)
    normal = (x + centre[None, :]) * r[None, :]
    return normal, normal * w[None, :] + tl.load(bias + c).to(tl.float32)[None, :], r, w


@triton.jit
def _moments(x, means, squares, pixels, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of each tile and channel: the mean, and the sum of squares about it. (B, tiles, C) float32 each."""
    start, at, exists, _, c = _tile(pixels, C, PIXELS, CHANNELS)
    value = _load(x + start, at, exists)
    count = tl.minimum(pixels - tl.program_id(0) * PIXELS, PIXELS)
    mean = tl.sum(value, 0) / count
    distance = tl.where(exists, value - mean[None, :], 0.0)
    place = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * C + c
    tl.store(means + place, mean)
    tl.store(squares + place, tl.sum(distance * distance, 0))


@triton.jit
def _merge(means, squares, shift, mean, rstd, pixels, tiles, eps, C: tl.constexpr, GROUPS: tl.constexpr,
           WIDTH: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr):
    """Mean and 1/deviation of a group, (B, GROUPS), from its tiles' moments: mean first, then squares about it."""
    g, b = tl.program_id(0), tl.program_id(1)
    K: tl.constexpr = C // GROUPS
    k = tl.arange(0, WIDTH)[None, :]
    moved = tl.zeros((1, WIDTH), tl.float32)
    if SHIFTED:
        moved = _load(shift, b * C + g * K + k, k < K)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, tiles, ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        exists, at = (i < tiles) & (k < K), (b * tiles + i) * C + g * K + k
        count = tl.minimum(pixels - i * PIXELS, PIXELS).to(tl.float32)
        total += tl.where(exists, count * (_load(means, at, exists) + moved), 0.0)
    centre = tl.sum(tl.sum(total, 1), 0) / (pixels * K)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, tiles, ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        exists, at = (i < tiles) & (k < K), (b * tiles + i) * C + g * K + k
        count = tl.minimum(pixels - i * PIXELS, PIXELS).to(tl.float32)
        distance = _load(means, at, exists) + moved - centre
        total += tl.where(exists, _load(squares, at, exists) + count * distance * distance, 0.0)
    tl.store(mean + b * GROUPS + g, centre)
    tl.store(rstd + b * GROUPS + g, 1.0 / tl.sqrt(tl.sum(tl.sum(total, 1), 0) / (pixels * K) + eps))


@triton.jit
def _normalise(x, y, shift, mean, rstd, weight, bias, pixels, C: tl.constexpr, GROUPS: tl.constexpr,
               PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr):
    """The result, once the groups' statistics are known."""
    start, at, exists, bc, c = _tile(pixels, C, PIXELS, CHANNELS)
    value = _load(x + start, at, exists)
    _, z, _, _ = _normal(value, shift, mean, rstd, weight, bias, bc, c, C, GROUPS, SHIFTED)
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y + start + at, z.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _through_silu(gradient, z, SILU: tl.constexpr):
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        gradient = gradient * (s * (1.0 + z * (1.0 - s)))
    return gradient


@triton.jit
def _moments_back(x, dy, sums, shift, mean, rstd, weight, bias, pixels, C: tl.constexpr, GROUPS: tl.constexpr,
                  PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr):
    """Of each tile and channel: sums of dz, of dz times the normalised value n, and of n. (B, tiles, 3, C) float32."""
    start, at, exists, bc, c = _tile(pixels, C, PIXELS, CHANNELS)
    value, gradient = _load(x + start, at, exists), _load(dy + start, at, exists)
    n, z, _, _ = _normal(value, shift, mean, rstd, weight, bias, bc, c, C, GROUPS, SHIFTED)
    dz = _through_silu(gradient, z, SILU)
    place = sums + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * 3 * C + c
    tl.store(place, tl.sum(dz, 0))
    tl.store(place + C, tl.sum(dz * n, 0))
    if SHIFTED:
        tl.store(place + 2 * C, tl.sum(tl.where(exists, n, 0.0), 0))


@triton.jit
def _merge_back(sums, totals, averages, dshift, rstd, weight, pixels, tiles, C: tl.constexpr, GROUPS: tl.constexpr,
                WIDTH: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr):
    """Of a slice: sums of dz and dz n a channel, (B, 2, C); averages of w dz and w dz n a group, (B, 2, GROUPS); and
    the gradient of the shift, (B, C), which is the sum of dx over the pixels."""
    g, b = tl.program_id(0), tl.program_id(1)
    K: tl.constexpr = C // GROUPS
    k = tl.arange(0, WIDTH)
    c, is_channel = g * K + k, k < K
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    total_n = tl.zeros((ROWS, WIDTH), tl.float32)
    total_1 = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, tiles, ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        exists, at = (i < tiles) & is_channel[None, :], (b * tiles + i) * 3 * C + c[None, :]
        total += _load(sums, at, exists)
        total_n += _load(sums + C, at, exists)
        if SHIFTED:
            total_1 += _load(sums + 2 * C, at, exists)
    dz, dz_n, n = tl.sum(total, 0), tl.sum(total_n, 0), tl.sum(total_1, 0)
    w = _load(weight, c, is_channel)
    average, average_n = tl.sum(w * dz, 0) / (pixels * K), tl.sum(w * dz_n, 0) / (pixels * K)
    tl.store(totals + b * 2 * C + c, dz, mask=is_channel)
    tl.store(totals + b * 2 * C + C + c, dz_n, mask=is_channel)
    tl.store(averages + b * 2 * GROUPS + g, average)
    tl.store(averages + b * 2 * GROUPS + GROUPS + g, average_n)
    if SHIFTED:
        dx = tl.load(rstd + b * GROUPS + g) * (w * dz - pixels * average - average_n * n)
        tl.store(dshift + b * C + c, dx, mask=is_channel)


@triton.jit
def _normalise_back(x, dy, dx, averages, shift, mean, rstd, weight, bias, pixels, C: tl.constexpr,
                    GROUPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SHIFTED: tl.constexpr,
                    SILU: tl.constexpr):
    """dx = rstd (w dz - average of w dz - n times average of w dz n), averages over the group."""
    start, at, exists, bc, c = _tile(pixels, C, PIXELS, CHANNELS)
    value, gradient = _load(x + start, at, exists), _load(dy + start, at, exists)
    n, z, r, w = _normal(value, shift, mean, rstd, weight, bias, bc, c, C, GROUPS, SHIFTED)
    dz = _through_silu(gradient, z, SILU)
    place = averages + tl.program_id(2) * 2 * GROUPS + c // (C // GROUPS)
    average, average_n = tl.load(place)[None, :], tl.load(place + GROUPS)[None, :]
    result = r[None, :] * (w[None, :] * dz - average - n * average_n)
    tl.store(dx + start + at, result.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def _add(x, h, y, bias, pixels, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """x + h + bias."""
    start, at, exists, _, c = _tile(pixels, C, PIXELS, CHANNELS)
    value = _load(x + start, at, exists) + _load(h + start, at, exists) + tl.load(bias + c).to(tl.float32)[None, :]
    tl.store(y + start + at, value.to(y.dtype.element_ty), mask=exists)


def _tiles(x: torch.Tensor) -> tuple[tuple[int, int, int], int, int, int, int]:
    """(grid, pixels, channels, and of a tile: pixels, channels) for images (B, C, H, W)."""
    batch, channels, height, width = x.shape
    wide = 64 if channels % 64 == 0 else 32  # a row of a tile is a cache line or half of one
    high = TILE // wide
    return (triton.cdiv(height * width, high), channels // wide, batch), height * width, channels, high, wide


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)  # itself where it is so already


@torch.library.custom_op("cvg_diff::group_norm", mutates_args=())
def _group_norm(x: torch.Tensor, shift: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float,
                silu: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(result, mean, 1/deviation): the last two (B, GROUPS) float32, for the backward pass."""
    x, y = _channels_last(x), _like(x)
    grid, pixels, channels, high, wide = _tiles(x)
    means, squares = (x.new_empty(len(x), grid[0], channels, dtype=torch.float32) for _ in range(2))
    mean, rstd = (x.new_empty(len(x), GROUPS, dtype=torch.float32) for _ in range(2))
    width, shifted = triton.next_power_of_2(channels // GROUPS), shift is not None
    with torch.cuda.device_of(x):
        _moments[grid](x, means, squares, pixels, channels, high, wide, num_warps=WARPS)
        _merge[GROUPS, len(x)](means, squares, shift, mean, rstd, pixels, grid[0], eps, channels, GROUPS, width, high,
                               ROWS, shifted)
        _normalise[grid](x, y, shift, mean, rstd, weight, bias, pixels, channels, GROUPS, high, wide, shifted, silu,
                         num_warps=WARPS)
    return y, mean, rstd


@_group_norm.register_fake
def _(x, shift, weight, bias, eps, silu):
    mean, rstd = (x.new_empty(x.shape[0], GROUPS, dtype=torch.float32) for _ in range(2))
    return _like(x), mean, rstd


@torch.library.custom_op("cvg_diff::group_norm_backward", mutates_args=())
def _group_norm_backward(dy: torch.Tensor, x: torch.Tensor, shift: torch.Tensor | None, weight: torch.Tensor,
                         bias: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, silu: bool
                         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the shift ((B, C), or empty where there is none), and of weight and bias, (2, C)."""
    x, dy, dx = _channels_last(x), _channels_last(dy), _like(x)
    grid, pixels, channels, high, wide = _tiles(x)
    sums = x.new_empty(len(x), grid[0], 3, channels, dtype=torch.float32)
    totals = x.new_empty(len(x), 2, channels, dtype=torch.float32)
    averages = x.new_empty(len(x), 2, GROUPS, dtype=torch.float32)
    width, shifted = triton.next_power_of_2(channels // GROUPS), shift is not None
    dshift = x.new_empty(len(x) if shifted else 0, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _moments_back[grid](x, dy, sums, shift, mean, rstd, weight, bias, pixels, channels, GROUPS, high, wide, shifted,
                            silu, num_warps=WARPS)
        _merge_back[GROUPS, len(x)](sums, totals, averages, dshift, rstd, weight, pixels, grid[0], channels, GROUPS,
                                    width, ROWS, shifted)
        _normalise_back[grid](x, dy, dx, averages, shift, mean, rstd, weight, bias, pixels, channels, GROUPS, high,
                              wide, shifted, silu, num_warps=WARPS)
    return dx, dshift, totals.sum(0)


@_group_norm_backward.register_fake
def _(dy, x, shift, weight, bias, mean, rstd, silu):
    batch, channels = x.shape[:2]
    dshift = x.new_empty(0 if shift is None else batch, channels, dtype=torch.float32)
    return _like(x), dshift, x.new_empty(2, channels, dtype=torch.float32)


def _remember(ctx, inputs, output):
    x, shift, weight, bias, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)  # nothing flows into mean and deviation: no zeros for them
    ctx.save_for_backward(x, shift, weight, bias, *output[1:])


def _backward(ctx, dy, *_):
    x, shift, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dshift, (dbias, dweight) = _group_norm_backward(dy, x, shift, weight, bias, mean, rstd, ctx.silu)
    dshift = None if shift is None else dshift.to(shift.dtype)
    return dx, dshift, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


_group_norm.register_autograd(_backward, setup_context=_remember)


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, silu: bool = False,
               shift: torch.Tensor | None = None) -> torch.Tensor:
    """Group norm of x + shift in 32 groups, then SiLU if `silu`.

    x: (B, C, H, W), float32, bfloat16 or float16, best channels-last; the result is channels-last in x's dtype. C is a
    multiple of 32. weight, bias: (C,). shift: (B, C), constant over a slice's pixels. Statistics are float32.
    """
    return _group_norm(x, None if shift is None else shift.contiguous(), weight, bias, eps, silu)[0]


@torch.library.custom_op("cvg_diff::add", mutates_args=())
def _sum(x: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x, h, y = _channels_last(x), _channels_last(h), _like(x)
    grid, pixels, channels, high, wide = _tiles(x)
    with torch.cuda.device_of(x):
        _add[grid](x, h, y, bias, pixels, channels, high, wide, num_warps=WARPS)
    return y


@_sum.register_fake
def _(x, h, bias):
    return _like(x)


def _remember_types(ctx, inputs, output):
    _, h, bias = inputs
    ctx.h, ctx.bias = h.dtype, bias.dtype


def _shared(ctx, dy):
    dy = _channels_last(dy)  # a part of a concatenation is not, and more than one convolution wants it so
    return dy, dy.to(ctx.h), dy.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias)


_sum.register_autograd(_shared, setup_context=_remember_types)


def add(x: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + h + bias for x, h (B, C, H, W) and bias (C,), in x's dtype, channels-last; C is a multiple of 32."""
    return _sum(x, h, bias)
