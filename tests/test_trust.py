"""What images do not owe to their measurement, and intervals that hold what they promise."""

import json
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import torch
from conftest import body
from test_reconstruct import series

import reconstruct
from benchmarks import intervals
from datasets.leakage import traces
from models import train_trust
from models.checkpoint import load_checkpoint, save_checkpoint
from models.degradation import Degradation
from models.presets import PRESETS
from models.reconstructor import Reconstructor
from models.train_trust import conformal_scale, pinball
from models.trust import config, half_widths, load_error_network, scale_at, uncalibrated, undetermined
from models.unet import UNet
from utils.errors import InputError
from utils.files import hash16
from utils.units import hu_to_mu, mu_to_hu


def images(size, count=1):
    return hu_to_mu(torch.from_numpy(np.stack([body(size, i) for i in range(count)])).float())[:, None]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of the preset `real` that nobody trained, as a checkpoint."""
    torch.manual_seed(0)
    preset = replace(PRESETS["real"], val_slices=2, scanner_share=0.0)
    network, path = UNet(preset.network()), tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_checkpoint(path, network.state_dict(), network.config,
                    {"size": 32, "training": {"preset": preset.mathematics()}})
    return path


def test_views_enough_determine_everything():
    x = images(32)
    assert undetermined(Degradation(), x, 720).norm() < 1e-3 * x.norm()
    assert undetermined(Degradation(), x, 4).norm() > 0.1 * x.norm()


def test_what_is_undetermined_is_not_seen_and_adds_nothing_to_itself():
    x, degrade = images(32, 2), Degradation()
    unseen = undetermined(degrade, x, 8)
    assert degrade.project(unseen, 8).norm() < 1e-3 * degrade.project(x, 8).norm()
    assert (undetermined(degrade, unseen, 8) - unseen).norm() < 0.02 * unseen.norm()
    seen = x - unseen
    assert (seen * unseen).sum().abs() < 0.02 * seen.norm() * unseen.norm(), "the least norm: orthogonal to it"
    assert undetermined(degrade, seen, 8).norm() < 0.02 * seen.norm()


def test_pinball_is_least_at_the_quantile():
    error = torch.rand(1, 1, 1, 20_001, generator=torch.Generator().manual_seed(0))
    losses = {q: pinball(error, torch.full_like(error, q), 0.9).item() for q in (0.8, 0.88, 0.9, 0.92, 1.0)}
    assert min(losses, key=losses.get) == 0.9


@pytest.mark.parametrize("count", [10, 999])
def test_a_conformal_scale_covers_its_share_and_no_more_than_a_pixel_beyond(count):
    ratios = torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.1
    covered = (ratios <= conformal_scale(ratios, 0.9)).float().mean().item()
    assert 0.9 <= covered <= 0.9 + 2 / count


def test_scales_are_interpolated_in_logarithms():
    scales = [[18, None, 1.0], [72, None, 3.0], [18, 1e4, 2.0], [72, 1e4, 4.0]]
    assert scale_at(scales, 18, None) == 1 and scale_at(scales, 72, 1e4) == 4
    assert scale_at(scales, 36, None) == pytest.approx(2) and scale_at(scales, 36, 1e6) == pytest.approx(2.5)
    assert scale_at(scales, 5, 1.0) == 2 and scale_at(scales, 700, 1e12) == 3, "the edge counts beyond"


def test_half_widths_are_positive_and_bounded_whatever_the_network_says():
    network = UNet(config()).eval()
    torch.nn.init.constant_(network.conv_out.bias, 1e4)
    x = images(32)
    assert half_widths(network, x, x, [18]).isfinite().all()
    torch.nn.init.constant_(network.conv_out.bias, -1e4)
    assert (half_widths(network, x, x, [18]) > 0).all()


def test_an_error_network_is_made_and_serves_reconstruct(tmp_path, data, weights, call):
    arguments = ("--checkpoint", weights, "--data", data, "--out", tmp_path / "trust", "--samples", 4, "--passes", 2,
                 "--val-slices", 2, "--device", "cpu")
    said = call(train_trust.main, *arguments)
    made = tmp_path / "trust/net-trust.safetensors"
    network, header = load_checkpoint(made)
    assert len(header["scales"]) == 12 and header["of"] == hash16(weights) and "18 views no noise" in said
    samples = sorted((tmp_path / "trust/samples").iterdir())
    before = samples[0].read_bytes()
    samples[1].unlink()
    call(train_trust.main, *arguments)
    again, _ = load_checkpoint(made)
    assert samples[0].read_bytes() == before and samples[1].is_file()
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(),
                                                 strict=True)), "the same seed, the same network"
    checkpoint = tmp_path / "here/net.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(weights.read_bytes())
    (tmp_path / "here/net-trust.safetensors").write_bytes(made.read_bytes())
    table = call(intervals.main, "--data", data, "--checkpoint", checkpoint, "--limit", 2, "--views", 18, "--device",
                 "cpu", "--json", tmp_path / "coverage.json")
    rows = json.loads((tmp_path / "coverage.json").read_text())
    assert [row["photons"] for row in rows] == [None, 1e6, 1e5, 1e4] and "| 18 | 1e+06 |" in table
    assert all(0 <= row["worst"] <= row["coverage"] <= 1 < row["width_hu"] for row in rows)
    series(tmp_path / "in", 2)
    run = (tmp_path / "in", "--views", 18, "--checkpoint", checkpoint, "--trust", "--size", 32, "--device", "cpu")
    call(reconstruct.main, *run, "--out", tmp_path / "npy", "--format", "npy")
    call(reconstruct.main, *run, "--out", tmp_path / "nifti", "--format", "nifti")
    call(reconstruct.main, *run, "--out", tmp_path / "dicom")
    found = {name: np.load(tmp_path / "npy" / f"{name}.npy") for name in ("volume", "undetermined", "half_width")}
    r = Reconstructor.from_checkpoint(checkpoint, device="cpu")
    hu = np.stack([body(32, i) for i in range(2)])
    x0_hat, _ = r.run("spdps", r.simulate(hu, 18))
    unseen, width = undetermined(r.degrade, x0_hat, 18), r.half_width(x0_hat, 18)
    water = mu_to_hu(torch.zeros(1)).item()
    for name, mu, lowest in (("undetermined", unseen, -1024), ("half_width", width, 0)):
        want = (mu_to_hu(mu) - water).clamp(lowest, 3071).numpy()[:, 0]
        assert np.abs(found[name] - want).max() <= 1, name
    assert (found["half_width"] >= want - 1e-3).all(), "rounded up: less would promise too much"
    uids = set()
    for name, folder in (("volume", "."), ("undetermined", "undetermined"), ("half_width", "half_width")):
        files = [pydicom.dcmread(f) for f in sorted((tmp_path / "dicom" / folder).glob("*.dcm"))]
        shown = np.stack([f.pixel_array * f.RescaleSlope + f.RescaleIntercept for f in files])
        np.testing.assert_array_equal(shown, found[name])
        assert (tmp_path / "nifti" / f"{name}.nii.gz").is_file()
        uids |= {f.SeriesInstanceUID for f in files}
    assert len(uids) == 3 and "undetermined" in pydicom.dcmread(
        tmp_path / "dicom/undetermined/slice_0001.dcm").SeriesDescription


def test_without_an_error_network_the_share_alone_is_written_and_it_is_said(tmp_path, weights, call):
    np.save(tmp_path / "in.npy", body(32, 0))
    said = call(reconstruct.main, tmp_path / "in.npy", "--views", 18, "--checkpoint", weights, "--trust", "--size", 32,
                "--format", "npy", "--out", tmp_path / "out", "--device", "cpu")
    assert "models.train_trust" in said and (tmp_path / "out/undetermined.npy").is_file()
    assert not (tmp_path / "out/half_width.npy").exists()


def test_an_error_network_of_other_weights_is_refused(tmp_path, weights, call):
    (tmp_path / "net.safetensors").write_bytes(weights.read_bytes())
    network = UNet(config())
    save_checkpoint(tmp_path / "net-trust.safetensors", network.state_dict(), network.config,
                    {"predicts": "error", "of": "0" * 16, "scales": [[18, None, 1.0]]})
    np.save(tmp_path / "in.npy", body(32, 0))
    run = (tmp_path / "in.npy", "--views", 18, "--size", 32, "--format", "npy", "--out", tmp_path / "out")
    said = call(reconstruct.main, *run, "--trust", "--checkpoint", tmp_path / "net.safetensors", expect=1)
    assert "other weights" in said
    said = call(reconstruct.main, *run, "--checkpoint", tmp_path / "net-trust.safetensors", expect=1)
    assert "predicts errors" in said
    said = call(reconstruct.main, *run, "--trust", "--median-z", 3, "--checkpoint", weights, expect=1)
    assert "--median-z" in said
    said = call(reconstruct.main, *run, "--trust", "--method", "fbp", expect=1)
    assert "--trust" in said


@pytest.mark.parametrize("scales", [
    None, [], [[18, None]], [[float("inf"), None, 1]], [[18, None, 10**400]], [[18, "1e4", 1.0]], [[18, -5, 1]],
    [[18, float("nan"), 1]], [[18, None, 0]], [[18, None, 1], [18, 1e8, 2]], [[18, None, 1], [36, 1e4, 1]]], ids=repr)
def test_scales_that_cannot_be_are_refused_before_the_work(tmp_path, weights, scales):
    (tmp_path / "net.safetensors").write_bytes(weights.read_bytes())
    network = UNet(config())
    save_checkpoint(tmp_path / "net-trust.safetensors", network.state_dict(), network.config,
                    {"predicts": "error", "of": hash16(weights), "scales": scales})
    with pytest.raises(InputError, match="holds no error network"):
        load_error_network(tmp_path / "net.safetensors", "cpu")


def test_what_the_intervals_were_not_calibrated_for_is_said():
    header = {"scales": [[18, None, 1.0], [72, None, 1.0]], "method": "spdps", "dc": 16, "size": 256}
    assert uncalibrated(header, "spdps", 16, 36, 256, None) == ""
    for found, changed in {"--method one-step": ("one-step", 16, 36, 256, None), "--dc 0": ("spdps", 0, 36, 256, None),
                           "90 views": ("spdps", 16, 90, 256, None), "512 pixels": ("spdps", 16, 36, 512, None),
                           "this scanner": ("spdps", 16, 36, 256, object())}.items():
        assert uncalibrated(header, *changed) == found


def test_slices_of_the_training_do_not_calibrate(tmp_path, data, weights, call):
    network, header = load_checkpoint(weights)
    files = sorted((data / "val_img").glob("*.npy"))
    header["traces"] = traces(files[:1], np.load(files[0])[None].astype(np.float32))
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, network.state_dict(), network.config, header)
    said = call(train_trust.main, "--checkpoint", path, "--data", data, "--out", tmp_path / "out", "--samples", 1,
                "--device", "cpu", expect=1)
    assert "1 patients that would calibrate took part" in said


def test_a_baseline_beside_has_no_trust_and_another_trust_is_explained(tmp_path, weights, call):
    np.save(tmp_path / "in.npy", body(32, 0))
    run = (tmp_path / "in.npy", "--views", 18, "--size", 32, "--format", "npy", "--out", tmp_path / "out", "--method",
           "one-step", "fbp", "--checkpoint", weights, "--device", "cpu")
    call(reconstruct.main, *run, "--trust")
    assert (tmp_path / "out/one-step/undetermined.npy").is_file()
    assert not (tmp_path / "out/fbp/undetermined.npy").exists()
    assert "another --trust" in call(reconstruct.main, *run, expect=1)
