"""Noise and readings, against sums over the Poisson distribution."""

import math

import numpy as np
import pytest
import torch
from torch_radon import Radon, ReadingsLookup, compute_lookup_table


def poisson(mean):
    """Counts that occur and their probabilities."""
    n = np.arange(int(mean + 12 * math.sqrt(mean) + 40))
    return n, np.exp(n * math.log(mean) - mean - np.array([math.lgamma(k + 1) for k in n]))


def operator(seed=1):
    radon = Radon(16, [0.0, 1.0])
    radon.set_seed(seed)
    return radon


def moments(values, p):
    mean = (p * values).sum()
    return mean, math.sqrt((p * (values - mean) ** 2).sum())


# add_noise

@pytest.mark.parametrize(("signal", "normalization", "x"), [
    (10.0, 1.0, 2.0), (5.0, 10.0, 20.0), (12.0, 30.0, 100.0), (2.0, 1.0, 1.5), (0.0, 1.0, 3.0)])
def test_add_noise_has_upstreams_distribution(signal, normalization, x):
    """N ~ Poisson(exp(signal - x/dn)), x' = max(signal - log(max(N, 1)), 0) dn: `signal` is a logarithm, dn divides."""
    n, p = poisson(math.exp(signal - x / normalization))
    mean, deviation = moments(np.maximum(signal - np.log(np.maximum(n, 1)), 0) * normalization, p)
    noisy = operator().add_noise(torch.full((1, 300, 400), x), signal, normalization).double()
    assert noisy.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(noisy.numel()) + 1e-5 * x)
    assert noisy.std().item() == pytest.approx(deviation, rel=0.03)
    assert noisy.min() >= 0


def test_add_noise_counts_are_whole_and_approximate_ones_are_not():
    for approximate in (False, True):
        counts = torch.exp(5 - operator().add_noise(torch.ones(1000), 5.0, approximate=approximate).double())
        assert bool(((counts - counts.round()).abs() < 1e-3).all()) is not approximate
        deviation = counts.std() / math.exp(2)
        assert deviation == pytest.approx(1, rel=0.1)


def test_add_noise_is_in_place_and_its_seed_repeats_it():
    radon, x = operator(5), torch.rand(2, 2, 16)
    first = x.clone()
    assert radon.add_noise(first, 7.0) is first
    second = radon.add_noise(x.clone(), 7.0)
    radon.set_seed(5)
    assert torch.equal(radon.add_noise(x.clone(), 7.0), first) and not torch.equal(second, first)
    assert torch.equal(operator(5).add_noise(x.clone(), 7.0), first), "another operator, the same seed"
    np.random.seed(7)
    third = Radon(16, [0.0]).add_noise(x.clone(), 7.0)
    np.random.seed(7)
    radon.set_seed()
    assert torch.equal(radon.add_noise(x.clone(), 7.0), third)


def test_add_noise_in_half_and_double():
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.float64, 2e-4)):
        x = torch.full((50, 60), 2.0, dtype=dtype)
        noisy = operator().add_noise(x, 16.0)
        assert noisy.dtype == dtype and (noisy.double().mean() - 2).abs() <= tolerance
    assert not torch.equal(noisy, noisy.float().double()), "float64 is computed in float64"


# Readings

def test_readings_are_photon_counts():
    x = torch.full((200, 300), 20.0)
    readings = operator().emulate_readings(x, 7.0, 10.0)
    assert readings.dtype == torch.int32 and readings.shape == x.shape
    assert readings.double().mean().item() == pytest.approx(math.exp(5), rel=1e-3)
    assert readings.double().var().item() == pytest.approx(math.exp(5), rel=0.03)


def test_new_readings_have_electronic_noise_steps_and_a_last_bin():
    """(Poisson(exp(signal - x)) + a rounded normal number) // k, within 0 .. bins - 1."""
    signal, std, k, bins, x = 6.0, 5.0, 4, 20, 2.0
    n, p = poisson(math.exp(signal - x))
    e = np.arange(-60, 61)
    normal = np.diff([0.5 * (1 + math.erf((edge - 0.5) / std / math.sqrt(2))) for edge in range(-60, 62)])
    bin_ = np.clip((n[:, None] + e) // k, 0, bins - 1)
    expected = np.bincount(bin_.ravel(), (p[:, None] * normal).ravel(), bins)
    readings = operator().emulate_readings_new(torch.full((400, 500), x), signal, std, k, bins)
    assert readings.dtype == torch.int32 and readings.shape == (400, 500)
    found = torch.bincount(readings.flatten(), minlength=bins).numpy() / readings.numel()
    assert len(found) == bins and expected[-1] > 0.01
    assert np.abs(found - expected).max() <= 5 * math.sqrt(0.25 / readings.numel())


def test_readings_of_many_photons_stay_in_range():
    readings = operator().emulate_readings(torch.full((10,), -5.0), 20.0)
    assert (readings == 2**31 - 1).all()


def test_lookup_reads_the_table():
    table, radon = torch.arange(10.0) ** 2, operator()
    readings = torch.tensor([[3, 0], [9, 1]], dtype=torch.int32)
    assert torch.equal(radon.readings_lookup(readings, table), torch.tensor([[9.0, 0.0], [81.0, 1.0]]))
    with pytest.raises(ValueError, match="readings run from 0 to 9 and the lookup table is"):
        radon.readings_lookup(readings, table[:9])
    with pytest.raises(ValueError, match="readings run from -1"):
        radon.readings_lookup(readings - 1, table)


@pytest.mark.parametrize("std", [0.0, 3.0])
def test_lookup_table_is_the_mean_and_variance_behind_each_reading(std):
    """By Bayes: the sinogram's values are the prior."""
    values = np.array([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 2.5])
    signal, bins = 5.0, 32
    mean, variance, k = compute_lookup_table(torch.from_numpy(values).float().view(1, 1, 7), signal, std, bins)
    e = np.arange(-40, 41)
    normal = np.array([1.0 * (i == 0) for i in e]) if std == 0 else np.diff(
        [0.5 * (1 + math.erf((edge - 0.5) / std / math.sqrt(2))) for edge in range(-40, 42)])
    likelihood = np.zeros((7, bins))
    for row, value in zip(likelihood, values, strict=True):
        n, p = poisson(math.exp(signal - value))
        np.add.at(row, np.clip((n[:, None] + e) // k, 0, bins - 1).ravel(), (p[:, None] * normal).ravel())
    likely = likelihood.sum(0) > 1e-9
    expected = values @ likelihood[:, likely] / likelihood[:, likely].sum(0)
    spread = values**2 @ likelihood[:, likely] / likelihood[:, likely].sum(0) - expected**2
    assert likely.sum() > 20
    np.testing.assert_allclose(mean.numpy()[likely], expected, atol=1e-5)
    np.testing.assert_allclose(variance.numpy()[likely], spread, atol=1e-5)
    assert mean.shape == variance.shape == (bins,) and mean.dtype == torch.float32
    assert torch.isfinite(mean).all() and torch.isfinite(variance).all()


def test_the_step_lets_only_bright_rays_saturate():
    """k is the least for which 99 % of the readings >= bins k come from line integrals up to quantile(0.01) + 0.01."""
    values, signal, bins = np.array([0.0] * 3 + [0.05] * 5 + [1.0] * 4), 6.0, 16
    _, _, k = compute_lookup_table(torch.from_numpy(values).float(), signal, 0.0, bins)

    def bright_share(k):
        tails = np.array([poisson(math.exp(signal - x))[1][bins * k:].sum() for x in values])
        return tails[values <= 0.01].sum() / tails.sum()

    assert bright_share(k) >= 0.99 and all(bright_share(j) < 0.99 for j in range(1, k))
    assert k > 1


def test_readings_lookup_keeps_levels_and_files(tmp_path, capsys):
    sinogram = torch.rand(2, 20, 30) * 3
    radon = operator()
    lookup = ReadingsLookup(radon, bins=256)
    lookup.add_lookup_table(sinogram, 9.0, 4.0)
    lookup.add_lookup_table(sinogram, 7.0, 4.0, verbose=False)
    assert capsys.readouterr().out.count("k = ") == 1
    lookup.save(tmp_path / "tables")
    assert [path.name for path in tmp_path.iterdir()] == ["tables.npz"]
    loaded = ReadingsLookup.from_file(tmp_path / "tables.npz", radon)
    assert (loaded.bins, loaded.ks, loaded.signals, loaded.normal_stds) == (
        256, lookup.ks, lookup.signals, lookup.normal_stds)
    errors = []
    for level in (0, 1):
        readings = loaded.emulate_readings(sinogram, level)
        mean, variance = loaded.lookup(readings, level)
        error = (mean - sinogram).double()
        assert error.square().mean().item() == pytest.approx(variance.double().mean().item(), rel=0.25)
        errors.append(error.square().mean())
    assert errors[0] < errors[1]
    radon.set_seed(3)
    both = loaded.emulate_readings(sinogram, torch.tensor([1, 0]))
    radon.set_seed(3)
    assert torch.equal(both, torch.stack([loaded.emulate_readings(sinogram[0], 1),
                                          loaded.emulate_readings(sinogram[1], 0)]))
    mean, variance = loaded.lookup(both, torch.tensor([1, 0]))
    assert torch.equal(mean[1], loaded.mu[0][both[1].long()])
    assert torch.equal(variance[0], loaded.sigma[1][both[0].long()])


@pytest.mark.parametrize(("call", "error", "sentence"), [
    (lambda r, x: r.add_noise(x, 1e4), ValueError, "signal is 10000.0; expected the natural logarithm of the photons"),
    (lambda r, x: r.add_noise(x, float("nan")), ValueError, "signal is nan"),
    (lambda r, x: r.add_noise(x, 10, 0.0), ValueError, "density_normalization is 0.0; expected a positive number"),
    (lambda r, x: r.add_noise(x.numpy(), 10), TypeError, "sinogram is a ndarray; expected a torch tensor"),
    (lambda r, x: r.emulate_readings(x.int(), 10), TypeError, "sinogram is a torch.int32"),
    (lambda r, x: r.emulate_readings(x, 50), ValueError, "signal is 50"),
    (lambda r, x: r.emulate_readings_new(x, 10, 1.0, 0, 16), ValueError, "k is 0"),
    (lambda r, x: compute_lookup_table(x, 1e5, 1.0), ValueError, "signal is 100000.0"),
])
def test_bad_input_gets_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(operator(), torch.ones(3, 4))
