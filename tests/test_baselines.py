"""Reconstruction without a network: golden values, convergence, batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import body

from models.baselines import BASELINES, _gradient, _gradient_transpose, fbp, fbp_fdk, sirt, tv
from models.degradation import Degradation
from models.scanner import PublishedScanner
from utils.metrics import score
from utils.units import WINDOWS, hu_to_mu

GOLDEN = Path(__file__).parent / "golden"
DEGRADE, N, SIZE = Degradation(), 36, 64


@pytest.fixture(scope="module")
def phantoms():
    """Ellipses of constant mu >= 0, which total variation suits, (2, 1, 64, 64)."""
    hu = np.stack([body(SIZE, seed) for seed in (1, 2)]).astype(np.float32)
    return hu_to_mu(torch.from_numpy(hu))[:, None].clamp_min(0)


def psnr(x, truth):
    return score(x, truth, *WINDOWS[0])["psnr"].min().item()


def test_fbp_by_both_weights_is_the_reference():
    fan, more = np.load(GOLDEN / "fanbeam.npz"), np.load(GOLDEN / "more.npz")
    y = DEGRADE.project(torch.from_numpy(fan["x0"]).reshape(1, 1, 256, 256), 72)
    for method, expected in ((fbp, fan["D72"]), (fbp_fdk, more["fdk_D72"])):
        expected = torch.from_numpy(expected)
        assert (method(DEGRADE, y, 256)[0, 0] - expected).norm() <= 2e-5 * expected.norm()


def test_sirt_converges_to_the_phantom(phantoms):
    y, operator = DEGRADE.project(phantoms, N), DEGRADE.operator(SIZE, N)
    residuals = []
    x = sirt(DEGRADE, y, SIZE, 100,
             callback=lambda x: residuals.append((operator.forward(x) - y).flatten(1).norm(dim=1)))
    assert all((b < a).all() for a, b in zip(residuals, residuals[1:], strict=False))
    assert (residuals[-1] < 0.03 * residuals[0]).all() and x.min() >= 0
    assert psnr(x, phantoms) > psnr(fbp(DEGRADE, y, SIZE), phantoms) + 2


def objective(x, y, weight):
    """What `tv` minimises, for each slice."""
    weight = weight * (SIZE / 256) ** 2
    misfit = (DEGRADE.operator(SIZE, N).forward(x) - y).square().flatten(1).sum(1) / (2 * N)
    return misfit + weight * _gradient(x).norm(dim=1).flatten(1).sum(1)


def test_tv_minimises_its_objective(phantoms):
    y, weight = DEGRADE.project(phantoms, N), 0.1
    seen = []
    x = tv(DEGRADE, y, SIZE, weight, 400, callback=lambda x: seen.append(objective(x, y, weight)))
    start, reached = objective(fbp(DEGRADE, y, SIZE), y, weight), seen[-1]
    assert (reached < 0.5 * start).all() and (reached < objective(phantoms, y, weight)).all()
    assert (seen[-1] > 0.99 * seen[299]).all(), "another 100 iterations change little"
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):  # no neighbour is better
        step = torch.nn.functional.interpolate(torch.randn(2, 1, 8, 8, generator=generator), size=SIZE) * 0.003
        assert (objective((x + step).clamp_min(0), y, weight) > reached).all()
    assert psnr(x, phantoms) > psnr(fbp(DEGRADE, y, SIZE), phantoms) + 5 and x.min() >= 0
    assert objective(tv(DEGRADE, y, SIZE, 10.0, 400), y, 10.0).max() < objective(x, y, 10.0).min()


def test_the_gradients_transpose_is_one():
    x, q = torch.randn(2, 1, 9, 9).double(), torch.randn(2, 2, 9, 9).double()
    torch.testing.assert_close((_gradient(x) * q).sum(), (x * _gradient_transpose(q)).sum())


@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_gives_what_its_slices_give_alone_at_any_start_angle(name, phantoms):
    degrade = Degradation(PublishedScanner(0.3))
    y = degrade.project(phantoms, 24)
    together = BASELINES[name].run(degrade, y, SIZE)
    for i, x in enumerate(together):
        assert torch.equal(x, BASELINES[name].run(degrade, y[i:i + 1], SIZE)[0])
    assert psnr(together, phantoms) > psnr(BASELINES[name].run(DEGRADE, y, SIZE), phantoms) + 1, "the angle matters"
