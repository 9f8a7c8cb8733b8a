"""Iterative reconstruction with torch-radon's API: `Landweber`, `cg` and `cgne`, every sample stopping on its own.

Images are (..., H, W), sinograms (..., views, bins). An operator is any object with forward and backward; where it has
`transpose`, as ours do, that is used instead of backward. A `callback` is called with x after each iteration, in cg and
cgne with (x, residual) if it takes two arguments; the result is then (x, list of what it returned), else x. All are
differentiable unless stated otherwise.

On CUDA `cg` and `cgne` do not wait for the device, unless a callback has them look after every iteration: samples that
have stopped are masked, and where the CPU raises an error about values that are not finite or a map that is not
positive definite, that sample becomes NaN. float32 without a gradient goes through the kernels of solvers_cuda.py.
"""

import contextlib
import inspect

import torch

from . import operators
from .operators import BaseRadon
from .utils import _normalize_shape


def _dot(a: torch.Tensor, b: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Summed in float64: rounded back, it does not depend on the order, which changes with the size of a batch."""
    return (a * b).sum(dims, keepdim=True, dtype=torch.float64).to(a.dtype)


def _ratio(a: torch.Tensor, b: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """a / b where active, else 0: a sample that has converged stays as it is, and 0/0 reaches no gradient."""
    return torch.where(active, a / torch.where(active, b, 1), 0)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _check(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x. Where the residual is not finite: an error, or on CUDA, where asking would wait, NaN."""
    if x.is_cuda:
        return torch.where(torch.isfinite(residual).all(-1, True).all(-2, True), x, torch.nan)
    if not torch.isfinite(residual).all():
        raise ValueError("y - forward(x) holds NaN or infinity; expected finite x and y")
    return x


class _Stopped:
    """Whether all samples have stopped, asked before each iteration.

    On the CPU, and where a callback looks on, it is known at once. On CUDA the host does not wait: it asks now and
    then, and goes on until an answer has come; iterations after the last sample has stopped change nothing.
    """

    EVERY = 16  # iterations

    def __init__(self, x: torch.Tensor, callback):
        self.waits, self.iteration, self.event = callback is not None or not x.is_cuda, 0, None
        self.asks = not (self.waits or not operators._values_only(x.detach())
                         or torch.cuda.is_current_stream_capturing())

    def __call__(self, active) -> bool:
        """active(): what is not zero where a sample goes on."""
        if self.waits:
            return not active().any()
        self.iteration += 1
        if not self.asks or self.iteration % self.EVERY:
            return False
        if self.event is None:
            self.answer, self.event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        elif not self.event.query():
            return False
        elif not self.answer:
            return True
        self.answer.copy_(active().any(), non_blocking=True)
        self.event.record()
        return False


def _kernels(*tensors: torch.Tensor):
    """The module of CUDA kernels if these tensors do without gradients and transforms, else None."""
    if (not all(t.is_cuda and t.dtype == torch.float32 for t in tensors)
            or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
            or operators._cuda_backend() is operators.backend_torch):
        return None
    from . import solvers_cuda
    return solvers_cuda


def _leading(x: torch.Tensor, y: torch.Tensor):
    if x.shape[:-2] != y.shape[:-2] or x.device != y.device:
        raise ValueError(f"x is {tuple(x.shape)} on {x.device} and y is {tuple(y.shape)} on {y.device}; "
                         "expected the same leading dimensions and device")


def _transpose(operator):
    """The operator's map from sinograms to images.

    A projector whose user overrides one of its maps is theirs: our transpose of the map that was is not its transpose.
    """
    kind = type(operator)
    if isinstance(operator, BaseRadon) and kind.transpose is BaseRadon.transpose:
        own = all(getattr(kind, name) is getattr(BaseRadon, name) for name in ("forward", "backprojection", "backward"))
        return operator.transpose if own else operator.backward
    return operator.transpose if hasattr(operator, "transpose") else operator.backward


def _with_residual(callback):
    """callback as a function of (x, residual): given both if it has two arguments without a default, or any number."""
    try:
        arguments = inspect.signature(callback).parameters.values()
    except (TypeError, ValueError):  # some built-in functions do not say
        arguments = ()
    wanted = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) and a.default is a.empty]
    if len(wanted) == 2 or any(a.kind is a.VAR_POSITIONAL for a in arguments):
        return callback
    return lambda x, residual: callback(x)


def cg(forward, x: torch.Tensor, y: torch.Tensor, callback=None, max_iter: int = 500, tol: float = 1e-5):
    """Conjugate gradients: solve forward(x) = y for a symmetric positive definite `forward`, from x, (..., H, W).

    x and y may differ in leading dimensions of 1; the result has x's shape. `forward` gets and gives (B, H, W); each
    of the B is a sample of its own, which stops when |y - forward(x)| <= tol |y|. Raises ValueError where `forward` is
    found not to be positive definite.
    """
    shape, given = x.shape, (tuple(x.shape), tuple(y.shape))
    (x, _), (y, _) = _normalize_shape(x, 2), _normalize_shape(y, 2)
    if x.shape != y.shape or x.device != y.device:
        raise ValueError(f"x is {given[0]} on {x.device} and y is {given[1]} on {y.device}; expected as many images of "
                         "the same size on one device")
    dims, report = (-2, -1), _with_residual(callback)
    r = y - forward(x)
    x = _check(x, r)
    p, rr, limit, values = r, _dot(r, r, dims), tol**2 * _dot(y, y, dims), []
    active, stopped = rr > limit, _Stopped(x, callback)
    if kernels := _kernels(x, y, r):
        x, r = _copy(x), r.contiguous()
        look = callback and (lambda: report(x.reshape(shape), r.reshape(shape)))
        values = kernels.iterate(forward, lambda: r, x, r, r, rr, active, limit, max_iter, stopped, symmetric=True,
                                 report=look)
        max_iter = 0
    for _ in range(max_iter):
        if stopped(lambda active=active: active):
            break
        q = forward(p)
        curvature = _dot(p, q, dims)
        if x.is_cuda:
            curvature = torch.where(curvature > 0, curvature, torch.nan)
        elif (active & ~(curvature > 0)).any():
            raise ValueError("forward is not symmetric positive definite: <p, forward(p)> is not positive; adding a "
                             "small multiple of its argument makes a semidefinite map definite")
        alpha = _ratio(rr, curvature, active)
        x, r = x + alpha * p, r - alpha * q
        rr, previous = _dot(r, r, dims), rr
        active = active & (rr > limit)
        p = r + _ratio(rr, previous, active) * p
        if callback is not None:
            values.append(report(x.reshape(shape), r.reshape(shape)))
    x = x.reshape(shape)
    return x if callback is None else (x, values)


def cgne(operator, x: torch.Tensor, y: torch.Tensor, callback=None, max_iter: int = 5000, tol: float = 1e-5, *,
         weights: torch.Tensor | None = None, damp: float = 0.0, target: torch.Tensor | float | None = None,
         target_weights: torch.Tensor | None = None):
    """Least squares: minimise |operator.forward(x) - y|^2 by conjugate gradients on the normal equations, from x.

    x: (..., H, W); y: (..., views, bins). Every image is a sample of its own and stops when
    |A^T (y - A x)| <= tol |A^T y|. From x = 0 it finds the solution of least norm.
    weights: of each ray, >= 0, broadcast to y: minimises sum weights (A x - y)^2. damp: adds damp^2 |x - start|^2.
    target: stop as soon as sum target_weights (A x - y)^2 <= target, a number or one a sample (..., 1, 1);
    target_weights are `weights` unless given.
    """
    _leading(x, y)
    dims, target_weights = (-2, -1), weights if target_weights is None else target_weights
    transpose, report = _transpose(operator), _with_residual(callback)
    start, r = x, y - operator.forward(x)
    x = _check(x, r)

    def weighted(p, weights=weights):
        return p if weights is None else weights * p

    def gradient():
        s = transpose(weighted(r))
        return s - damp**2 * (x - start) if damp else s

    def unsettled():
        return ss > limit if target is None else (ss > limit) & (_dot(r, weighted(r, target_weights), dims) > target)

    s, toward = gradient(), transpose(weighted(y))
    p, ss, limit, values = s, _dot(s, s, dims), tol**2 * _dot(toward, toward, dims), []
    active, stopped = unsettled(), _Stopped(x, callback)
    given = [t for t in (weights, None if target is None else target_weights) if t is not None]
    if kernels := _kernels(x, y, r, s, *given):
        x, r = _copy(x), r.contiguous()
        weighing = None if weights is None else _copy(weights.expand_as(y))
        if target is not None:
            target = (target.to(ss) if isinstance(target, torch.Tensor) else torch.full_like(ss, target)).expand_as(ss)
            target = _copy(target).flatten()
            if target_weights is not None:
                target_weights = _copy(target_weights.expand_as(y))

        def next_gradient():
            s = transpose(weighted(r))
            return torch.sub(s, x - start, alpha=damp**2) if damp else s

        values = kernels.iterate(operator.forward, next_gradient, x, r, s, ss, active, limit, max_iter, stopped,
                                 weights=weighing, pull=damp**2, target=target, target_weights=target_weights,
                                 report=callback and (lambda: report(x, r)))
        max_iter = 0
    for _ in range(max_iter):
        if stopped(lambda active=active: active):
            break
        q = operator.forward(p)
        alpha = _ratio(ss, _dot(q, weighted(q), dims) + damp**2 * _dot(p, p, dims), active)
        x, r = x + alpha * p, r - alpha * q
        s = gradient()
        ss, previous = _dot(s, s, dims), ss
        active = active & unsettled()
        p = s + _ratio(ss, previous, active) * p
        if callback is not None:
            values.append(report(x, r))
    return x if callback is None else (x, values)


class Landweber:
    """Gradient descent on |operator.forward(x) - y|^2 / 2.

    projection: applied to x after each step, e.g. torch.relu; grad: keep the iterations in the autograd graph.
    """

    def __init__(self, operator, projection=None, grad: bool = False):
        self.operator, self.projection, self.grad = operator, projection, grad

    def estimate_alpha(self, img_size, device, n_iter: int = 50, batch_size: int = 8) -> float:
        """The limit of the step sizes that converge, 2/|A|^2, from n_iter power iterations on batch_size random images.

        img_size: pixels, an integer or (height, width). The random images are the same at every call. The iterations
        find |A| from below, so the limit itself may diverge slowly: half of it is the usual step.
        """
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        x = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            for _ in range(n_iter):
                x = _transpose(self.operator)(self.operator.forward(x / x.norm(dim=(-2, -1), keepdim=True)))
        return 2 / x.norm(dim=(-2, -1)).max().item()

    def run(self, x_zero: torch.Tensor, y: torch.Tensor, alpha: float, iterations: int = 100, callback=None):
        """`iterations` steps x <- projection(x - alpha A^T (A x - y)) from x_zero (..., H, W) for y (..., views, bins).

        Converges for alpha < 2/|A|^2.
        """
        _leading(x_zero, y)
        x, values = x_zero, []
        with contextlib.nullcontext() if self.grad else torch.no_grad():
            for _ in range(iterations):
                x = x - alpha * _transpose(self.operator)(self.operator.forward(x) - y)
                if self.projection is not None:
                    x = self.projection(x)
                if callback is not None:
                    values.append(callback(x))
        return x if callback is None else (x, values)
