"""Training: the network, its EMA and its optimizer, and what one batch does to them."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from datasets.loader import Part
from models.checkpoint import load_checkpoint
from models.degradation import Degradation
from models.drawn import draw_scanner
from models.dropout import seed_dropout
from models.epct import Chain, advance, loss, network_input, start_chain
from models.levels import LEVELS, level_of
from models.presets import Preset
from models.schedule import inputs_of, learning_rate, update_ema
from models.unet import UNet
from utils.device import bf16_pays
from utils.distributed import sync_gradients
from utils.errors import InputError
from utils.progress import Progress
from utils.scalars import Step


class Trainer:
    """Updates a network batch by batch. Everything random is a function of the seed, the step and the sample's index.

    steps: optimizer steps of the whole run. init: a checkpoint whose weights it starts from.
    """

    def __init__(self, preset: Preset, *, seed: int, steps: int, device: str, processes: int = 1,
                 init: Path | None = None):
        self.preset, self.seed, self.steps, self.device = preset, seed, steps, device
        self.network, self.ema, self.optimizer = build(preset, seed, device, init)
        self.step, self.lr = 0, 0.0
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16,
                                       enabled=preset.precision == "bf16" and bf16_pays(device))
        network = self.network.train()
        self.model = DistributedDataParallel(network) if processes > 1 else network  # what is called

    @property
    def published(self) -> UNet:
        """The network that is validated and published."""
        return self.ema if self.preset.publish == "ema" else self.network

    def update(self, parts: list[Part], weight: float, epoch: int) -> list[Step]:
        """Train on this process's parts of a batch: one optimizer step on the restore input, and one a hop.

        weight: of each slice in the loss, so that processes and parts give what one gives. Nobody waits for the device.
        """
        degrade, done = Degradation(draw_scanner(parts[0].common, self.preset, self.seed)), []
        chains = [start_chain(part, degrade, self.preset, self.device, self.seed) for part in parts]
        for hop in range(inputs_of(self.preset, self.step)):
            self.optimizer.zero_grad(set_to_none=True)
            losses = torch.cat([self._backward(chain, hop, weight, chain is chains[-1]) for chain in chains])
            self.lr = learning_rate(self.preset, self.step, self.steps, epoch)
            norm, skipped = optimize(self.optimizer, self.network, self.preset.clip, self.lr)
            self.step += 1
            update_ema(self.ema, self.network, self.step, self.preset)
            slices = [i for chain in chains for i in chain.part.slices]
            levels = [LEVELS[level_of(n)] for chain in chains for n in chain.n_t]
            done.append(Step([hop] * len(slices), slices, levels, losses, norm, skipped))
        return done

    def _backward(self, chain: Chain, hop: int, weight: float, last: bool) -> torch.Tensor:
        """Gradients of a chain's next input; its losses, (B,). last: of the step, when processes exchange gradients."""
        if hop > 0:
            if self.preset.estimates_by == "ema":
                seed_dropout(self.ema, [(self.seed, self.step, i, 1) for i in chain.part.indices])
                with torch.no_grad(), self.autocast:
                    chain.x0_hat = self.ema(*network_input(chain, self.ema, self.preset))
            advance(chain, hop, self.preset)
        seed_dropout(self.network, [(self.seed, self.step, i, 0) for i in chain.part.indices])
        with sync_gradients(self.model, last):
            with self.autocast:
                x0_hat = self.model(*network_input(chain, self.model, self.preset))
                losses = loss(x0_hat, chain.x0, self.preset.loss, self.preset.scale)
            (losses.sum() * weight).backward()
        chain.x0_hat = x0_hat.detach()
        return losses.detach()

    def state_dict(self) -> dict:
        """What a resumed run needs. No random generator: see above."""
        return {"network": self.network.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        for name in ("network", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def build(preset: Preset, seed: int, device: str, init: Path | None = None):
    """(network, EMA, optimizer) at the start of a run. Raises InputError where `init` is of another architecture."""
    torch.manual_seed(seed)
    network = UNet(preset.network()).to(device, preset.dtype)
    if init:
        weights, _ = load_checkpoint(init, device)
        # The first three have no weights of their own. Photons add nothing at first, nor where there is no noise.
        free = ["conditioning", "dropout", "zero_init", "told_photons"]
        if weights.config.channels == 1:
            free += ["channels", "residual_channel"]  # a residual channel can start from none
        if replace(weights.config, **{name: getattr(preset, name) for name in free}) != network.config:
            raise InputError(f"{init} holds another architecture than this preset; repeat the flags that made it.")
        state, added = weights.state_dict(), network.conv_in.in_channels - weights.conv_in.in_channels
        state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, added))  # which are ignored at first
        known = network.state_dict()
        network.load_state_dict(known | {name: value for name, value in state.items() if name in known})
    if torch.device(device).type == "cuda":
        network.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False).train(preset.ema_dropout)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[preset.optimizer]
    return network, ema, kind(network.parameters(), lr=preset.lr, weight_decay=preset.weight_decay, fused=True)


def optimize(optimizer, network, clip: float, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One step with clipped gradients: (gradient norm, 1.0 where it is not finite, and then nothing changes)."""
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.found_inf = (~norm.isfinite()).float()  # fused optimizers read it on the device: nobody waits
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm.detach(), optimizer.found_inf


def ground_truths(mu: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """x0 = R(slice), mu (N, 1, H, H), on the CPU."""
    full = Degradation().full
    bar = Progress(range(0, len(mu), 8), desc="x0 = R(slice)", unit_scale=8, unit="slices", leave=False)
    return torch.cat([full(mu[i:i + 8].to(device, dtype)).cpu() for i in bar]) if len(mu) else mu
