"""Data consistency: against LSQR, residuals, batches, what it must not touch, and where the truth may enter."""

import csv

import numpy as np
import pytest
import torch
from conftest import body
from scipy.sparse.linalg import LinearOperator, lsqr
from torch_radon import transmission_noise
from torch_radon.solvers import cgne

import test as evaluation
from models.consistency import data_consistency, deviation
from models.degradation import LEVELS, Degradation, equal_angles, projector
from models.samplers import SAMPLERS, naive, sequential
from utils.units import hu_to_mu, pixel_cm

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


def test_the_pull_is_the_proximal_map(truth):
    """argmin |P x - y|^2 + n c |x - x0_hat|^2: LSQR's damped solution; a strong pull moves nothing."""
    y, start, n, c = DEGRADE.project(truth[:1].double(), [9]), truth[1:2].double(), 9, 0.7
    operator, bins = projector(32, equal_angles(n)), y[0].shape[-1]
    A = LinearOperator((bins * n, 32 * 32), dtype=np.float64,
                       matvec=lambda v: operator.forward(torch.from_numpy(v.reshape(32, 32))).numpy().ravel(),
                       rmatvec=lambda v: operator.transpose(torch.from_numpy(v.reshape(n, bins))).numpy().ravel())
    x0_hat = start.numpy().ravel()
    step = lsqr(A, y[0].numpy().ravel() - A.matvec(x0_hat), damp=(n * c)**0.5, iter_lim=200, atol=0, btol=0)[0]
    found = data_consistency(DEGRADE, y, 200, pull=c)(start, [0]).numpy().ravel() - x0_hat
    assert np.linalg.norm(found - step) <= 2e-3 * np.linalg.norm(step)  # where CG stops
    strong = data_consistency(DEGRADE, y, 200, pull=1e9)(start, [0])
    torch.testing.assert_close(strong, start, rtol=0, atol=1e-6)


def test_residuals_fall_with_every_iteration(truth):
    y = DEGRADE.project(truth, [18, 36, 72])
    found = np.array([residuals(data_consistency(DEGRADE, y, k)(0.5 * truth, [0, 1, 2]), y) for k in (1, 2, 4, 8, 16)])
    assert (np.diff(found, axis=0) < 0).all()
    assert data_consistency(DEGRADE, y, 0) is None


def test_a_batch_of_mixed_view_counts_gives_what_slices_alone_give(truth):
    y = DEGRADE.project(truth, [18, 72, 18])
    dc, start = data_consistency(DEGRADE, y, 6), 0.9 * truth
    alone = torch.cat([data_consistency(DEGRADE, y[i:i + 1], 6)(start[i:i + 1], [0]) for i in range(3)])
    assert torch.equal(dc(start, [0, 1, 2]), alone) and torch.equal(dc(start[[2, 1]], [2, 1]), alone[[2, 1]])


def test_the_official_measurement_is_that_of_the_full_view_image(truth):
    """y = P_n R x0 there: the truth stays as it is, and an estimate comes closer to y."""
    official = Degradation(official=True)
    y = official.project(truth, [18] * len(truth))
    dc, every = data_consistency(official, y, 8), range(len(truth))
    torch.testing.assert_close(dc(truth, every), truth, rtol=0, atol=1e-5)

    def misfit(x):
        return sum((p - q).norm().item() for p, q in zip(official.project(x, [18] * len(x)), y, strict=True))

    assert misfit(dc(0.9 * truth, every)) < 0.2 * misfit(0.9 * truth)


def test_electronic_noise_is_part_of_the_deviation():
    y, photons, sigma = torch.linspace(0, 20, 9).repeat(20000, 1), 1e4, 20.0
    noisy = transmission_noise(y, photons, 0.14, sigma, torch.Generator().manual_seed(0))
    torch.testing.assert_close(deviation(y[0], photons, 0.14, sigma), noisy.std(0), rtol=0.05, atol=0)


def test_noisy_measurements_are_fitted_no_closer_than_their_noise():
    photons, generator = 1e4, torch.Generator().manual_seed(0)
    x0 = hu_to_mu(torch.from_numpy(np.stack([body(64, seed) for seed in range(3)])[:, None].astype(np.float32)))
    noisy = [transmission_noise(p, photons, pixel_cm(64), generator=generator) for p in DEGRADE.project(x0, [36] * 3)]
    start = torch.nn.functional.avg_pool2d(x0, 5, 1, 2)

    sigma = [deviation(p, photons, pixel_cm(64)) for p in noisy]

    def misfits(x, power=1):
        return np.array([((p - q).square() / s**power).sum().item() / (s ** (2 - power)).sum().item() for s, p, q in
                         zip(sigma, noisy, DEGRADE.project(x, [36] * 3), strict=True)])

    def fit(iterations, photons=None):
        return data_consistency(DEGRADE, noisy, iterations, photons)(start, [0, 1, 2])

    def errors(x):
        return (x - x0).square().mean((1, 2, 3)).numpy()

    for power in (1, 2):
        np.testing.assert_allclose(misfits(x0, power), 1, atol=0.1, err_msg="the truth's misfit is the noise")
    known, blind = fit(40, photons), fit(40)
    assert errors(known).mean() < 0.9 * errors(start).mean() and (errors(known) < 0.7 * errors(blind)).all()
    weighted = data_consistency(DEGRADE, noisy, 5, photons, weighted=True)(start, [0, 1, 2])
    expected = cgne(projector(64, equal_angles(36)), start, torch.stack(noisy), max_iter=5,
                    weights=torch.stack(sigma)**-2)
    torch.testing.assert_close(weighted, expected)
    assert not torch.allclose(weighted, fit(5), atol=1e-3)
    for i in range(3):  # the path is that of the unweighted fit, left at the first iterate that noise would explain
        left = next(k for k in range(1, 41) if misfits(fit(k))[i] <= 1)
        torch.testing.assert_close(known[i], fit(left)[i])


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

    def denoise(x_t, views):
        return x_t * 0.9

    first, _ = evaluation.reconstruct("spdps", y, 32, denoise, DEGRADE, 4, levels=LEVELS)
    null = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.01
    null = data_consistency(DEGRADE, [torch.zeros_like(y[0])], 200)(null, [0])
    other = truth[:1] + null
    assert null.norm() > 0.01 * truth[:1].norm()
    second, _ = evaluation.reconstruct("spdps", DEGRADE.project(other, [18]), 32, denoise, DEGRADE, 4, levels=LEVELS)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    assert (first - truth[:1]).norm() > 0.01 * truth[:1].norm()


def test_estimates_and_their_own_measurements_are_all_that_consistency_sees(truth):
    y, others = DEGRADE.project(truth, [18, 18, 36]), DEGRADE.project(truth.roll(1, 0), [18, 18, 36])
    start = (0.9 * truth, [p.clone() for p in y])
    dc = data_consistency(DEGRADE, y, 6)
    first = dc(start[0], [0, 1, 2])
    dc(truth, [0, 1, 2])
    assert torch.equal(dc(start[0], [0, 1, 2]), first), "nothing is kept from one call to the next"
    assert all(torch.equal(p, q) for p, q in zip([start[0], *y], [0.9 * truth, *start[1]], strict=True))
    mixed = data_consistency(DEGRADE, [y[0], others[1], others[2]], 6)
    assert torch.equal(mixed(start[0][:1], [0]), dc(start[0][:1], [0]))
    assert not torch.equal(mixed(start[0][1:2], [1]), dc(start[0][1:2], [1]))


def test_another_truth_with_the_same_measurement_changes_no_bit(data, tmp_path, call, monkeypatch):
    """Through the whole of test.py, every method: the truth reaches the metrics and nothing else."""
    for file in sorted((data / "test_img").glob("*.npy"))[2:]:
        file.unlink()
    measured, kept = evaluation.measured, {}

    def first_measurement(x0, n_views, names, degrade, args):
        return kept.setdefault(tuple(names), measured(x0, n_views, names, degrade, args))

    monkeypatch.setattr(evaluation, "measured", first_measurement)
    images, tables, methods = [], [], [m for m in evaluation.METHODS if m != "reco"]
    for i in range(2):
        out = tmp_path / str(i)
        call(evaluation.main, "--data", data, "--views", 54, "--batch", 2, "--dc", 4, "--photons", 1e5, "--out", out,
             "--save-images", "--methods", *methods)
        images.append({file.relative_to(out): file.read_bytes() for file in (out / "images").rglob("*.npy")})
        tables.append([row["psnr"] for row in csv.DictReader((out / "results.csv").open())])
        for file in (data / "test_img").glob("*.npy"):
            np.save(file, np.load(file) // 2)
    assert images[0] == images[1] and len(images[0]) == 2 * len(methods)
    assert all(a != b for a, b in zip(*tables, strict=True))
