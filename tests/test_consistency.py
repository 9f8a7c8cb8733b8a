"""Data consistency: against LSQR, residuals, batches, what it must not touch, and where the truth may enter."""

import csv

import numpy as np
import pytest
import torch
from conftest import body
from scipy.sparse.linalg import LinearOperator, lsqr
from torch_radon import transmission_noise

import models.evaluation
import test as evaluation
from models.consistency import MARGIN, data_consistency, deviation
from models.degradation import Degradation
from models.estimate import Estimate
from models.methods import METHODS
from models.samplers import SAMPLERS, redegrade, shift
from utils.units import hu_to_mu, pixel_cm

DEGRADE = Degradation()


@pytest.fixture(scope="module")
def truth():
    rng = torch.Generator().manual_seed(0)
    return torch.nn.functional.avg_pool2d(torch.rand(3, 1, 36, 36, generator=rng), 5, 1) * 0.4


def residuals(x, y):
    return [(p - q).norm().item() for p, q in zip(DEGRADE.project(x, [p.shape[-2] for p in y]), y, strict=True)]


def test_agrees_with_lsqr(truth):
    x0, start, operator = truth[:1].double(), truth[1:2].double(), DEGRADE.operator(32, 9)
    y = DEGRADE.project(x0, 9)
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
    assert torch.equal(dc(start, [0, 1, 2]), alone) and torch.equal(dc(start[[2, 1]], [2, 1]), alone[[2, 1]])


def test_a_batch_of_one_view_count_is_that_of_a_list(truth):
    dc, start = (data_consistency(DEGRADE, DEGRADE.project(truth, n), 6) for n in (18, [18] * 3)), 0.9 * truth
    assert torch.equal(*(one(start, [0, 1, 2]) for one in dc))


def test_under_the_official_protocol_an_estimate_meets_what_was_measured_of_the_truth(truth):
    """y = P_n x0: its FBP is the plain D(x0, n), the truth stays as it is, and an estimate itself comes closer to y."""
    official, every = Degradation(official=True), range(len(truth))
    y = official.project(truth, 18)
    torch.testing.assert_close(official.fbp(y, 32), DEGRADE(truth, 18), rtol=1e-4, atol=1e-5)
    dc = data_consistency(official, y, 8)
    torch.testing.assert_close(dc(truth, every), truth, rtol=0, atol=1e-5)
    assert torch.equal(dc(0.9 * truth, every), data_consistency(DEGRADE, y, 8)(0.9 * truth, every))

    def misfit(x):
        return (official.project(x, 18) - y).flatten(1).norm(dim=1)

    assert (misfit(dc(0.9 * truth, every)) < 0.2 * misfit(0.9 * truth)).all()


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
    for i in range(3):  # the path is that of the unweighted fit, left at the first iterate that noise would explain
        left = next(k for k in range(1, 41) if misfits(fit(k))[i] <= MARGIN)
        torch.testing.assert_close(known[i], fit(left)[i])


def test_consistent_samplers_end_at_the_measurement_and_drop_the_shift(truth):
    y = DEGRADE.project(truth, 36)
    x_T = DEGRADE.fbp(y, 32)
    torch.testing.assert_close(x_T, DEGRADE(truth, 36), rtol=1e-4, atol=1e-5)

    def blur(x_t, views):
        return torch.nn.functional.avg_pool2d(x_t, 3, 1, 1, count_include_pad=False)

    def run(name, dc):
        estimate = Estimate(blur, DEGRADE, x_T, 36, dc)
        return SAMPLERS[name].run(estimate, DEGRADE, x_T, (288, 126, 36), redegrade if dc else shift)

    dc = data_consistency(DEGRADE, y, 8)
    for name in ("one-step", "sequential", "spdps"):
        without, with_dc = (run(name, d) for d in (None, dc))
        assert (np.array(residuals(with_dc, y)) < 0.2 * np.array(residuals(without, y))).all()
    assert torch.equal(run("naive", dc), run("sequential", dc))
    assert not torch.equal(run("naive", None), run("sequential", None))


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
    simulate, kept, asked = models.evaluation.simulate_measurement, {}, []

    def first_measurement(x0, n_views, names, degrade, noise):
        asked.append(tuple(names))
        return kept.setdefault(tuple(names), simulate(x0, n_views, names, degrade, noise))

    monkeypatch.setattr(models.evaluation, "simulate_measurement", first_measurement)
    images, tables, methods = [], [], [m for m in METHODS if m != "reco"]
    for i in range(2):
        out = tmp_path / str(i)
        call(evaluation.main, "--data", data, "--views", 54, "--batch", 2, "--dc", 4, "--photons", 1e5, "--out", out,
             "--save-images", "--methods", *methods)
        images.append({file.relative_to(out): file.read_bytes() for file in (out / "images").rglob("*.npy")})
        tables.append([row["psnr"] for row in csv.DictReader((out / "results.csv").open())])
        for file in (data / "test_img").glob("*.npy"):
            np.save(file, np.load(file) // 2)
    assert len(asked) == 4, "measured once for all methods and once for the figure: the test replaces what runs"
    assert images[0] == images[1] and len(images[0]) == 2 * len(methods)
    assert all(a != b for a, b in zip(*tables, strict=True))
