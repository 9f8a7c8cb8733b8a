"""Checkpoints: the published form, our own, names and addresses, and what must never be run."""

import hashlib
import os
import pickle
import pickletools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from test_unet import GOLDEN, with_known_weights

from models import convert, weights
from models.checkpoint import infer_config, load_checkpoint, save_checkpoint
from models.unet import UNet, UNetConfig
from models.weights import find_checkpoint
from utils.errors import InputError
from utils.files import hash16

SMALL = UNetConfig(width=32)


def published(path, network, prefix="denoise_fn.", zipped=True, **changes):
    """A file in the published form."""
    weights = {prefix + name: value for name, value in network.state_dict().items()} | changes
    torch.save({"net_param": weights, "epoch": 39}, path, _use_new_zipfile_serialization=zipped)
    return path


def test_a_published_file_gives_the_reference_outputs(tmp_path, call):
    network, header = load_checkpoint(published(tmp_path / "net.pkl", with_known_weights(SMALL)))
    assert header["protocol"] == "cvg-official" and header["epoch"] == 39 and network.config == SMALL
    x = np.random.default_rng(7).standard_normal((1, 1, 256, 256)) * 0.05 + 0.15
    expected = torch.from_numpy(np.load(GOLDEN / "unet_out_ch32.npz")["ch32_t7"])
    with torch.no_grad():
        found = network(torch.from_numpy(x.astype(np.float32)), torch.tensor([7]))
    assert (found[0, 0] - expected).norm() / expected.norm() <= 1e-4

    for name, form in {"ddp": {"prefix": "module.denoise_fn."}, "legacy": {"zipped": False}}.items():
        same, _ = load_checkpoint(published(tmp_path / f"{name}.pkl", network, **form))
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True))

    out = tmp_path / "new" / "net.safetensors"
    assert "protocol cvg-official" in call(convert.main, tmp_path / "net.pkl", out)
    same, header = load_checkpoint(out)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True))
    assert header["protocol"] == "cvg-official" and header["converted_from"] == "net.pkl"
    half = tmp_path / "half.safetensors"
    call(convert.main, out, half, "--half")
    assert half.stat().st_size < 0.6 * out.stat().st_size
    rounded = {name: value.half().float() for name, value in load_checkpoint(out)[0].state_dict().items()}
    torch.testing.assert_close(dict(load_checkpoint(half)[0].state_dict()), rounded, rtol=0, atol=0)
    assert "exists" in call(convert.main, tmp_path / "net.pkl", out, expect=1)
    assert "ends in .safetensors" in call(convert.main, tmp_path / "net.pkl", tmp_path / "net.bin", expect=1)


def test_the_mean_of_checkpoints_knows_what_all_of_them_saw(tmp_path, call):
    first, second, other = (with_known_weights(config) for config in (SMALL, SMALL, replace(SMALL, blocks=1)))
    with torch.no_grad():
        for p in second.parameters():
            p.add_(1)
    for name, network, patients in (("a", first, "0123456789"), ("b", second, "abcdefabcd"), ("c", other, "")):
        save_checkpoint(tmp_path / f"{name}.safetensors", network.state_dict(), network.config,
                        {"traces": {"patients": patients, "slices": "", "complete": name != "c"}, "images": 7})
    out = tmp_path / "mean.safetensors"
    call(convert.main, tmp_path / "a.safetensors", out, "--mean-with", tmp_path / "b.safetensors")
    mean, header = load_checkpoint(out)
    for one, p in zip(mean.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(one, p + 0.5)
    assert header["traces"] == {"patients": "0123456789abcdefabcd", "slices": "", "complete": True}
    assert header["images"] == 7 and header["mean_of"] == [hash16(tmp_path / f"{n}.safetensors") for n in "ab"]
    assert "different architectures" in call(convert.main, tmp_path / "a.safetensors", tmp_path / "x.safetensors",
                                             "--mean-with", tmp_path / "c.safetensors", expect=1)


def test_weights_of_the_published_architecture_go_back_to_the_published_code(tmp_path, call):
    """{"net_param": {"denoise_fn." + name: value}, "epoch": n}, and the very bits."""
    network = with_known_weights(SMALL)
    save_checkpoint(tmp_path / "net.safetensors", network.state_dict(), SMALL, {})
    assert "Written" in call(convert.main, tmp_path / "net.safetensors", tmp_path / "net.pkl")
    found = torch.load(tmp_path / "net.pkl", weights_only=True)
    assert set(found) == {"net_param", "epoch"} and isinstance(found["epoch"], int)
    expected = {"denoise_fn." + name: value for name, value in network.state_dict().items()}
    assert list(found["net_param"]) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found["net_param"].items())
    again, header = load_checkpoint(tmp_path / "net.pkl")
    assert again.config == SMALL and header["protocol"] == "cvg-official"
    assert "no network like" in call(convert.main, "tiny", tmp_path / "tiny.pkl", expect=1)
    assert not (tmp_path / "tiny.pkl").exists()


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_hostile_pickle_runs_nothing(form, tmp_path):
    path, marker = tmp_path / "net.pkl", tmp_path / "marker"
    content = {"net_param": {"denoise_fn.conv_in.weight": Hostile(marker)}, "epoch": 0}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match="nothing in it was run"):
        load_checkpoint(path)
    assert not marker.exists()
    if form == "pickle":
        assert "REDUCE" in {code.name for code, *_ in pickletools.genops(path.read_bytes())}, "it would call mkdir"


def test_weights_that_do_not_fit_are_named(tmp_path):
    network = UNet(SMALL)
    path = published(tmp_path / "net.pkl", network, **{"denoise_fn.extra.weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"1 not known \(extra.weight\).*look like UNetConfig\(width=32"):
        load_checkpoint(path)
    state = network.state_dict()
    del state["mid.attn_1.q.bias"], state["norm_out.weight"]
    torch.save({"net_param": state}, path)
    with pytest.raises(InputError, match=r"2 missing \(mid.attn_1.q.bias, norm_out.weight\)"):
        load_checkpoint(path)
    save_checkpoint(tmp_path / "net.safetensors", network.state_dict(), UNetConfig(width=64), {})
    with pytest.raises(InputError, match=r"64-channel.*of another shape.*look like UNetConfig\(width=32"):
        load_checkpoint(tmp_path / "net.safetensors")
    other = UNetConfig(width=32, multipliers=(1, 2), blocks=1, stem=2, channels=2)
    assert infer_config(UNet(other).state_dict()) == other
    assert infer_config({"conv_in.weight": torch.zeros(3)}) is None


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "not a whole PyTorch file"), (b"PK\x03\x04 cut short", "not a whole PyTorch file"),
    (b"just text", "not a whole PyTorch file"), ([1, 2], "no weights under net_param"),
    ({"net_param": {"a": 1}}, "no weights under net_param"), ({"net_param": {1: torch.ones(1)}}, "no weights under"),
    ({"net_param": {"conv_in.weight": torch.ones(32, 1, 3, 3), "conv_out.weight": torch.tensor(1.0),
                    "down.0.block.0.norm2.weight": torch.ones(32)}}, "like no U-Net of ours")])
def test_other_files_get_a_sentence(content, sentence, tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(path)


def test_a_damaged_or_unfinished_file_is_refused(tmp_path):
    path, config = tmp_path / "net.safetensors", UNetConfig(width=32, multipliers=(1,), blocks=1)
    weights = UNet(config).state_dict()
    save_checkpoint(path, weights, config, {"preset": "tiny"})
    whole, rng = path.read_bytes(), random.Random(0)
    load_checkpoint(path)
    for _ in range(100):
        bit = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            load_checkpoint(path)
    weights["conv_out.bias"] = weights["conv_out.bias"] * float("nan")
    save_checkpoint(path, weights, config, {})
    with pytest.raises(InputError, match=r"not finite \(conv_out.bias\)"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", [
    {"network": 5}, {"network": {"width": 102400, "multipliers": [1]}}, {"network": {"blocks": 10**9,
     "multipliers": [1]}}, {"network": {"multipliers": [1], "shift": "x"}}, {"network": {"multipliers": 3}},
    {"training": []}, {"levels": {"a": 1}}, {"training": {"preset": 1}}])
def test_a_header_of_other_values_is_refused_at_once(change, tmp_path):
    path, network = tmp_path / "net.safetensors", UNet(UNetConfig(width=32, multipliers=(1,), blocks=1))
    save_checkpoint(path, network.state_dict(), network.config, change)
    with pytest.raises(InputError):
        load_checkpoint(path)


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes there")
def test_a_checkpoint_can_be_read_by_whom_the_user_lets(tmp_path):
    path, network = tmp_path / "net.safetensors", UNet(UNetConfig(width=32, multipliers=(1,), blocks=1))
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            save_checkpoint(path, network.state_dict(), network.config, {})
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


def test_a_known_name_is_the_file_that_was_published(tmp_path, monkeypatch):
    """`tiny` has the SHA-256 of its model card, and nothing else goes by its name."""
    file, digest = weights.KNOWN["tiny"]
    assert find_checkpoint("tiny") == Path(file) and digest in (ROOT / "docs" / "model-card.md").read_text()
    other = tmp_path / "tiny.safetensors"
    other.write_bytes(Path(file).read_bytes()[:-1] + b"x")
    monkeypatch.setitem(weights.KNOWN, "tiny", (str(other), digest))
    with pytest.raises(InputError, match=f"is not {digest}"):
        find_checkpoint("tiny")
    assert find_checkpoint(str(other)) == other


def test_names_and_addresses(tmp_path):
    assert load_checkpoint(find_checkpoint("tiny"))[1]["preset"] == "real"
    for wrong, sentence in {"huge": "one of tiny, cvg-diff", "hf://owner/net.pkl": "hf://owner/repository/file"}.items():
        with pytest.raises(InputError, match=sentence):
            find_checkpoint(wrong)

    snapshot = tmp_path / "hub" / "models--someone--ct" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--someone--ct" / "refs").mkdir()
    (tmp_path / "hub" / "models--someone--ct" / "refs" / "main").write_text("0123abcd")
    published(snapshot / "net.pkl", UNet(SMALL))
    offline = {"HF_HOME": tmp_path, "HF_HUB_OFFLINE": 1}
    command = ("-m", "models.convert", "hf://someone/ct/net.pkl", tmp_path / "net.safetensors")
    text = run(*command, **{k: str(v) for k, v in offline.items()})
    found = hashlib.sha256((snapshot / "net.pkl").read_bytes()).hexdigest()
    assert "Written" in text and f"hf://someone/ct/net.pkl: revision 0123abcd, SHA-256 {found}." in text
    text = run("-m", "models.convert", "cvg-diff", tmp_path / "other.safetensors", expect=1,
               **{k: str(v) for k, v in offline.items()})
    assert "is not in the Hugging Face cache and could not be downloaded" in text and "give its path" in text
