"""The solvers as upstream documents them: any object with forward and backward."""

import numpy as np
import pytest
import torch
from equations import random_images
from torch_radon import Radon
from torch_radon.solvers import Landweber, cg, cgne


class Scaled:
    """A diagonal operator, whose solution is known."""

    factors = torch.linspace(1, 3, 64).view(8, 8)

    def forward(self, x):
        return self.factors * x

    backward = forward


def test_operators_need_forward_and_backward_only():
    x, y, solution = torch.zeros(1, 8, 8), torch.ones(1, 8, 8), 1 / Scaled.factors
    limit = Landweber(Scaled()).estimate_alpha(8, "cpu", n_iter=300)
    assert limit == pytest.approx(2 / 9, rel=1e-4), "2/|A|^2"
    torch.testing.assert_close(Landweber(Scaled()).run(x, y, limit / 2, 200)[0], solution)
    torch.testing.assert_close(cgne(Scaled(), x, y)[0], solution, atol=1e-4, rtol=0)


def test_a_projector_whose_maps_are_overridden_is_taken_by_its_own_backward():
    """`transpose` is that of the projection before the mask."""
    class Masked(Radon):
        mask = torch.ones(20, 1).index_fill(0, torch.arange(5), 0)

        def forward(self, x):
            return self.mask * super().forward(x)

        def backward(self, sinogram):
            return self.transpose(self.mask * sinogram)

    class Halved(Radon):
        def backprojection(self, sinogram):
            return super().backprojection(sinogram) / 2

    angles, y = np.linspace(0, 3, 20), torch.rand(20, 16)
    masked, plain = Masked(16, angles), Radon(16, angles)
    zero = torch.zeros(16, 16)
    torch.testing.assert_close(Landweber(masked).run(zero, y, 1e-3, 1), 1e-3 * plain.transpose(masked.mask * y))
    torch.testing.assert_close(Landweber(plain).run(zero, y, 1e-3, 1), 1e-3 * plain.transpose(y))
    torch.testing.assert_close(Landweber(Halved(16, angles)).run(zero, y, 1e-3, 1), 1e-3 * plain.backprojection(y) / 2)


@pytest.mark.parametrize(("x_shape", "y_shape", "seen"), [
    ((8, 8), (1, 1, 8, 8), (1, 8, 8)), ((2, 1, 8, 8), (2, 1, 8, 8), (2, 8, 8)), ((8, 8), (8, 8), (1, 8, 8)),
    ((1, 3, 8, 8), (3, 8, 8), (3, 8, 8))])
def test_cg_gives_the_map_three_dimensions(x_shape, y_shape, seen):
    shapes, y = set(), random_images(3, 8)[:seen[0]].reshape(y_shape)

    def normal(x):
        shapes.add(tuple(x.shape))
        return Scaled.factors * x

    found = cg(normal, torch.zeros(x_shape), y, tol=1e-6)
    assert shapes == {seen} and found.shape == x_shape
    torch.testing.assert_close(found, (y / Scaled.factors).reshape(x_shape))


def test_a_callback_of_two_arguments_gets_the_residual():
    A, y = lambda x: Scaled.factors * x, random_images(1, 8)  # noqa: E731
    _, pairs = cg(A, torch.zeros(1, 8, 8), y, callback=lambda x, r: (x, r), max_iter=4)
    for x, r in pairs:
        torch.testing.assert_close(r, y - A(x), atol=1e-6, rtol=0)
    _, both = cg(A, torch.zeros(1, 8, 8), y, callback=lambda *a: len(a), max_iter=4)
    _, one = cg(A, torch.zeros(1, 8, 8), y, callback=lambda x, truth=y: (x - truth).norm().item(), max_iter=4)
    _, kept = cg(A, torch.zeros(8, 8), y, callback=[].append, max_iter=4)
    _, residuals = cgne(Scaled(), torch.zeros(1, 8, 8), y, callback=lambda x, r: (r - y + A(x)).norm(), max_iter=3)
    assert len(residuals) == 3 and max(residuals) <= 1e-5
    assert len(pairs) == 4 and both == [2] * 4 and kept == [None] * 4
    assert one == [(x - y).norm().item() for x, _ in pairs]
