"""The network against the published names, shapes and reference outputs."""

import json
import re
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import unet
from models.dropout import seed_dropout
from models.presets import PRESETS
from models.reconstructor import Reconstructor
from models.unet import UNet, UNetConfig, to_bf16
from utils.metrics import score
from utils.units import WINDOWS, hu_to_mu

GOLDEN = Path(__file__).parent / "golden"


def with_known_weights(config: UNetConfig) -> UNet:
    """Weights that anyone can regenerate from the parameters' names."""
    network = UNet(config)
    state = {}
    for name, value in network.state_dict().items():
        a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape)).astype(np.float32)
        if a.ndim > 1:
            a = a / np.sqrt(np.prod(a.shape[1:]))
        else:
            a = 1 + 0.1 * a if name.endswith("weight") else 0.1 * a
        state[name] = torch.from_numpy(a.astype(np.float32))
    network.load_state_dict(state)
    return network.eval()


def test_names_and_shapes_are_the_published_ones():
    network = UNet(UNetConfig())
    expected = json.loads((GOLDEN / "unet_keys_ch128.json").read_text())
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == expected
    assert sum(p.numel() for p in network.parameters()) == 34_423_297


@pytest.mark.parametrize(("width", "t"), [(32, 0), (32, 3), (32, 7), (128, 3)])
def test_outputs_are_the_reference_ones(width, t):
    x = np.random.default_rng(7).standard_normal((1, 1, 256, 256)) * 0.05 + 0.15
    expected = torch.from_numpy(np.load(GOLDEN / f"unet_out_ch{width}.npz")[f"ch{width}_t{t}"])
    with torch.no_grad():
        found = with_known_weights(UNetConfig(width=width))(torch.from_numpy(x.astype(np.float32)), torch.tensor([t]))
    assert (found[0, 0] - expected).norm() / expected.norm() <= 1e-4


def test_options_keep_shape_and_zero_init_is_the_identity():
    config = UNetConfig(width=32, stem=2, residual=True, shift=0.1, scale=0.1, zero_init=True)
    x = torch.rand(2, 1, 48, 64)
    assert torch.equal(UNet(config).eval()(x, torch.tensor([3, 5])), x)


def test_input_scaling_is_a_change_of_units():
    x, t = torch.rand(1, 1, 32, 32) * 0.2, torch.tensor([2])
    plain = with_known_weights(UNetConfig(width=32))
    scaled = with_known_weights(UNetConfig(width=32, shift=0.1, scale=0.1))
    torch.testing.assert_close(scaled(x, t), 0.1 + 0.1 * plain((x - 0.1) / 0.1, t))


def test_slices_of_a_batch_do_not_mix():
    network = with_known_weights(UNetConfig(width=32, stem=2))
    x, t = torch.rand(3, 1, 32, 32), torch.tensor([7, 0, 3])
    alone = torch.cat([network(x[i:i + 1], t[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(network(x, t), alone, rtol=1e-4, atol=1e-5)


def test_a_size_the_network_cannot_take_is_refused():
    with pytest.raises(ValueError, match="divisible by 16"):
        UNet(UNetConfig(width=32, stem=2))(torch.rand(1, 1, 40, 40), torch.tensor([0]))


def test_a_residual_channel_that_is_not_given_is_zero():
    network = with_known_weights(UNetConfig(width=32, stem=2, channels=2, shift=0.1, scale=0.1, residual=True))
    x, e, t = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32), torch.tensor([2, 5])
    alone, zero, other = (network(torch.cat([x, *more], dim=1), t) for more in ((), (0 * e,), (e,)))
    assert torch.equal(alone, zero) and (alone - other).abs().max() > 1e-4 and alone.shape == x.shape
    with pytest.raises(ValueError, match="has 2 channels; this network takes 1"):
        with_known_weights(UNetConfig(width=32))(torch.cat([x, e], dim=1), t)


class Launches(TorchDispatchMode):
    """Operators that reach a device, views left out, and what they were given and gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
        if operator.namespace != "prim" and not is_view:
            self.calls.append((operator._schema.name, result))
        return result

    def activations(self):
        """(operator, result) of those whose result is the activations of a batch of BATCH slices."""
        return [(name, r) for name, result in self.calls for r in (result if isinstance(result, tuple) else (result,))
                if isinstance(r, torch.Tensor) and r.ndim == 4 and r.shape[0] == BATCH and r.shape[1] >= 32]


BATCH = 3  # no layer has so many channels: activations are told from weights by it
COPIES = ("aten::_to_copy", "aten::clone", "aten::copy_", "aten::contiguous")
TINY = PRESETS["tiny"].network()
SMALL = PRESETS["small"].network()
BASE = PRESETS["base"].network()


@contextmanager
def as_on_a_gpu(network: UNet):
    """The network as a GPU runs it in bf16, on tensors without values: (x, t) and, if it is told them, photons.

    Asking for a value raises. They are fake CPU tensors with the kernels chosen: without a GPU, PyTorch gives fake CUDA
    convolutions other layouts than they have, and no backward pass.
    """
    norm = pytest.importorskip("models.norm", reason="Triton is not installed")
    network.to(memory_format=torch.channels_last)
    with (pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True),
          torch.autocast("cpu", torch.bfloat16)):
        patch.setattr(unet, "_fused", lambda x: norm)
        told = (torch.zeros(BATCH), torch.ones(BATCH)) if network.config.told_photons else (torch.zeros(BATCH),)
        yield torch.zeros(BATCH, network.config.channels, 48, 48), *told


@pytest.mark.parametrize(("config", "training", "evaluation"), [(TINY, 387, 258), (UNetConfig(dropout=0.0), 385, 256)])
def test_one_call_dispatches_so_many_operators(config, training, evaluation):
    """46 of them are norms, of three launches each. In training, 130 others round weights to bf16."""
    network = UNet(config).train()
    for count in (training, evaluation):
        with as_on_a_gpu(network) as inputs, torch.set_grad_enabled(network.training), Launches() as launches:
            network(*inputs)
        assert len(launches.calls) <= count
        assert re.search(rf"\b{count}\b", (ROOT / "docs/performance.md").read_text(encoding="utf-8"))
        to_bf16(network.eval())


@pytest.mark.parametrize("config", [SMALL, BASE, UNetConfig()])
def test_no_layer_changes_the_layout_or_the_type_of_images(config):
    network = UNet(config)
    with as_on_a_gpu(network) as inputs:
        with Launches() as forward:
            x0_hat = network(*inputs)
        with Launches() as backward:
            torch.autograd.grad(x0_hat.sum(), list(network.parameters()))
    found = forward.activations()
    assert len(found) > 100
    assert {r.dtype for _, r in found} == {torch.bfloat16}
    assert all(r.is_contiguous(memory_format=torch.channels_last) for _, r in found + backward.activations())
    assert not [name for name, _ in found if name in COPIES]
    cut = [name for name, _ in backward.activations() if name in COPIES]
    assert len(cut) <= 9, "only the gradient of a concatenation is cut, once for each block that one follows"


def test_neither_pass_waits_for_the_host():
    """Dropout's masks of each slice included. Whoever asks for a value of a fake tensor gets an error."""
    network = UNet(UNetConfig(width=32, dropout=0.1)).train()
    seed_dropout(network, [(1, 2, i) for i in range(BATCH)])
    with as_on_a_gpu(network) as inputs:
        loss = network(*inputs).square().sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with pytest.raises(DataDependentOutputException):
            loss.item()
    assert all(g.shape == p.shape and g.dtype == p.dtype for g, p in zip(gradients, network.parameters(), strict=True))


def test_weights_rounded_once_give_the_same_bits_as_those_rounded_in_every_call():
    network, x, t = with_known_weights(TINY), torch.rand(1, 2, 32, 32), torch.tensor([2.0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(x, t)
        assert torch.equal(to_bf16(network)(x, t), expected)
    assert network.conv_in.weight.dtype == torch.bfloat16 and network.norm_out.weight.dtype == torch.float32


def kernels_arithmetic() -> SimpleNamespace:
    """What models/norm.py computes, in PyTorch: float32 inside, the images' own type outside."""
    def group_norm(x, weight, bias, eps, *, silu=False, shift=None):
        h = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
        h = F.group_norm(h, 32, weight, bias, eps)
        return (F.silu(h) if silu else h).to(x.dtype)

    def add(x, h, bias):
        return (x.float() + h.float() + bias.float()[None, :, None, None]).to(x.dtype)

    return SimpleNamespace(group_norm=group_norm, add=add)


def test_bf16_keeps_the_psnr_of_the_shipped_weights(monkeypatch):
    hu = np.load(ROOT / "datasets/sample/test_img/LIDC-IDRI-0001_074.npy")
    psnr = {}
    for case in ("fp32", "bf16", "bf16 as on a GPU"):
        r = Reconstructor.from_checkpoint("tiny", device="cpu", precision=case.split()[0])
        if case.endswith("GPU"):
            monkeypatch.setattr(unet, "_fused", lambda x: kernels_arithmetic())
            to_bf16(r.network)
        x0_hat, _ = r.run("sequential", r.simulate(hu, views=36))
        x0 = r.degrade.full(hu_to_mu(torch.from_numpy(hu).float())[None, None])
        psnr[case] = score(x0_hat, x0, *WINDOWS[0])["psnr"].item()
    assert psnr["fp32"] > 40
    assert all(abs(value - psnr["fp32"]) <= 0.02 for value in psnr.values()), psnr
