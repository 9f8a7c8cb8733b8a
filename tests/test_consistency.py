"""Data consistency: against LSQR, residuals, batches, what it must not touch, and where the truth may enter."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, lsqr
from torch_radon import transmission_noise

import test as evaluation
from models.consistency import data_consistency, inverse_variance
from models.degradation import Degradation, equal_angles, projector
from models.samplers import SAMPLERS, naive, sequential
from utils.units import pixel_cm

DEGRADE = Degradation()


@pytest.fixture(scope="module")
def truth():
    rng = torch.Generator().manual_seed(0)
    return torch.nn.functional.avg_pool2d(torch.rand(3, 1, 36, 36, generator=rng), 5, 1) * 0.4


def residuals(x, y):
    return [(p - q).norm().item() for p, q in zip(DEGRADE.project(x, [p.shape[-2] for p in y]), y, strict=True)]


def test_agrees_with_lsqr(truth):
    x0, start, operator = truth[:1].double(), truth[1:2].double(), projector(32, equal_angles(9))
    y = DEGRADE.project(x0, [9])
    shape = (operator.det_count * 9, 32 * 32)

    def project(v):
        return operator.forward(torch.from_numpy(v.reshape(32, 32))).numpy().ravel()

    def transpose(v):
        return operator.transpose(torch.from_numpy(v.reshape(9, -1))).numpy().ravel()

    A = LinearOperator(shape, matvec=project, rmatvec=transpose, dtype=np.float64)
    residual = y[0].numpy().ravel() - project(start.numpy().ravel())
    for iterations in (1, 5, 15):
        expected = start.numpy().ravel() + lsqr(A, residual, iter_lim=iterations, atol=0, btol=0)[0]
        found = data_consistency(DEGRADE, y, iterations)(start, [0]).numpy().ravel()
        assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


def test_residuals_fall_with_every_iteration(truth):
    y = DEGRADE.project(truth, [18, 36, 72])
    found = np.array([residuals(data_consistency(DEGRADE, y, k)(0.5 * truth, [0, 1, 2]), y) for k in (1, 2, 4, 8, 16)])
    assert (np.diff(found, axis=0) < 0).all()
    assert data_consistency(DEGRADE, y, 0) is None


def test_a_batch_of_mixed_view_counts_gives_what_slices_alone_give(truth):
    y = DEGRADE.project(truth, [18, 72, 18])
    dc, start = data_consistency(DEGRADE, y, 6), 0.9 * truth
    alone = torch.cat([data_consistency(DEGRADE, y[i:i + 1], 6)(start[i:i + 1], [0]) for i in range(3)])
    torch.testing.assert_close(dc(start, [0, 1, 2]), alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dc(start[[2, 1]], [2, 1]), alone[[2, 1]], rtol=1e-5, atol=1e-6)


def test_noisy_measurements_are_weighted_and_fitted_no_closer_than_their_noise(truth):
    photons, generator = 1e4, torch.Generator().manual_seed(0)
    clean = DEGRADE.project(truth, [36] * 3)
    noisy = [transmission_noise(p, photons, pixel_cm(32), generator=generator) for p in clean]

    def misfits(x):
        return [(inverse_variance(p, photons, pixel_cm(32)) * (p - q).square()).mean().item()
                for p, q in zip(noisy, DEGRADE.project(x, [36] * 3), strict=True)]

    assert misfits(truth) == pytest.approx([1, 1, 1], abs=0.05), "the truth's misfit is the noise"
    few, many = (misfits(data_consistency(DEGRADE, noisy, k, photons)(0.9 * truth, [0, 1, 2])) for k in (2, 40))
    assert min(few) > 1.5 and 0.8 < min(many) and max(many) <= 1.001


def test_what_the_measurement_confirms_stays(truth):
    y = DEGRADE.project(truth, [18] * 3)
    torch.testing.assert_close(data_consistency(DEGRADE, y, 8)(truth, [0, 1, 2]), truth)


def test_consistent_samplers_end_at_the_measurement_and_drop_the_shift(truth):
    y = DEGRADE.project(truth, [36] * 3)
    x_T = DEGRADE.fbp(y, 32)
    torch.testing.assert_close(x_T, DEGRADE(truth, 36), rtol=1e-4, atol=1e-5)

    def blur(x_t, views):
        return torch.nn.functional.avg_pool2d(x_t, 3, 1, 1, count_include_pad=False)

    dc = data_consistency(DEGRADE, y, 8)
    levels = (288, 126, 36)
    for name in ("one-step", "sequential", "spdps"):
        without, with_dc = (SAMPLERS[name](blur, DEGRADE, x_T, levels, dc=d)[0] for d in (None, dc))
        assert (np.array(residuals(with_dc, y)) < 0.2 * np.array(residuals(without, y))).all()
    assert torch.equal(naive(blur, DEGRADE, x_T, levels, dc=dc)[0], sequential(blur, DEGRADE, x_T, levels, dc=dc)[0])
    assert not torch.equal(naive(blur, DEGRADE, x_T, levels)[0], sequential(blur, DEGRADE, x_T, levels)[0])


def test_reconstruction_sees_the_measurement_only(truth):
    """Two images with the same sinogram give the same reconstruction: nothing else of the truth gets in."""
    y = DEGRADE.project(truth[:1], [18])
    seen = []

    def denoise(x_t, views):
        seen.append(x_t)
        return x_t * 0.9

    first, _ = evaluation.reconstruct("spdps", y, 32, denoise, DEGRADE, 4)
    null = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.01
    null = data_consistency(DEGRADE, [torch.zeros_like(y[0])], 200)(null, [0])
    other = truth[:1] + null
    assert null.norm() > 0.01 * truth[:1].norm()
    second, _ = evaluation.reconstruct("spdps", DEGRADE.project(other, [18]), 32, denoise, DEGRADE, 4)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    assert (first - truth[:1]).norm() > 0.01 * truth[:1].norm()
