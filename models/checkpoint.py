"""Weights and their configuration: our safetensors files, CvG-Diff's published pickles, and where to find both."""

import json
import math
import pickle
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.consistency import ITERATIONS
from models.degradation import FULL_VIEWS, LEVELS, condition
from models.unet import UNet, UNetConfig
from utils.files import atomic
from utils.units import HU_RANGE, hu_to_mu

KNOWN = {"tiny": str(Path(__file__).parent / "tiny.safetensors"),
         "cvg-diff": "hf://HajihajihaJimmy/CvG-Diff/CvG-Diff-net-colddiff_best_epoch.pkl"}


def _header(network: UNetConfig, about: dict) -> dict:
    return {"network": asdict(network), "levels": LEVELS, "full_views": FULL_VIEWS, "protocol": "cvg",
            "geometry": {"size": 256, "source_distance": 1075, "det_distance": 1075, "det_count": 672,
                         "det_spacing": 2},
            **about}


def save_checkpoint(path: Path, state: dict[str, torch.Tensor], network: UNetConfig, about: dict) -> None:
    """Write weights with their architecture, levels and geometry; `about`: how they were made, JSON values."""
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic(path) as partial:
        save_file(weights, partial, metadata={"cvg_diff": json.dumps(_header(network, about))})


def find_checkpoint(name: str) -> Path:
    """The file of a name in KNOWN, of hf://owner/repository/file (downloaded once, then from the cache), or of a path.

    Exits with a sentence where there is none.
    """
    name = KNOWN.get(name, name)
    if not name.startswith("hf://"):
        if not Path(name).is_file():
            sys.exit(f"The checkpoint {name} does not exist; expected a file, hf://owner/repository/file, or one of "
                     f"{', '.join(KNOWN)}.")
        return Path(name)
    owner, _, rest = name.removeprefix("hf://").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        sys.exit(f"--checkpoint {name}: expected hf://owner/repository/file.")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    try:
        cached = try_to_load_from_cache(f"{owner}/{repository}", file)
        if isinstance(cached, str):
            return Path(cached)
        print(f"Downloading {name} into the Hugging Face cache.", file=sys.stderr)
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except (OSError, ValueError) as error:  # what its HTTP, offline, missing-file and bad-name errors have in common
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"{name} is not in the Hugging Face cache and could not be downloaded ({type(error).__name__}: "
                 f"{reason}). Download the file by hand and give its path.")


def looks_like(state: dict[str, torch.Tensor]) -> UNetConfig | None:
    """The plain architecture that weights have by their names and shapes, or None. Options without weights are off."""
    try:
        width, channels = state["conv_in.weight"].shape[:2]
        stages = [max(int(name.split(".")[3]) for name in state if name.startswith(f"down.{i}.block.")) + 1
                  for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("down.")))]
        stem = math.isqrt(len(state["conv_out.weight"]))
        multipliers = tuple(len(state[f"down.{i}.block.0.norm2.weight"]) // width for i in range(len(stages)))
    except (KeyError, ValueError, IndexError, TypeError):  # TypeError: the length of a number
        return None
    if width % 32 or 0 in (stem, *multipliers):
        return None
    return UNetConfig(width=width, multipliers=multipliers, blocks=stages[0], stem=stem,
                      channels=channels // stem**2)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("cvg_diff", "null"))
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, struct.error, ValueError, OSError) as error:
        sys.exit(f"{path} is not a whole safetensors file ({error}); copy or download it again.")
    if header is None:
        sys.exit(f"{path} carries no CvG-Diff configuration; expected a file that train.py wrote.")
    return state, header


def _read_published(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The published form: {"net_param": weights named [module.]denoise_fn.*, "epoch": ...}. No pickled code is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        sys.exit(f"{path} holds more than weights, or is no PyTorch file. Unpickling it could run code, so nothing in "
                 "it was run. Expected a .safetensors file or a checkpoint of the published CvG-Diff code.")
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        sys.exit(f"{path} is not a whole PyTorch file ({type(error).__name__}); copy or download it again.")
    weights = content.get("net_param") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                                for name, value in weights.items()):
        sys.exit(f"{path} has no weights under net_param; expected a checkpoint of the published CvG-Diff code.")
    state = {name.removeprefix("module.").removeprefix("denoise_fn."): value.float() for name, value in weights.items()}
    # Without a configuration in the file the weights themselves tell the architecture, the published one by default.
    header = _header(looks_like(state) or UNetConfig(), {"preset": "published", "protocol": "cvg-official"})
    epoch = content.get("epoch")
    return state, {**header, "epoch": epoch} if isinstance(epoch, int) else header


def _misfit(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """What distinguishes the weights found from those expected, or ""."""
    def named(kind, names):
        return f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
              for name in expected if name in found and found[name].shape != expected[name].shape]
    return "; ".join(named(kind, names) for kind, names in
                     (("missing", missing), ("not known", extra), ("of another shape", shapes)) if names)


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[UNet, dict]:
    """The network in evaluation mode and the header, from a .safetensors file of ours or a published pickle.

    Exits with a sentence for a file that is neither, or whose weights do not fit.
    """
    path = Path(path)
    if not path.is_file():
        sys.exit(f"The checkpoint {path} does not exist.")
    state, header = (_read_safetensors if path.suffix == ".safetensors" else _read_published)(path)
    try:
        config = UNetConfig(**{**header["network"], "multipliers": tuple(header["network"]["multipliers"])})
        network = UNet(config)
    except (TypeError, KeyError, ValueError) as error:
        sys.exit(f"{path} describes another architecture than this version knows ({error}).")
    if misfit := _misfit(network.state_dict(), state):
        like = looks_like(state)
        sys.exit(f"{path} holds weights of another architecture than the {config.width}-channel U-Net expected. "
                 f"Tensors: {misfit}. " + (f"They look like {like}." if like else "They look like no U-Net of ours."))
    network.load_state_dict(state)
    return network.eval().to(device), header


def check_methods(methods: list[str], network: UNet, path: Path) -> None:
    """Exits with a sentence where a method needs what the network does not have."""
    if "reco" in methods and (network.config.channels < 2 or network.config.anchored):
        sys.exit(f"reco needs a network with a two-pass residual channel, and {path.name} has none; choose another "
                 "method, or a checkpoint trained with --preset reco, or --channels 2 --residual-channel two-pass.")


def default_dc(header: dict) -> int:
    """Iterations of data consistency for a checkpoint: those chosen on validation slices, 0 where training had none."""
    return ITERATIONS if header.get("training", {}).get("preset", {}).get("dc", 0) else 0


def placed(network: UNet, device: str, precision: str) -> UNet:
    """The network on a device, its weights channels last where convolutions are faster so.

    That is on a GPU, and in bf16 on a CPU; in fp32 a CPU's group norm of such images loses two digits.
    """
    faster = torch.device(device).type == "cuda" or precision == "bf16"
    return network.to(device, memory_format=torch.channels_last if faster else torch.contiguous_format)


def denoiser(network: UNet, clip: bool = True, precision: str = "fp32"):
    """denoise(x_t, views) for the samplers: R(x_t, t), t as the network was conditioned on view counts.

    clip: keep estimates within what HU can be, [-1024, 3071]. Outside every window's range but for metal, and it keeps
    the errors of a long chain from growing without bound. The published procedure does not. precision: "fp32" or
    "bf16", the network's arithmetic. A CPU takes one slice at a time: its convolutions add in an order that depends on
    the batch, and a chain magnifies that to 3e-4.
    """
    lowest, highest = (hu_to_mu(hu) for hu in HU_RANGE)
    device = next(network.parameters()).device
    together = 1 if device.type == "cpu" else sys.maxsize

    @torch.no_grad()
    def denoise(x_t, views):
        t = torch.tensor([condition(n, network.config.conditioning) for n in views], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts = zip(x_t.split(together), t.split(together), strict=True)
            x0_hat = torch.cat([network(x, level) for x, level in parts])
        return x0_hat.clamp(lowest, highest) if clip else x0_hat

    return denoise
