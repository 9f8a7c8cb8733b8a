"""The network against the published names, shapes and reference outputs."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models.unet import UNet, UNetConfig

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
