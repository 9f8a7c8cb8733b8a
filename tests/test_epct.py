"""What EPCT draws and minimises beyond the published recipe, which tests/test_paper.py asserts."""

import numpy as np
import torch

from models.epct import denser_level, loss, measured_level


def test_measured_levels():
    uniform = (np.arange(8000) + 0.5) / 8000
    assert (np.bincount([measured_level(u, 0.0) for u in uniform]) == 1000).all(), "the published draw"
    draws = np.bincount([measured_level(u, 0.6) for u in uniform])
    assert np.abs(draws - [400, 400, 400, 400, 2000, 400, 2000, 2000]).max() <= 1


def test_a_chain_without_jumps_goes_level_by_level_and_stays_at_the_densest():
    chain, uniform = [3], np.random.default_rng(0).random((5, 2))
    for u in uniform:
        chain.append(denser_level(chain[-1], u, jumps=0.0))
    assert chain == [3, 2, 1, 0, 0, 0]


def test_rmse_weighs_slices_alike():
    """The gradient of each slice has the same norm, however small its error."""
    x0_hat, x0 = torch.rand(2, 2, 1, 16, 16)
    x0_hat[1] = x0[1] + 0.01 * (x0_hat[1] - x0[1])
    x0_hat.requires_grad_()
    torch.testing.assert_close(loss(x0_hat, x0, "rmse", 0.1), loss(x0_hat, x0, "mse", 0.1).sqrt())
    torch.testing.assert_close(loss(x0_hat, x0, "mse", 0.1), (x0_hat - x0).square().mean((1, 2, 3)) / 0.01)
    (gradient,) = torch.autograd.grad(loss(x0_hat, x0, "rmse", 0.1).sum(), x0_hat)
    torch.testing.assert_close(gradient[0].norm(), gradient[1].norm())
