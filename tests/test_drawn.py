"""Noise and scanners in training: what is drawn, what it does to a measurement, and what the network is told."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import train
from datasets.loader import Part, load_batch
from models.checkpoint import load_checkpoint, save_checkpoint
from models.degradation import Degradation
from models.drawn import (
    FIELD,
    HALF,
    LONGEST,
    SCANNERS,
    SHORT,
    add_noise,
    draw_noise,
    draw_scanner,
    draw_views,
    scanner_number,
)
from models.epct import network_input, start_chain
from models.estimate import denoiser
from models.evaluation import Noise, simulate_measurement
from models.presets import PRESETS
from models.reconstructor import Reconstructor
from models.scanner import PublishedScanner, make_scanner
from models.training import Trainer, build
from models.unet import UNet
from utils.units import pixel_cm

TINY = ROOT / "models" / "tiny.safetensors"
UNIFORM = (np.arange(8000) + 0.5) / 8000
SMALL = replace(PRESETS["real"], noise_share=1.0, scanner_share=1.0, images=8, batch=2, hops=1)


def test_photons_are_log_uniform_for_a_share_of_the_slices():
    preset = replace(PRESETS["real"], noise_share=0.25)
    drawn = [draw_noise(np.array([u, v, w]), preset) for u, v, w in zip(UNIFORM, np.roll(UNIFORM, 700), UNIFORM[::-1],
                                                                        strict=True)]
    noisy = np.array([(photons, electronic) for photons, electronic in drawn if photons < math.inf])
    assert len(noisy) == 2000 and all(electronic == 0 for photons, electronic in drawn if photons == math.inf)
    everywhere = np.log10([draw_noise(np.array([0.0, v, 0.5]), preset)[0] for v in UNIFORM])
    np.testing.assert_allclose(np.quantile(everywhere, [0, 0.5, 1]), [4, 5.5, 7], atol=1e-3)
    assert draw_noise(np.array([0.0, 0.5, 1.0]), preset)[1] == preset.electronic
    assert draw_noise(np.zeros(3), replace(preset, noise_share=0.0)) == (math.inf, 0.0)


def test_noise_has_the_deviation_of_its_photons_and_is_a_function_of_seed_and_sample():
    y = [torch.full((1, 300, 200), 20.0)] * 3
    noise = [(1e5, 0.0), (math.inf, 0.0), (1e4, 30.0)]
    noisy = add_noise(y, noise, 256, 7, range(3))
    assert torch.equal(noisy[1], y[1])
    for found, (photons, electronic) in ((noisy[0], noise[0]), (noisy[2], noise[2])):
        counts = photons * math.exp(-20 * pixel_cm(256))
        assert found.std().item() == pytest.approx(math.sqrt(counts + electronic**2) / counts / pixel_cm(256), rel=0.02)
        assert found.mean().item() == pytest.approx(20, abs=0.02)
    assert torch.equal(add_noise(y[:1], noise[:1], 256, 7, [0])[0], noisy[0]), "whatever else is in the batch"
    others = add_noise(y[:1], noise[:1], 256, 8, [0]) + add_noise(y[:1], noise[:1], 256, 7, [1])
    assert not any(torch.equal(other, noisy[0]) for other in others)


def test_scanners_are_drawn_around_those_that_there_are():
    scanners = [scanner_number(0, k, 36) for k in range(300)]
    assert scanners[5] is scanner_number(0, 5, 36) != scanner_number(1, 5, 36) and len(set(scanners)) == 300
    for scanner in scanners:
        make_scanner(vars(scanner))  # raises where it cannot be
    fans = [s for s in scanners if s.beam == "fan"]
    assert 0.7 < len(fans) / 300 < 0.95, "five of six rows"
    ratios = np.array([s.detector_distance_mm / s.source_distance_mm for s in fans])
    rows = np.array([row[1] / row[0] for row in SCANNERS if row[0]])
    assert (np.abs(np.log(ratios[:, None] / rows)).min(1) < 0.21).all() and len(np.unique(ratios.round(1))) > 3
    for s in fans:
        end = max(-s.ends[0], s.ends[1]) if any(s.padding) else min(-s.ends[0], s.ends[1])
        circle = 2 * s.source_distance_mm * math.sin(math.atan(end / (s.source_distance_mm + s.detector_distance_mm)))
        assert 0.99 * FIELD[0] <= s.field_of_view_mm / circle <= 1.01 * FIELD[1]
        arc = (s.angles[1] - s.angles[0]) * 36
        assert arc == pytest.approx(360) or 180 + 2 * math.degrees(math.asin(
            s.field_of_view_mm / 2 / s.source_distance_mm)) - 1e-9 <= arc <= LONGEST
    shares = [np.mean([s.angles[1] - s.angles[0] < 9.9 for s in fans]), np.mean([any(s.padding) for s in scanners])]
    np.testing.assert_allclose(shares, [SHORT, HALF], atol=0.07)


def test_fbp_of_any_drawn_scan_is_the_image():
    """Whatever arc, side and beam: many views give back the inner field with the values that it has."""
    yy, xx = np.mgrid[0:64, 0:64] - 31.5
    x = torch.tensor(0.2 * (np.hypot(xx - 5, yy + 3) < 20), dtype=torch.float32)[None, None]
    inside = torch.tensor(np.hypot(xx - 5, yy + 3) < 15)
    found = [Degradation(scanner_number(0, k, 288))(x, 288)[0, 0][inside] for k in range(24)]
    assert max((f.mean() - 0.2).abs().item() for f in found) < 0.01 and max(f.std().item() for f in found) < 0.02


def test_the_published_scanner_keeps_its_share():
    preset = replace(PRESETS["real"], scanner_share=0.3)
    drawn = [draw_scanner(np.array([0.9, u, v, 0, 0, 0]), preset, 0) for u, v in zip(UNIFORM[::8], UNIFORM[::-8],
                                                                                      strict=True)]
    assert sum(s == PublishedScanner() for s in drawn) == 700 and len(set(drawn)) > 70
    assert {len(s.angles) for s in drawn if s != PublishedScanner()} == {draw_views(0.9, preset)}
    assert draw_scanner(np.zeros(6), PRESETS["tiny"], 0) == PublishedScanner()


def test_a_batch_has_one_scanner_however_it_is_shared_out():
    mu = torch.rand(9, 1, 16, 16)
    whole, parts = (load_batch(mu, (4, 8), 3, replace(PRESETS["real"], accumulate=n))[1] for n in (1, 4))
    other = load_batch(mu, (4, 8), 3, PRESETS["real"], 1, 2)[1]
    assert all((part.common == whole[0].common).all() for part in parts + other) and len(parts) == 4
    assert [u.tolist() for u in whole[0].uniform] == [part.uniform[0].tolist() for part in parts]
    old = np.random.default_rng([3, 1, 4])
    old.integers(8)
    assert whole[0].uniform[0][:11].tolist() == old.random(11).tolist(), "levels are drawn as before there was noise"


@pytest.mark.parametrize("scanner", [PublishedScanner(), scanner_number(0, 0, 24)])
def test_a_noisy_measurement_is_the_restore_input_and_what_consistency_fits(scanner):
    x0 = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    uniform = [np.array([0.9] + [0.5] * 10 + [0.5, 0.5, quiet, 0.2, 0.5]) for quiet in (0.1, 0.9)]
    preset = replace(PRESETS["real"], noise_share=0.5)
    chain = start_chain(Part(range(2), [0, 1], x0, uniform), Degradation(scanner), preset, "cpu", 5)
    clean = chain.degrade(x0, chain.n_T)
    torch.testing.assert_close(chain.x_T[1], clean[1])
    assert (chain.x_T[0] - clean[0]).std() > 3e-3 and torch.equal(chain.x0, x0), "the truth has no noise"
    photons = preset.fewest_photons * (preset.most_photons / preset.fewest_photons) ** 0.2
    assert network_input(chain, None, preset)[2].tolist() == pytest.approx([photons, math.inf])
    assert len(network_input(chain, None, preset)) == 3
    blind = replace(preset, told_photons=False)
    assert len(network_input(start_chain(chain.part, chain.degrade, blind, "cpu", 5), None, blind)) == 2
    near = x0 + 1e-4 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(chain.dc(near, [0, 1])[0], near[0]), "noise explains what is left: the stopping rule"
    assert not torch.equal(chain.dc(near, [0, 1])[1], near[1]), "and there is none here"


@pytest.fixture
def untold(tmp_path):
    """The shipped weights without what tells the photons, as a checkpoint."""
    network, _, _ = build(PRESETS["tiny"], 0, "cpu", TINY)
    save_checkpoint(tmp_path / "untold.safetensors", network.state_dict(), network.config, {})
    return tmp_path / "untold.safetensors"


def test_weights_give_the_same_to_the_bit_until_the_network_learns_of_photons(untold):
    old, shipped = (load_checkpoint(path)[0] for path in (untold, TINY))
    network, _, _ = build(PRESETS["real"], 0, "cpu", untold)
    network.eval()
    assert shipped.config.told_photons and not old.config.told_photons
    x, t = torch.rand(2, 2, 32, 32) * 0.3, torch.tensor([7.0, 2.5])
    with torch.no_grad():
        assert torch.equal(shipped(x, t), old(x, t)), "without noise photons can be left away"
        for photons in (None, torch.tensor([1e4, math.inf])):
            assert torch.equal(network(x, t, photons), old(x, t))
        torch.nn.init.normal_(network.photons.dense[1].weight, std=0.1)
        told = network(x, t, torch.tensor([1e4, math.inf]))
        assert not torch.equal(told[0], old(x, t)[0]) and torch.equal(told[1], network(x, t)[1])
        assert not torch.equal(network(x, t, torch.tensor([1e6, math.inf]))[0], told[0])
        free = denoiser(network, clip=False)(x, [18, 36])
        torch.testing.assert_close(denoiser(network, clip=False, photons=math.inf)(x, [18, 36]), free)
        assert not torch.allclose(denoiser(network, clip=False, photons=1e4)(x, [18, 36]), free)
    added = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in old.parameters())
    assert 0 < added < 0.01 * sum(p.numel() for p in old.parameters())
    fresh, told = (UNet(replace(PRESETS["tiny"], told_photons=told).network()) for told in (False, True))
    assert fresh.state_dict().keys() < told.state_dict().keys()


def test_training_moves_what_tells_the_photons(untold):
    mu = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    trainer = Trainer(SMALL, seed=0, steps=8, device="cpu", init=untold)
    for first in (0, 2):
        _, parts, weight = load_batch(mu, (first, first + 2), 0, SMALL)
        trainer.update(parts, weight, 0)
    layers = trainer.network.photons.dense
    assert layers[1].weight.abs().max() > 0 and all(p.grad.abs().max() > 0 for p in layers.parameters())


def test_a_run_with_noise_and_scanners_resumes_to_the_bit(data, tmp_path, call):
    def run(out, images):
        return call(train.main, "--preset", "real", "--data", data, "--out", out, "--init", TINY, "--images",
                    images, "--hops", "1", "--batch", "2", "--noise-share", "0.7", "--scanner-share", "0.7",
                    "--save-every", "2", "--val-slices", "1", "--val-every", "1000", "--device", "cpu")

    text = run(tmp_path / "whole", 8)
    assert "1e4 photons" in text and "val18/naive" in text
    whole = load_checkpoint(tmp_path / "whole" / "checkpoint.safetensors")[0].state_dict()
    states = sorted((tmp_path / "whole").glob("state-*.pt"))
    assert len(states) == 2
    states[-1].unlink()  # as if it had been killed before the end
    assert "Resuming" in run(tmp_path / "whole", 8)
    resumed = load_checkpoint(tmp_path / "whole" / "checkpoint.safetensors")[0].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert load_checkpoint(tmp_path / "whole" / "checkpoint.safetensors")[0].config.told_photons


def test_photons_mean_the_same_noise_in_every_field_of_view():
    """A field of half the side, or water half as dense, needs four times the photons for the noise of an image."""
    told = []
    scan = replace(scanner_number(0, 0, 18), size=32)
    for scanner in (scan, replace(scan, field_of_view_mm=scan.field_of_view_mm / 2), replace(scan, water_per_cm=0.096)):
        network = UNet(SMALL.network()).eval()
        network.forward = lambda x, t, photons: told.append(photons.item()) or x[:, :1]
        reconstructor = Reconstructor(network, scanner)
        x0 = torch.full((1, 1, 32, 32), 1e-4)
        y = simulate_measurement(x0, 18, ["a"], reconstructor.degrade, Noise(1e8))
        noise = (y - reconstructor.degrade.project(x0, 18)).std().item()
        reconstructor.run("one-step", y, photons=1e8)
        assert noise == pytest.approx(1 / math.sqrt(1e8) / scanner.pixel_cm(32), rel=0.1)
        assert noise == pytest.approx(1 / math.sqrt(told[-1]) / pixel_cm(32), rel=0.1)
    assert told == pytest.approx([1e8, 0.25e8, 0.25e8])
