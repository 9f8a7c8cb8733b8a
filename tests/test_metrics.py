"""Metrics against reference values, units."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.metrics import METRICS, score, ssim
from utils.units import hu_to_mu, mu_to_hu, window

CASES = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())


def pair(seed):
    yy, xx = np.mgrid[0:96, 0:96] / 96
    inside = (xx - 0.5) ** 2 + (yy - 0.5) ** 2
    truth = -1000 + 1100 * (inside < 0.16) + 300 * np.sin(9 * xx + seed) * np.cos(7 * yy) * (inside < 0.12)
    truth = truth.astype(np.float32)
    noise = np.random.default_rng(seed).standard_normal(truth.shape).astype(np.float32)
    estimate = truth + noise * (5 + 40 * seed)
    return tuple(hu_to_mu(torch.from_numpy(np.float32(x)))[None, None] for x in (estimate, truth))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['seed']}-W{c['width']}")
def test_reference_values(case):
    found = score(*pair(case["seed"]), case["width"], case["center"])
    assert found["rmse_hu"].item() / case["width"] == pytest.approx(case["rmse"], abs=1e-6)
    assert found["psnr"].item() == pytest.approx(case["psnr"], abs=1e-4)
    assert found["ssim"].item() == pytest.approx(case["ssim"], abs=1e-5)


def test_units_and_window():
    hu = torch.tensor([-1024.0, 0.0, 3071.0])
    torch.testing.assert_close(mu_to_hu(hu_to_mu(hu)), hu, atol=1e-3, rtol=0)
    assert hu_to_mu(torch.tensor(0.0)) == torch.tensor(0.192)
    torch.testing.assert_close(window(hu_to_mu(torch.tensor([-2000.0, -1000.0, 500.0, 3000.0])), 3000, 500),
                               torch.tensor([0.0, 0.0, 0.5, 1.0]))


def test_an_exact_slice_counts_as_100_db():
    air = torch.zeros(2, 1, 16, 16)
    assert score(air, air, 3000, 500)["psnr"].tolist() == [100, 100]


def test_ssim_is_one_for_equal_images_and_symmetric():
    a, b = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    torch.testing.assert_close(ssim(a, b), ssim(b, a))


def test_vif_orders_images_by_what_they_still_say():
    """1 for the truth, less with noise or blur, more than 1 where contrast is enhanced (Sheikh & Bovik, sec. IV)."""
    _, truth = pair(1)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    images = {"truth": truth, "some noise": truth + 0.002 * noise, "noise": truth + 0.02 * noise,
              "blur": torch.nn.functional.avg_pool2d(truth, 5, 1, 2), "flat": torch.full_like(truth, 0.2)}

    def vif(x, truth, width=3000):
        return score(x, truth, width, 500, slow=True)["vif"]

    found = {name: vif(x, truth).item() for name, x in images.items()}
    assert found["truth"] == pytest.approx(1) and found["flat"] == pytest.approx(0, abs=1e-6)
    assert 1 > found["some noise"] > found["noise"] > 0 and 0 < found["blur"] < 0.9
    centre = truth.mean()
    assert vif(centre + 1.2 * (truth - centre), truth, 5000).item() > 1
    assert vif(truth.repeat(2, 1, 1, 1), truth.repeat(2, 1, 1, 1)).shape == (2,)
    assert torch.isnan(vif(truth[..., :40, :40], truth[..., :40, :40])).all()


@pytest.mark.parametrize(("seed", "width", "centre", "expected"), [
    (0, 3000, 500, 0.986608), (1, 3000, 500, 0.672768), (2, 3000, 500, 0.516227), (1, 500, 50, 0.394549)])
def test_vif_is_that_of_a_window_of_255_grey_values(seed, width, centre, expected):
    """Another scale of grey values is another ratio to its noise variance of 2."""
    assert score(*pair(seed), width, centre, slow=True)["vif"].item() == pytest.approx(expected, abs=1e-5)


def test_every_metric_knows_its_truth_and_which_way_is_better():
    """The slow ones are measured when asked for."""
    estimate, truth = pair(1)
    worse = truth + 3 * (estimate - truth)
    scores = [score(x, truth, 3000, 500, slow=True) for x in (truth, estimate, worse)]
    assert set(scores[0]) == set(METRICS) > set(score(truth, truth, 3000, 500)) == {"psnr", "ssim", "rmse_hu"}
    for name, metric in METRICS.items():
        best, middle, last = (metric.better * s[name].item() for s in scores)
        assert best > middle > last, name
