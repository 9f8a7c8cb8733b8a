"""Metrics against reference values, units."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.metrics import METRICS, score, ssim, vif
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

    def measured(x, truth, width=3000):
        return score(x, truth, width, 500, slow=True)["vif"]

    found = {name: measured(x, truth).item() for name, x in images.items()}
    assert found["truth"] == pytest.approx(1) and found["flat"] == pytest.approx(0, abs=1e-6)
    assert 1 > found["some noise"] > found["noise"] > 0 and 0 < found["blur"] < 0.9
    centre = truth.mean()
    assert measured(centre + 1.2 * (truth - centre), truth, 5000).item() > 1
    assert measured(truth.repeat(2, 1, 1, 1), truth.repeat(2, 1, 1, 1)).shape == (2,)
    assert torch.isnan(measured(truth[..., :40, :40], truth[..., :40, :40])).all()


@pytest.mark.parametrize(("seed", "width", "centre", "expected"), [
    (0, 3000, 500, 0.986608), (1, 3000, 500, 0.672768), (2, 3000, 500, 0.516227), (1, 500, 50, 0.394549)])
def test_vif_is_that_of_a_window_of_255_grey_values(seed, width, centre, expected):
    """Another scale of grey values is another ratio to its noise variance of 2."""
    assert score(*pair(seed), width, centre, slow=True)["vif"].item() == pytest.approx(expected, abs=1e-5)


def grey_images():
    """{what: (estimate, truth)}, (1, 1, H, H) in [0, 1]: random, smooth, real, and with regions that are constant."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 96, 96, generator=generator)
    random, other = torch.rand(2, 1, 1, 41, 41, generator=generator)
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 96), indexing="ij")
    smooth = (0.5 + 0.4 * torch.sin(9 * x) * torch.cos(5 * y))[None, None]
    square = torch.zeros(1, 1, 96, 96)
    square[..., 20:60, 30:70] = 0.7
    slices = [np.load(path).astype(np.float32) for path in
              sorted((Path(__file__).parent.parent / "datasets" / "sample" / "test_img").glob("*.npy"))[:2]]
    body, next_body = (window(hu_to_mu(torch.from_numpy(hu)), 3000, 500)[None, None] for hu in slices)
    return {"random": (random, other), "smooth": (smooth + 0.01 * noise, smooth), "inverted": (1 - smooth, smooth),
            "square in air": ((square + 0.003 * noise).clamp(0, 1), square), "body": (body.roll(1, -1), body),
            "other body": (next_body, body), "flat estimate": (torch.full_like(square, 0.3), square)}


@pytest.mark.parametrize("what", grey_images())
def test_vif_is_that_of_sewar(what):
    """sewar convolves with whole windows, image by image."""
    from sewar.full_ref import vifp

    estimate, truth = grey_images()[what]
    expected = vifp(*(255 * x[0, 0].double().numpy() for x in (truth, estimate)))
    assert vif(estimate, truth, 3000).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("grey", [0.0, 0.25, 0.37, 0.785, 1.0])
def test_a_constant_truth_says_nothing_and_loses_nothing(grey):
    """As a slice of air does; sewar divides 0 by 0 there."""
    truth = torch.full((1, 1, 64, 64), grey)
    noisy = truth + 0.02 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    assert vif(torch.cat([truth, noisy]), torch.cat([truth, truth]), 3000).tolist() == [1, 1]


def test_a_batch_has_the_vif_of_its_slices_to_the_bit():
    estimates, truths = (torch.cat(x) for x in zip(*(pair(seed) for seed in range(5)), strict=True))
    a, b = (window(x, 3000, 500) for x in (estimates, truths))
    alone = [vif(x[None], y[None], 3000) for x, y in zip(a, b, strict=True)]
    assert torch.equal(vif(a, b, 3000), torch.cat(alone)) and len(set(torch.cat(alone).tolist())) == 5


def test_vif_stays_on_a_gpu():
    """Whatever asked a fake one for a value would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = vif(*(torch.empty(3, 1, 256, 256, device="cuda") for _ in range(2)), 3000)
    assert found.device.type == "cuda" and found.shape == (3,) and found.dtype == torch.float64


def test_every_metric_knows_its_truth_and_which_way_is_better():
    """The slow ones are measured when asked for."""
    estimate, truth = pair(1)
    worse = truth + 3 * (estimate - truth)
    scores = [score(x, truth, 3000, 500, slow=True) for x in (truth, estimate, worse)]
    assert set(scores[0]) == set(METRICS) > set(score(truth, truth, 3000, 500)) == {"psnr", "ssim", "rmse_hu"}
    for name, metric in METRICS.items():
        best, middle, last = (metric.better * s[name].item() for s in scores)
        assert best > middle > last, name
