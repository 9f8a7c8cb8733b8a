"""Weights and their configuration: our safetensors files, and CvG-Diff's published pickles."""

import hashlib
import json
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from models.levels import FULL_VIEWS, LEVELS
from models.pickles import check_pickles
from models.scanner import PUBLISHED
from models.unet import UNet, UNetConfig
from utils.errors import InputError
from utils.files import atomic

LARGEST = 2**30  # bytes of a file: eight times the published network


def save_checkpoint(path: Path, state: dict[str, torch.Tensor], network: UNetConfig, about: dict) -> None:
    """Write weights with their architecture, levels and geometry; `about`: how they were made, JSON values."""
    header = {"network": asdict(network), "levels": LEVELS, "full_views": FULL_VIEWS, "protocol": "cvg",
              "geometry": PUBLISHED, **about}
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    header["sha256"] = _digest(header, weights)
    with atomic(path) as partial:
        partial.write_bytes(save(weights, metadata={"cvg_diff": json.dumps(header)}))  # save_file hides it from others


def _digest(header: dict, weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a header and of contiguous weights with their names."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_published(path: Path, network: UNet, epoch: int = 0) -> None:
    """Write weights in the published form, which `_read_published` and the published code read.

    Raises InputError for a network with options that the published architecture does not have.
    """
    plain = infer_config(network.state_dict())
    if replace(network.config, dropout=UNetConfig.dropout) != plain or (plain.stem, plain.channels) != (1, 1):
        raise InputError(f"The published code has no network like {network.config}; it takes the architecture of the "
                         "preset paper alone.")
    weights = {"denoise_fn." + name: value.detach().cpu() for name, value in network.state_dict().items()}
    with atomic(path) as partial, open(partial, "wb") as file:
        torch.save({"net_param": weights, "epoch": epoch}, file)


def infer_config(state: dict[str, torch.Tensor]) -> UNetConfig | None:
    """The plain architecture that weights have by their names and shapes, or None. Options without weights are off."""
    try:
        width, channels = state["conv_in.weight"].shape[:2]
        stem = math.isqrt(len(state["conv_out.weight"]))
        names = [name.split(".") for name in state if name.startswith("down.")]
        blocks = 1 + max(int(name[3]) for name in names if name[1:3] == ["0", "block"])
        stages = range(1 + max(int(name[1]) for name in names))
        multipliers = tuple(len(state[f"down.{i}.block.0.norm2.weight"]) // width for i in stages)
    except (KeyError, ValueError, IndexError, TypeError):  # TypeError: the length of a number
        return None
    if width % 32 or 0 in (stem, *multipliers):
        return None
    return UNetConfig(width=width, multipliers=multipliers, blocks=blocks, stem=stem, channels=channels // stem**2)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("cvg_diff", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy or download it again.") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} carries no CvG-Diff configuration; expected a file that train.py wrote.")
    sha256 = header.pop("sha256", None)  # older files have none
    if sha256 not in (None, _digest(header, state)):
        raise InputError(f"{path} is damaged: its content is not what its SHA-256 says; copy or download it again.")
    return {name: value.float() for name, value in state.items()}, header


def _read_published(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The published form: {"net_param": weights named [module.]denoise_fn.*, "epoch": ...}. No pickled code is run."""
    try:
        check_pickles(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than weights, or is no PyTorch file. Unpickling it could run code, so "
                         "nothing in it was run. Expected a .safetensors file or a checkpoint of the published "
                         "CvG-Diff code.") from None
    except InputError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"{path} is not a whole PyTorch file ({type(error).__name__}); copy or download it "
                         "again.") from error
    try:
        tensors = content.get("net_param")
        if sum(value.numel() for value in tensors.values()) > path.stat().st_size:  # many views of few numbers
            raise InputError(f"{path} describes more weights than it holds; expected a checkpoint of the published "
                             "CvG-Diff code.")
        state = {name.removeprefix("module.").removeprefix("denoise_fn."): value.float()
                 for name, value in tensors.items()}
    except AttributeError:  # no dictionaries, or no names and tensors in them
        raise InputError(f"{path} has no weights under net_param; expected a checkpoint of the published CvG-Diff "
                         "code.") from None
    # Without a configuration in the file the weights themselves tell the architecture, the published one by default.
    header = {"network": asdict(infer_config(state) or UNetConfig()), "preset": "published", "protocol": "cvg-official"}
    return state, header | {"epoch": content["epoch"]} if isinstance(content.get("epoch"), int) else header


def describe_mismatch(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """What distinguishes the weights found from those expected, or ""."""
    differences = {
        "missing": sorted(expected.keys() - found.keys()), "not known": sorted(found.keys() - expected.keys()),
        "of another shape": [f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
                             for name in expected if name in found and found[name].shape != expected[name].shape]}
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                     for kind, names in differences.items() if names)


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[UNet, dict]:
    """The network in evaluation mode and the header, from a .safetensors file of ours or a published pickle.

    Raises InputError for a file that is neither, whose weights do not fit, or that was made for another scanner.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"The checkpoint {path} does not exist.")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path} has {path.stat().st_size / 2**30:.1f} GiB; expected weights of at most "
                         f"{LARGEST / 2**30:.0f} GiB.")
    state, header = (_read_safetensors if path.suffix == ".safetensors" else _read_published)(path)
    try:
        config = UNetConfig(**{**header["network"], "multipliers": tuple(header["network"]["multipliers"])})
        for name, value in asdict(config).items():
            kind = type(getattr(UNetConfig, name))
            if not isinstance(value, int | float if kind is float else kind) or kind is float and not abs(value) < 1e9:
                raise TypeError(f"{name} {value!r}")
        if config.blocks * len(config.multipliers) > max(100, len(state)):
            raise ValueError(f"{config.blocks} blocks at {len(config.multipliers)} resolutions")
        with torch.device("meta"):  # takes no memory, whatever width a damaged header asks for
            expected = UNet(config).state_dict()
    except Exception as error:  # values of any type, from a damaged header
        raise InputError(f"{path} describes another architecture than this version knows ({error!r}).") from None
    _check_header(path, header)
    if misfit := describe_mismatch(expected, state):
        raise InputError(f"{path} holds weights of another architecture than the {config.width}-channel U-Net "
                         f"expected. Tensors: {misfit}. They look like {infer_config(state) or 'no U-Net of ours'}.")
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise InputError(f"{path} holds weights that are not finite ({', '.join(bad[:3])}): take another checkpoint of "
                         "its training.")
    network = UNet(config)
    network.load_state_dict(state)
    return network.eval().to(device), header


def _check_header(path: Path, header: dict) -> None:
    """Raises InputError where the weights were trained for another scanner, another truth or levels that cannot be."""
    for name, here in {"geometry": PUBLISHED, "full_views": FULL_VIEWS}.items():
        if header.get(name, here) != here:
            raise InputError(f"{path} was trained with another {name}: {header[name]}; this version simulates {here}. "
                             "Evaluate it with the code that trained it.")
    training = header.get("training", {})
    if not (isinstance(training, dict) and isinstance(training.get("preset", {}), dict)
            and isinstance(header.get("size", 256), int) and header.get("protocol", "cvg") in ("cvg", "cvg-official")
            and str(header.get("preset", "unnamed")).isprintable()
            and isinstance(header.get("traces") or {}, dict)):
        raise InputError(f"{path} does not say how it was trained; expected the header that train.py writes "
                         "(docs/formats.md).")
    levels = header.get("levels", LEVELS)
    if not (isinstance(levels, list | tuple) and levels and all(isinstance(n, int) and n > 0 for n in levels)
            and sorted(set(levels), reverse=True) == list(levels)):
        raise InputError(f"{path} names the levels {levels}; expected view counts, densest first.")
