"""What an iteration of conjugate gradients does besides its two projections, in four launches that no host waits for.

Tensors are contiguous float32 and hold one sample behind the other. `state` is (2, samples) float32: the squared norm
of each sample's gradient, and 1 where it goes on, 0 where it has stopped and stays as it is. Sums are float64, in
pieces: `dot` leaves (samples, pieces) to whoever needs the sum, who adds the pieces up, always in the same order.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .backend_cuda import _launch, _on
from .operators import _values_only

BLOCK, PIECE = 1024, 4096  # values of a program that updates, and of one that sums
SIZES = ("n", "n_x", "n_r", "pieces", "target_pieces")
TENSORS = ("a", "b", "weights", "x", "r", "p", "q", "s")  # an operator's results may lie anywhere


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def _dot(a, b, weights, out, n, scale, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    a, b, weights = a + sample * n, b + sample * n, weights + sample * n
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, PIECE, BLOCK):
        i = tl.program_id(0) * PIECE + first + tl.arange(0, BLOCK)
        value = tl.load(a + i, mask=i < n, other=0.0).to(tl.float64) * tl.load(b + i, mask=i < n, other=0.0)
        if WEIGHTED:
            value *= tl.load(weights + i, mask=i < n, other=0.0)
        total += value
    tl.store(out + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(total) * scale)


@triton.jit
def _sum(parts, pieces, MOST: tl.constexpr):
    """The sum of a sample's pieces, rounded to float32."""
    i = tl.arange(0, MOST)
    parts += tl.program_id(1).to(tl.int64) * pieces
    return tl.sum(tl.load(parts + i, mask=i < pieces, other=0.0)).to(tl.float32)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def _advance(x, r, p, q, curvature, state, n_x, n_r, pieces, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """x += alpha p, r -= alpha q, alpha = |gradient|^2/curvature; NaN where there is no curvature."""
    sample = tl.program_id(1).to(tl.int64)
    bend, square = _sum(curvature, pieces, MOST), tl.load(state + sample)
    active = tl.load(state + tl.num_programs(1) + sample)
    alpha = tl.where(active > 0, tl.where(bend > 0, square / bend, float("nan")), 0.0)
    parts = tl.cdiv(n_x, BLOCK)
    part = tl.program_id(0)
    if part < parts:
        i = part * BLOCK + tl.arange(0, BLOCK)
        at = sample * n_x + i
        step = alpha * tl.load(p + at, mask=i < n_x, other=0.0)
        tl.store(x + at, tl.load(x + at, mask=i < n_x, other=0.0) + step, mask=i < n_x)
    else:
        i = (part - parts) * BLOCK + tl.arange(0, BLOCK)
        at = sample * n_r + i
        step = alpha * tl.load(q + at, mask=i < n_r, other=0.0)
        tl.store(r + at, tl.load(r + at, mask=i < n_r, other=0.0) - step, mask=i < n_r)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def _turn(p, s, squares, misfits, limit, target, state, new_state, n, pieces, target_pieces, MOST: tl.constexpr,
          TARGET: tl.constexpr, TARGET_MOST: tl.constexpr, BLOCK: tl.constexpr):
    """p = s + beta p, and the new state: who goes on, with which gradient."""
    sample = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    square, previous = _sum(squares, pieces, MOST), tl.load(state + sample)
    active = tl.where(square > tl.load(limit + sample), tl.load(state + batch + sample), 0.0)
    if TARGET:
        active = tl.where(_sum(misfits, target_pieces, TARGET_MOST) > tl.load(target + sample), active, 0.0)
    beta = tl.where(active > 0, square / tl.where(active > 0, previous, 1.0), 0.0)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = sample * n + i
    new = tl.load(s + at, mask=i < n, other=0.0) + beta * tl.load(p + at, mask=i < n, other=0.0)
    tl.store(p + at, new, mask=i < n)
    if tl.program_id(0) == 0:
        tl.store(new_state + sample, square)
        tl.store(new_state + batch + sample, active)


def _launch_dot(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor | None, scale: float,
                samples: int) -> torch.Tensor:
    n = a.numel() // samples
    pieces = -(-n // PIECE)
    out = a.new_empty((samples, pieces), dtype=torch.float64)
    _launch(_dot, (pieces, samples, 1), (a, b, a if weights is None else weights, out, n, scale),
            {"WEIGHTED": weights is not None, "BLOCK": BLOCK, "PIECE": PIECE})
    return out


def _launch_advance(x: torch.Tensor, r: torch.Tensor, p: torch.Tensor, q: torch.Tensor, curvature: torch.Tensor,
                    state: torch.Tensor) -> None:
    samples, pieces = curvature.shape
    n_x, n_r = x.numel() // samples, r.numel() // samples
    _launch(_advance, (-(-n_x // BLOCK) + -(-n_r // BLOCK), samples, 1),
            (x, r, p, q, curvature, state, n_x, n_r, pieces), {"MOST": triton.next_power_of_2(pieces), "BLOCK": BLOCK})


def _launch_turn(p: torch.Tensor, s: torch.Tensor, squares: torch.Tensor, misfits: torch.Tensor | None,
                 limit: torch.Tensor, target: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    new, (samples, pieces) = torch.empty_like(state), squares.shape
    n, given = p.numel() // samples, squares if misfits is None else misfits
    _launch(_turn, (-(-n // BLOCK), samples, 1),
            (p, s, squares, given, limit, limit if target is None else target, state, new, n, pieces, given.shape[1]),
            {"MOST": triton.next_power_of_2(pieces), "TARGET": misfits is not None,
             "TARGET_MOST": triton.next_power_of_2(given.shape[1]), "BLOCK": BLOCK})
    return new


# The same as operators, for whoever traces them.
_dot_op = torch.library.custom_op("torch_radon::dot", _launch_dot, mutates_args=())
_advance_op = torch.library.custom_op("torch_radon::advance", _launch_advance, mutates_args=("x", "r"))
_turn_op = torch.library.custom_op("torch_radon::turn", _launch_turn, mutates_args=("p",))


@_dot_op.register_fake
def _(a, b, weights, scale, samples):
    return a.new_empty((samples, -(-(a.numel() // samples) // PIECE)), dtype=torch.float64)


@_advance_op.register_fake
def _(x, r, p, q, curvature, state):
    return None


@_turn_op.register_fake
def _(p, s, squares, misfits, limit, target, state):
    return torch.empty_like(state)


def iterate(forward, gradient, x, r, s, ss, active, limit, max_iter: int, stopped, *, symmetric=False, weights=None,
            pull: float = 0.0, target=None, target_weights=None, report=None) -> list:
    """At most max_iter iterations, which change x, its residual r and gradient s; what report() returned.

    gradient(): the next s. The curvature along p is sum weights (A p)^2 + pull sum p^2 or, for a symmetric A,
    sum p A p. ss, active, limit, target: one a sample. stopped(f): whether f(), who goes on, is known to be all zeros.
    """
    direct, samples, values = _values_only(x), active.numel(), []
    dot, advance, turn = (_launch_dot, _launch_advance, _launch_turn) if direct else (_dot_op, _advance_op, _turn_op)
    p, state, limit = s.clone(), torch.stack([ss.flatten(), active.flatten().to(ss.dtype)]), limit.flatten()
    with _on(x.device) if direct else nullcontext():
        for _ in range(max_iter):
            if stopped(lambda state=state: state.select(0, 1)):
                break
            q = forward(p).contiguous()
            bend = dot(p, q, None, 1.0, samples) if symmetric else dot(q, q, weights, 1.0, samples)
            if pull:
                bend = torch.cat([bend, dot(p, p, None, pull, samples)], 1)
            advance(x, r, p, q, bend, state)
            s = gradient().contiguous()
            misfits = None if target is None else dot(r, r, target_weights, 1.0, samples)
            state = turn(p, s, dot(s, s, None, 1.0, samples), misfits, limit, target, state)
            if report is not None:
                values.append(report())
    return values
