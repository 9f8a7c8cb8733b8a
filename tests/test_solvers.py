"""torch_radon.solvers against scipy, per-sample stopping, differentiation and borders."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch_radon import Radon, RadonFanbeam
from torch_radon.solvers import Landweber, cg, cgne


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(radon):
    """The projector as a dense matrix, (views bins, H W) float64."""
    height, width = radon._image_shape
    return radon.forward(torch.eye(height * width).double().view(-1, height, width)).flatten(1).T.numpy()


@pytest.fixture(scope="module")
def over():
    """More equations than pixels."""
    return RadonFanbeam(12, 2 * np.pi * np.arange(23) / 23, 40, 40, 24, 2.0)


@pytest.fixture(scope="module")
def under():
    """Fewer equations than pixels."""
    return Radon(12, np.linspace(0.1, 3, 5), 18)


@pytest.mark.parametrize("kind", ["over", "under"])
def test_cgne_is_lsqr(kind, request):
    radon = request.getfixturevalue(kind)
    y = noise(2, *radon._sinogram_shape)
    found = cgne(radon, torch.zeros(2, 12, 12).double(), y, tol=1e-10)
    for x, target in zip(found, y, strict=True):
        expected = scipy.sparse.linalg.lsqr(matrix(radon), target.flatten().numpy(), atol=1e-13, btol=1e-13)[0]
        np.testing.assert_allclose(x.flatten().numpy(), expected, atol=1e-6 * abs(expected).max())


def test_cgne_weighs_rays_and_pulls_towards_its_start(over):
    y, start, damp = noise(2, *over._sinogram_shape), noise(2, 12, 12, seed=1), 3.0
    weights = noise(*over._sinogram_shape, seed=2).square()
    found = cgne(over, start, y, tol=1e-10, weights=weights, damp=damp)
    root = weights.sqrt().flatten().numpy()
    for x, x_start, target in zip(found, start.flatten(1).numpy(), y, strict=True):
        A, right = root[:, None] * matrix(over), root * target.flatten().numpy()
        shift = scipy.sparse.linalg.lsqr(A, right - A @ x_start, damp=damp, atol=1e-13, btol=1e-13)[0]
        np.testing.assert_allclose(x.flatten().numpy(), x_start + shift, atol=1e-6)


def test_cgne_stops_each_sample_at_its_target(over):
    y = over.forward(noise(2, 12, 12))
    target = y.square().sum((-2, -1), keepdim=True) * torch.tensor([1e-1, 1e-3]).view(2, 1, 1)

    def residuals(x):
        return (over.forward(x) - y).square().sum((-2, -1))

    found, path = cgne(over, torch.zeros(2, 12, 12).double(), y, residuals, target=target)
    assert (residuals(found) <= target.flatten()).all()
    path = torch.stack(path)
    first = [int((path[:, i] <= target[i].item()).nonzero()[0]) for i in range(2)]
    assert first[0] < first[1] == len(path) - 1, "no iteration after the last sample has stopped"
    assert (path[first[0]:, 0] == path[first[0], 0]).all(), "a sample that has stopped stays as it is"


def test_target_weights_decide_where_cgne_stops_and_not_where_it_goes(over):
    y, weights = over.forward(noise(2, 12, 12)), 1e3 * noise(2, *over._sinogram_shape, seed=1).square()
    _, path = cgne(over, torch.zeros(2, 12, 12).double(), y, lambda x: x)
    misfits = torch.stack([(weights * (over.forward(x) - y).square()).sum((-2, -1)) for x in path])
    stop = [4, 7]
    target = torch.stack([misfits[k, i] for i, k in enumerate(stop)]).view(2, 1, 1) * 1.0001
    found = cgne(over, torch.zeros(2, 12, 12).double(), y, target=target, target_weights=weights)
    for i in range(2):
        first = int((misfits[:, i] <= target[i].item()).nonzero()[0])
        assert first in (stop[i], stop[i] - 1)
        torch.testing.assert_close(found[i], path[first][i])


def test_cg_is_a_direct_solution(over):
    A = matrix(over)
    y = noise(3, 1, 12, 12)
    found = cg(lambda v: over.transpose(over.forward(v)) + 2 * v, torch.zeros_like(y), y, tol=1e-12)
    expected = np.linalg.solve(A.T @ A + 2 * np.eye(144), y.flatten(1).numpy().T).T
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-9)
    single = cg(lambda v: over.transpose(over.forward(v)) + 2 * v, torch.zeros(12, 12).double(), y[1, 0], tol=1e-12)
    np.testing.assert_allclose(single.flatten().numpy(), expected[1], atol=1e-9)


def test_a_batch_is_its_singles_although_they_stop_at_different_iterations(over):
    x_true = noise(3, 12, 12)
    x_true[1] *= 1e-3
    start, y = noise(3, 12, 12, seed=1), over.forward(x_true)
    start[2] = x_true[2]  # converged before it starts
    normal, right = (lambda v: over.transpose(over.forward(v)) + v), over.transpose(y) + x_true
    for solve, target in ((lambda x, y, f=None: cgne(over, x, y, f, tol=1e-7), y),
                          (lambda x, y, f=None: cg(normal, x, y, f, tol=1e-7), right)):
        together, singles = solve(start, target), [solve(start[i], target[i]) for i in range(3)]
        assert (together - torch.stack(singles)).norm() <= 1e-9 * x_true.norm()
        assert torch.equal(together[2], start[2])
        counts = [len(solve(start[i], target[i], lambda x: 0)[1]) for i in range(3)]
        assert counts[2] == 0 and counts[0] != counts[1]
        assert len(solve(start, target, lambda x: 0)[1]) == max(counts)


def test_cgne_in_float32_on_the_fast_kernels():
    radon = RadonFanbeam(32, 2 * np.pi * np.arange(90) / 90, 130, 130, 84, 2.0)
    x = torch.nn.functional.interpolate(noise(2, 1, 4, 4).float(), size=32, mode="bicubic")
    found, errors = cgne(radon, torch.zeros_like(x), radon.forward(x), lambda z: (z - x).norm().item(), max_iter=60)
    assert errors[-1] <= 0.02 * x.norm() and errors[-1] < errors[0] and len(errors) <= 60
    assert (found - x).norm().item() == errors[-1]


def test_landweber(over):
    x = noise(2, 12, 12).abs()
    y, zero = over.forward(x), torch.zeros_like(x)
    solver = Landweber(over)
    alpha = solver.estimate_alpha(12, torch.device("cpu"))
    assert alpha == pytest.approx(2 / np.linalg.norm(matrix(over), 2) ** 2, rel=1e-3)
    alpha /= 2
    step = alpha * over.transpose(y)
    torch.testing.assert_close(solver.run(zero, y, alpha, 1), step)
    found, residuals = solver.run(zero, y, alpha, 200, callback=lambda z: (over.forward(z) - y).norm().item())
    assert len(residuals) == 200 and all(b <= a for a, b in zip(residuals, residuals[1:], strict=False))
    assert residuals[-1] < 0.05 * y.norm()
    assert Landweber(Radon((9, 14), [0.0, 1.0], 18)).estimate_alpha((9, 14), "cpu", n_iter=5, batch_size=2) > 0


def test_landweber_projects_every_iterate(over):
    y = over.forward(noise(12, 12))
    alpha = Landweber(over).estimate_alpha(12, "cpu") / 2
    found, lowest = Landweber(over, projection=torch.relu).run(torch.zeros(12, 12).double(), y, alpha, 30,
                                                              callback=lambda z: z.min().item())
    assert min(lowest) == 0
    assert not torch.equal(found, torch.relu(Landweber(over).run(torch.zeros(12, 12).double(), y, alpha, 30)))


def test_gradients_flow_where_asked(over):
    y = over.forward(noise(12, 12)).requires_grad_()
    zero = torch.zeros(12, 12).double()
    assert not Landweber(over).run(zero, y, 1e-3, 2).requires_grad
    assert torch.autograd.gradcheck(lambda v: Landweber(over, grad=True).run(zero, v, 1e-3, 2), y)
    right = noise(2, 12, 12)
    right[1] = 0  # stops at once: 0/0 must not reach the gradient
    right.requires_grad_()
    (gradient,) = torch.autograd.grad(cg(lambda v: 2 * v, torch.zeros_like(right), right).sum(), right)
    torch.testing.assert_close(gradient[0], torch.full((12, 12), 0.5).double())
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("solve", "sentence"), [
    (lambda r, x, y: cg(lambda v: v, x, x[:1]), r"x is \(2, 12, 12\) on cpu and y is \(1, 12, 12\)"),
    (lambda r, x, y: cg(lambda v: -v, x, x + 1), "not symmetric positive definite"),
    (lambda r, x, y: cg(lambda v: v, x, x * float("nan")), "holds NaN or infinity"),
    (lambda r, x, y: cgne(r, x, y[0]), "expected the same leading dimensions"),
    (lambda r, x, y: cgne(r, x, y / 0), "holds NaN or infinity"),
    (lambda r, x, y: Landweber(r).run(x[0], y, 1.0), "expected the same leading dimensions"),
])
def test_bad_input_gets_a_sentence(over, solve, sentence):
    with pytest.raises(ValueError, match=sentence):
        solve(over, noise(2, 12, 12), noise(2, *over._sinogram_shape))
