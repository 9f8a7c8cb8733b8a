"""Weights and their configuration in one safetensors file: what is published, and what samplers need to run it."""

import json
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.degradation import FULL_VIEWS, LEVELS, level_of
from models.unet import UNet, UNetConfig
from utils.files import atomic
from utils.units import HU_RANGE, hu_to_mu


def save_checkpoint(path: Path, state: dict[str, torch.Tensor], network: UNetConfig, about: dict) -> None:
    """Write weights with their architecture, levels and geometry; `about`: how they were made, JSON values."""
    header = {"network": asdict(network), "levels": LEVELS, "full_views": FULL_VIEWS, "protocol": "cvg",
              "geometry": {"size": 256, "source_distance": 1075, "det_distance": 1075, "det_count": 672,
                           "det_spacing": 2},
              **about}
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic(path) as partial:
        save_file(weights, partial, metadata={"cvg_diff": json.dumps(header)})


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[UNet, dict]:
    """The network in evaluation mode and the header. Exits with a sentence for a file that is no such checkpoint."""
    path = Path(path)
    if not path.is_file():
        sys.exit(f"The checkpoint {path} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("cvg_diff", "null"))
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, struct.error, ValueError, OSError) as error:
        sys.exit(f"{path} is not a whole safetensors file ({error}); copy or download it again.")
    if header is None:
        sys.exit(f"{path} carries no CvG-Diff configuration; expected a file that train.py wrote.")
    try:
        config = UNetConfig(**{**header["network"], "multipliers": tuple(header["network"]["multipliers"])})
    except (TypeError, KeyError) as error:
        sys.exit(f"{path} describes another architecture than this version knows ({error}).")
    network = UNet(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        sys.exit(f"{path} holds weights of another architecture: {len(wrong)} tensors differ, the first is "
                 f"{wrong[0][0]} {list(wrong[0][1])}.")
    network.load_state_dict(state)
    return network.eval().to(device), header


def trained_dc(header: dict) -> int:
    """Iterations of data consistency that a checkpoint's chain was trained with; 0 for one that never saw any."""
    return header.get("training", {}).get("preset", {}).get("dc", 0)


def denoiser(network: UNet, clip: bool = True):
    """denoise(x_t, views) for the samplers: R(x_t, t) with t the published level nearest to each slice's view count.

    clip: keep estimates within what HU can be, [-1024, 3071]. Outside every window's range but for metal, and it keeps
    the errors of a long chain from growing without bound. The published procedure does not.
    """
    lowest, highest = (hu_to_mu(hu) for hu in HU_RANGE)
    device = next(network.parameters()).device

    @torch.no_grad()
    def denoise(x_t, views):
        x0_hat = network(x_t, torch.tensor([level_of(n) for n in views], dtype=torch.float32, device=device))
        return x0_hat.clamp(lowest, highest) if clip else x0_hat

    return denoise
