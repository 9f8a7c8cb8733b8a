"""From sinograms to images in Python: what a checkpoint says, what a keyword changes, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, body

import reconstruct
import test as evaluation
from models.baselines import BASELINES
from models.checkpoint import save_checkpoint
from models.consistency import ITERATIONS, data_consistency
from models.degradation import Degradation
from models.levels import LEVELS, levels_for, multiples
from models.reconstructor import Reconstructor
from models.samplers import SAMPLERS
from models.scanner import PUBLISHED, PublishedScanner
from models.unet import UNet, UNetConfig
from utils.errors import InputError
from utils.metrics import score
from utils.units import HU_RANGE, WINDOWS, hu_to_mu, mu_to_hu

SIZE, SMALL = 32, UNetConfig(width=32)
SLICE = ROOT / "datasets" / "sample" / "test_img" / "LIDC-IDRI-0001_008.npy"


class Watched(UNet):
    """Stands in for a trained network: makes everything a tenth smaller and notes what it is called with."""

    def __init__(self, config=SMALL):
        super().__init__(config)
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x.shape[1], t.tolist()))
        return 0.9 * x[:, :1]


@pytest.fixture(scope="module")
def hu():
    return np.stack([body(SIZE, seed) for seed in (1, 2)])


def checkpoint(path, config=SMALL, **about):
    """A checkpoint of an untrained network whose header says `about`."""
    torch.manual_seed(0)
    save_checkpoint(path, UNet(config).state_dict(), config, about)
    return path


def test_a_scan_is_reconstructed_by_five_lines():
    """With the shipped weights, of a sample slice, from 36 views."""
    r = Reconstructor.from_checkpoint("tiny", device="cpu")
    x0 = r.degrade.full(hu_to_mu(torch.from_numpy(np.load(SLICE)).float())[None, None])
    y = r.simulate(mu_to_hu(x0)[0], views=36)
    x0_hat, calls = r.run("sequential", y)
    psnr = score(x0_hat, x0, *WINDOWS[0])["psnr"].item()
    assert psnr > 42 and psnr == pytest.approx(42.38, abs=0.03) and calls == [8]


def test_the_shipped_checkpoint_says_how_it_works():
    r = Reconstructor.from_checkpoint("tiny", device="cpu")
    assert (r.protocol, r.dc, r.precision, r.published_levels, r.device) == ("cvg", ITERATIONS, "fp32", LEVELS, "cpu")
    assert r.mirror and not Reconstructor.from_checkpoint("tiny", mirror=False).mirror
    assert r.chain(24) == multiples(24) and r.path.name == "tiny.safetensors" and r.header["preset"] == "real"
    assert not r.network.training and r.multiple == 16 and not r.degrade.official
    plain = Reconstructor.from_checkpoint("tiny", device="cpu", dc=0, levels=(72, 288))
    assert plain.dc == 0 and plain.chain(24) == (288, 72, 24)


def test_a_simulated_measurement_is_the_projection_of_the_slices(hu):
    mu = hu_to_mu(torch.from_numpy(hu).float())[:, None]
    for protocol in ("cvg", "cvg-official"):
        r = Reconstructor(scanner=PublishedScanner(0.3), protocol=protocol)
        y = r.simulate(hu, views=18)
        assert torch.equal(y, Degradation(PublishedScanner(0.3)).project(mu, 18)), "projected once in either protocol"
        assert torch.equal(r.simulate(hu[1], views=18), y[1:]) and torch.equal(r.simulate(torch.from_numpy(hu), 18), y)


def test_what_a_network_was_trained_for_comes_from_its_header(tmp_path, hu):
    """Levels, protocol and data consistency; a keyword says otherwise."""
    path = checkpoint(tmp_path / "a.safetensors", levels=(360, 120, 40), protocol="cvg-official",
                      training={"preset": {"dc": 8}})
    r = Reconstructor.from_checkpoint(path, device="cpu")
    assert (r.published_levels, r.protocol, r.dc) == ((360, 120, 40), "cvg-official", ITERATIONS)
    assert r.mirror
    assert r.chain(60) == (360, 120, 60) and r.degrade.official
    other = Reconstructor.from_checkpoint(path, device="cpu", protocol="cvg", dc=3, levels=(90, 200))
    assert (other.protocol, other.dc, other.chain(60)) == ("cvg", 3, (200, 90, 60)) and not other.degrade.official
    plain = Reconstructor.from_checkpoint(checkpoint(tmp_path / "b.safetensors"), device="cpu")
    assert (plain.published_levels, plain.protocol, plain.dc) == (LEVELS, "cvg", 0)
    assert not plain.mirror, "as published"
    assert plain.chain(60) == levels_for(60)


def test_the_network_is_told_the_levels_of_its_own_header(hu):
    network = Watched()
    r = Reconstructor(network, published_levels=(360, 120, 40))
    x0_hat, calls = r.run("sequential", r.simulate(hu[0], views=40))
    assert [t for _, t in network.seen] == [[2.0], [1.0], [0.0]] and calls == [3]
    network.seen.clear()
    Reconstructor(network).run("sequential", r.simulate(hu[0], views=40))
    assert [t for _, t in network.seen] == [[float(t)] for t in (6, 5, 4, 3, 2, 1, 0)], "40 views are nearest to 36"


@pytest.mark.parametrize("about, text", [
    ({"geometry": PUBLISHED | {"det_spacing": 1}}, "trained with another geometry.*'det_spacing': 1"),
    ({"geometry": PUBLISHED | {"source_distance": 900}}, "'source_distance': 900.*this version simulates"),
    ({"full_views": 1440}, "trained with another full_views: 1440; this version simulates 720"),
    ({"levels": [18, 36]}, "names the levels .*; expected view counts, densest first"),
    ({"levels": [36, 36, 18]}, "densest first"), ({"levels": [36, "18"]}, "densest first"), ({"levels": []}, "levels"),
    ({"levels": [36, 0]}, "levels"), ({"levels": 18}, "levels"), ({"protocol": "other"}, "does not say how")])
def test_weights_of_another_scanner_truth_or_chain_are_refused(tmp_path, about, text):
    path = checkpoint(tmp_path / "a.safetensors", **about)
    with pytest.raises(InputError, match=text):
        Reconstructor.from_checkpoint(path, device="cpu")


def test_a_wrong_keyword_is_refused(tmp_path):
    for keyword, text in (({"protocol": "paper"}, "expected cvg or cvg-official"),
                          ({"precision": "fp16"}, "fp32 or bf16")):
        with pytest.raises(InputError, match=text):
            Reconstructor.from_checkpoint("tiny", device="cpu", **keyword)
    with pytest.raises(InputError, match="does not exist"):
        Reconstructor.from_checkpoint(tmp_path / "none.safetensors")


def test_a_method_that_cannot_run_is_refused_before_anything_is_computed():
    anchored = UNetConfig(width=32, channels=2, residual_channel="anchored")
    two_pass = UNetConfig(width=32, channels=2, residual_channel="two-pass")
    y = torch.zeros(1, 1, 18, 84)
    for r, method, text in (
            (Reconstructor(UNet(SMALL)), "spd", "no method spd; expected one of fbp"),
            (Reconstructor(), "spdps", "spdps needs a network; give a checkpoint, or choose fbp"),
            (Reconstructor(UNet(SMALL)), "reco", "two-pass residual channel"),
            (Reconstructor(UNet(anchored)), "reco", "two-pass residual channel")):
        with pytest.raises(InputError, match=text):
            r.check(method)
        with pytest.raises(InputError, match=text):
            r.run(method, y)
    for method in SAMPLERS:
        Reconstructor(UNet(two_pass)).check(method)


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_need_no_network(method, hu):
    r, options = Reconstructor(), {"iterations": 3} if method in ("sirt", "tv") else {}
    y = r.simulate(hu, views=36)
    x0_hat, calls = r.run(method, y.clone().requires_grad_(), **options)
    assert torch.equal(x0_hat, BASELINES[method].run(r.degrade, y, SIZE, **options)) and calls == [0, 0]
    assert not x0_hat.requires_grad, "nothing is kept for gradients"


def test_consistency_follows_every_call_and_the_update_follows_consistency(hu):
    """With it x_s = D(x0_hat, n_s), so sequential is naive; without, the published shift."""
    without, with_dc = (Reconstructor(Watched(), dc=dc) for dc in (0, 6))
    y = without.simulate(hu, views=36)
    assert torch.equal(with_dc.run("sequential", y)[0], with_dc.run("naive", y)[0])
    assert not torch.equal(without.run("sequential", y)[0], without.run("naive", y)[0])
    x_T, every = with_dc.degrade.fbp(y, SIZE), range(2)
    x0_hat = (0.9 * x_T).clamp(*map(hu_to_mu, HU_RANGE))
    torch.testing.assert_close(without.run("one-step", y)[0], x0_hat)
    torch.testing.assert_close(with_dc.run("one-step", y)[0], data_consistency(with_dc.degrade, y, 6)(x0_hat, every))
    noisy = with_dc.run("one-step", y, photons=1e3, electronic=5.0)[0]
    torch.testing.assert_close(noisy, data_consistency(with_dc.degrade, y, 6, 1e3, 5.0)(x0_hat, every))
    assert not torch.allclose(noisy, with_dc.run("one-step", y)[0], atol=1e-4)


def test_only_the_published_procedure_leaves_estimates_as_they_are(hu):
    bright = Reconstructor().simulate(np.full_like(hu[0], 3071), views=36) * 2
    lowest, highest = map(hu_to_mu, HU_RANGE)
    clipped, free = (Reconstructor(Watched(), protocol=p).run("one-step", bright)[0] for p in ("cvg", "cvg-official"))
    assert free.max() > highest and torch.equal(clipped, free.clamp(lowest, highest))


@pytest.mark.parametrize("method", SAMPLERS)
def test_calls_are_those_of_the_network_and_the_callback_sees_each(method, hu):
    config = UNetConfig(width=32, channels=2, residual_channel="two-pass" if method == "reco" else "anchored")
    network, shown = Watched(config), []
    r = Reconstructor(network, dc=2)
    x0_hat, calls = r.run(method, r.simulate(hu, views=72), callback=lambda slices, n_t, x0_hat: shown.extend(slices))
    assert len(network.seen) == sum(calls), "on a CPU a call is one slice's"
    assert [shown.count(i) for i in range(2)] == calls
    assert x0_hat.shape == (2, 1, SIZE, SIZE) and not x0_hat.requires_grad
    assert {channels for channels, _ in network.seen} == ({1} if method == "one-step" else {1, 2})


def test_options_reach_their_method(hu):
    r = Reconstructor(Watched())
    y = r.simulate(hu, views=36)
    calls = [r.run("spdps", y, similarity=lambda a, b: torch.ones(len(a)), semantic_budget=n)[1] for n in (1, 2)]
    assert calls == [[6, 6], [8, 8]]
    with pytest.raises(TypeError, match="tau"):
        r.run("sequential", y, tau=0.9)


def test_bf16_is_the_networks_alone(hu):
    full, half = (Reconstructor.from_checkpoint("tiny", device="cpu", precision=p, dc=0) for p in ("fp32", "bf16"))
    y = full.simulate(hu, views=36)
    (a, _), (b, _) = full.run("one-step", y), half.run("one-step", y)
    assert a.dtype == b.dtype == torch.float32 and 0 < (a - b).norm() < 0.02 * a.norm()
    assert torch.equal(full.run("fbp", y)[0], half.run("fbp", y)[0])


def test_a_published_file_gives_one_image_through_every_door(data, tmp_path, call):
    """test.py, reconstruct.py and Reconstructor: the file's own protocol, with the pass R inside D and unclipped."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(width=32))
    with torch.no_grad():
        network.conv_out.weight *= 30  # estimates far beyond what HU can be
    weights = {"denoise_fn." + name: value for name, value in network.state_dict().items()}
    torch.save({"net_param": weights, "epoch": 1}, tmp_path / "net.pkl")
    r = Reconstructor.from_checkpoint(tmp_path / "net.pkl", device="cpu")
    hu = np.load(data / "test_img" / "D_000.npy")
    x0 = r.degrade.full(hu_to_mu(torch.from_numpy(hu).float())[None, None])
    expected = mu_to_hu(r.run("sequential", r.degrade.project(x0, 54))[0])[0, 0].numpy()
    assert expected.min() < -2000 and expected.max() > 4000, "clipped estimates would not do this"

    call(evaluation.main, "--data", data, "--checkpoint", tmp_path / "net.pkl", "--views", 54, "--methods",
         "sequential", "--save-images", "--device", "cpu", "--out", tmp_path / "out")
    np.testing.assert_allclose(np.load(tmp_path / "out/images/sequential_54views/D_000.npy"), expected, rtol=1e-4,
                               atol=0.1)
    np.save(tmp_path / "slice.npy", hu)
    call(reconstruct.main, tmp_path / "slice.npy", "--checkpoint", tmp_path / "net.pkl", "--views", 54, "--method",
         "sequential", "--size", 32, "--format", "npy", "--device", "cpu", "--out", tmp_path / "rec")
    expected = mu_to_hu(r.run("sequential", r.simulate(hu, 54))[0])[0, 0].clamp(-1024, 3071).round().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "rec/volume.npy")[0], expected, atol=1)
    clipped, _ = replace(r, protocol="cvg").run("sequential", r.simulate(hu, 54))
    assert np.abs(mu_to_hu(clipped)[0, 0].numpy() - expected).max() > 100, "the other protocol gives another image"


@pytest.mark.parametrize(("protocol", "dc", "calls"), [("cvg", 0, 8), ("cvg-official", 0, 16), ("cvg-official", 2, 8)])
def test_only_the_published_protocol_goes_on_below_level_0(protocol, dc, calls):
    """With data consistency there is nothing published to repeat."""
    r = Reconstructor(Watched(), protocol=protocol, dc=dc)
    y = r.simulate(body(SIZE, 0), 18)
    assert r.run("spdps", y, similarity=lambda a, b: torch.zeros(len(a)))[1] == [calls]
