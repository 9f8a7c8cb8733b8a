"""What a network costs, against numbers known otherwise."""

import pytest
import torch

from models.cost import cost
from models.presets import PRESETS
from models.unet import UNet, UNetConfig


def test_the_published_network_has_34_million_parameters_and_732_gflop():
    parameters, flops, kept = cost(UNetConfig(), 256, "fp32")
    assert parameters == 34_423_297 and flops == pytest.approx(732e9, rel=1e-3)
    assert cost(UNetConfig(), 128, "fp32")[2] == pytest.approx(kept / 4, rel=0.05)
    assert cost(UNetConfig(), 256, "bf16")[2] < 0.6 * kept


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_parameters_are_those_of_the_network(name):
    config = PRESETS[name].network()
    with torch.device("meta"):
        network = UNet(config)
    assert cost(config, 64, "fp32")[0] == sum(p.numel() for p in network.parameters())
