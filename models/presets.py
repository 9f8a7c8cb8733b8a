"""Presets: every row is the configuration of a documented result. Any field is a flag of train.py."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Literal, get_args, get_origin

from models.levels import FULL_VIEWS
from models.samplers import SAMPLERS
from utils.cli import described_fields
from utils.errors import InputError


@dataclass(frozen=True)
class Preset:
    # network
    width: Annotated[int, "channels at the first resolution"] = 128
    dropout: Annotated[float, "share of channels' values that are dropped in training"] = 0.1
    blocks: Annotated[int, "residual blocks a resolution going down; one more going up"] = 2
    stem: Annotated[int, "pixel-unshuffle factor before the network"] = 1
    channels: Annotated[int, "2: a residual channel beside x_t"] = 1
    residual_channel: Annotated[Literal["two-pass", "anchored"], "two-pass: ReCo-Diff's, by a first pass without "
                                "gradient; anchored: RBG-Diff's, of the estimate before"] = "two-pass"
    conditioning: Annotated[Literal["level", "log-views"], "of t on the view count; level: the nearest published one; "
                            "log-views: interpolated"] = "level"
    residual: Annotated[bool, "predict x0 - x_t instead of x0"] = False
    shift: Annotated[float, "the network sees (mu - shift)/scale, 1/cm"] = 0.0
    scale: Annotated[float, "see --shift"] = 1.0
    told_photons: Annotated[bool, "the network knows the photons of a measurement"] = False
    zero_init: Annotated[bool, "start as the identity (with --residual)"] = False
    # budget and batches
    images: Annotated[int, "training images to see in all; 0: --epochs passes over the data"] = 0
    epochs: Annotated[int, "passes over the data where --images is 0"] = 40
    batch: Annotated[int, "slices a batch; the last, smaller batch of a pass is kept"] = 4
    augment: Annotated[bool, "flips and quarter turns of x0, which commute with R"] = False
    # levels and EPCT
    per_sample_levels: Annotated[bool, "one t (and t') a slice instead of one a batch"] = False
    epct_start: Annotated[int, "optimizer steps before composed inputs begin"] = 2000
    hops: Annotated[int, "composed inputs after each restore input, an optimizer step each"] = 1
    jumps: Annotated[float, "share of hops to t' ~ U{0..t-1}; the others go to t - 1"] = 1.0
    update: Annotated[Literal["shift", "naive"], "the next input: shift: x_t - D(x0_hat, n_t) + D(x0_hat, n_s); naive: "
                      "D(x0_hat, n_s)"] = "shift"
    dc: Annotated[int, "iterations of data consistency on an estimate before it is composed"] = 0
    focus_share: Annotated[float, "share of measurements drawn at --focus-views; the others at any level"] = 0.0
    focus_views: Annotated[str, "those that the field reports; one that stands twice is drawn twice as often"] = \
        "18 36 72"
    any_view_share: Annotated[float, "share of measurements with any 18 to 288 views instead of a level's"] = 0.0
    # what measures
    noise_share: Annotated[float, "share of measurements with photon noise"] = 0.0
    fewest_photons: Annotated[float, "a ray, of noisy measurements; log-uniform from here"] = 1e4
    most_photons: Annotated[float, "to here"] = 1e7
    electronic: Annotated[float, "largest deviation of their electronic noise, counts; uniform from 0"] = 5.0
    scanner_share: Annotated[float, "share of batches on another scanner (models/drawn.py)"] = 0.0
    scanners: Annotated[int, "how many others there are"] = 256
    # loss
    loss: Annotated[Literal["mse", "rmse"], "of each slice; rmse weighs all slices alike"] = "mse"
    estimates_by: Annotated[Literal["ema", "own"], "whose estimate a hop uses; own: that of the training call, without "
                            "an extra call"] = "ema"
    # optimizer
    optimizer: Annotated[Literal["adam", "adamw"], "the optimizer"] = "adam"
    lr: Annotated[float, "largest learning rate"] = 4e-5
    weight_decay: Annotated[float, "of the optimizer"] = 0.0
    clip: Annotated[float, "largest gradient norm"] = 1.0
    schedule: Annotated[Literal["step", "cosine"], "of the rate; step: x0.8 every 25 epochs; cosine: warm-up, then to "
                        "zero at the last step"] = "step"
    warmup: Annotated[int, "optimizer steps of linear warm-up (cosine)"] = 0
    precision: Annotated[Literal["fp32", "bf16", "fp64"], "bf16: autocast of the network, projectors in fp32; fp64: "
                         "all, for checks"] = "fp32"
    # EMA
    ema: Annotated[float, "what an average keeps of the weights before"] = 0.995
    ema_every: Annotated[int, "optimizer steps between two averages"] = 10
    ema_start: Annotated[int, "before this step the EMA copies the weights"] = 2000
    ema_dropout: Annotated[bool, "the EMA network runs with dropout in the compose input"] = True
    # validation and what is published
    publish: Annotated[Literal["raw", "ema"], "which weights validation measures and checkpoint.safetensors holds"] = \
        "raw"
    val_sampler: Annotated[Literal[*SAMPLERS], "sampler of the validation"] = "sequential"
    val_slices: Annotated[int, "slices, evenly spread over the validation set; 0: all"] = 0
    val_every: Annotated[int, "images between validations; 0: after passes 0, 3, 6, ... and the last"] = 0
    save_every: Annotated[int, "images between checkpoints"] = 4000
    # what changes results by rounding alone: free to differ when a run is resumed
    accumulate: Annotated[int, "parts of a batch that a process computes one after another, to save memory"] = 1
    patience: Annotated[int, "non-finite optimizer steps (each skipped) in a row that stop the run"] = 20

    def check(self) -> None:
        """Raises InputError with a sentence for values that cannot be."""
        for name, (kind, _) in described_fields(Preset).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(get_args(kind))}")
        for names, fits, expected in RANGES:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise InputError(f"{name} is {getattr(self, name)}; expected {expected}")
        if not math.isfinite(self.lr + self.weight_decay + self.shift + self.scale + self.most_photons
                             + self.electronic):
            raise InputError("lr, weight_decay, shift, scale, most_photons or electronic is not finite")
        views = self.focus_views.split()
        if not views or not all(n.isdecimal() and 1 <= int(n) <= FULL_VIEWS for n in views):
            raise InputError(f"focus_views is {self.focus_views!r}; expected counts from 1 to {FULL_VIEWS}, as "
                             "'18 36 72'")
        if self.residual_channel == "anchored" and self.channels == 1:
            raise InputError("residual_channel anchored needs channels 2")
        if self.told_photons and not self.noise_share:
            raise InputError("told_photons needs a noise_share above 0")
        if self.fewest_photons > self.most_photons:
            raise InputError(f"fewest_photons is {self.fewest_photons:g} and most_photons {self.most_photons:g}; "
                             "expected no more than these")
        if SAMPLERS[self.val_sampler].two_pass and (self.channels, self.residual_channel) != (2, "two-pass"):
            raise InputError(f"val_sampler {self.val_sampler} needs channels 2 and residual_channel two-pass")

    def network(self):
        """The UNetConfig of this preset."""
        from models.unet import UNetConfig  # presets are read before PyTorch is

        return UNetConfig(**{f.name: getattr(self, f.name) for f in fields(UNetConfig) if hasattr(self, f.name)})

    @property
    def dtype(self):
        """Of weights and images."""
        import torch

        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def focused(self) -> tuple[int, ...]:
        """`focus_views` as numbers."""
        return tuple(int(n) for n in self.focus_views.split())

    def mathematics(self) -> dict:
        """The fields that a resumed run must share: all but those of how a step is computed."""
        return {name: value for name, value in asdict(self).items() if name not in COMPUTATION}


COMPUTATION = ("accumulate", "patience")
RANGES = (  # fields, what fits, what is expected
    ("blocks stem epochs batch save_every ema_every patience accumulate scanners fewest_photons",
     lambda v: v >= 1, "1 or more"),
    ("images hops val_every val_slices warmup dc lr electronic", lambda v: v >= 0, "0 or more"),
    ("width", lambda v: v >= 32 and v % 32 == 0, "a multiple of 32, the groups of its normalisation"),
    ("channels", lambda v: v in (1, 2), "1, or 2 for the residual channel"),
    ("scale clip", lambda v: v > 0, "a positive number"),
    ("focus_share any_view_share dropout ema", lambda v: 0 <= v < 1, "a share from 0 to below 1"),
    ("jumps noise_share scanner_share", lambda v: 0 <= v <= 1, "a share from 0 to 1"),
)
# Fields of older versions: their new names, and those that are gone with the value that meant "off".
RENAMED = {"between": "any_view_share", "focus": "focus_share", "rollout": "estimates_by"}
DELETED = {"combined": False, "rotate": 0.0, "zoom": 0.0, "translate": 0.0, "starts": 1}
DELETED_LOSSES = ("charbonnier", "spectral")


def of_this_version(found: dict) -> dict:
    """`mathematics` of a run that an older version began, in today's names.

    A field that is younger than the run has the value that it had by default. Raises InputError where the run used a
    field that is gone.
    """
    used = {name: found[name] for name, off in DELETED.items() if found.get(name, off) != off}
    used |= {"loss": found["loss"]} if found.get("loss") in DELETED_LOSSES else {}
    if used:
        raise InputError("The run was begun with " + ", ".join(f"{name} {value}" for name, value in used.items())
                         + ", which this version no longer has; go on with the code that began it.")
    known = {RENAMED.get(name, name): value for name, value in found.items() if name not in DELETED}
    return Preset().mathematics() | known


PAPER = Preset()
TINY = replace(
    PAPER, width=32, dropout=0.0, stem=2, channels=2, residual_channel="anchored", conditioning="log-views",
    residual=True, shift=0.1, scale=0.1, zero_init=True, images=6000, batch=2, per_sample_levels=True, focus_share=0.7,
    any_view_share=0.5, epct_start=500, hops=5, jumps=0.5, update="naive", dc=8, loss="rmse", estimates_by="own",
    optimizer="adamw", lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=100, precision="bf16", ema=0.999,
    ema_every=1, ema_start=100, ema_dropout=False, publish="ema", val_sampler="naive", val_slices=8, val_every=1000,
    save_every=200)
# What real measurements are: noisy, and made by other scanners.
REAL = {"told_photons": True, "noise_share": 0.5, "scanner_share": 0.4}
# Batch and rate go together: 2 to 4 slices with 5e-4 to 1e-3 (tiny, real), 16 with 5e-4, 32 with 2e-4 (small, base; not
# measured yet). A larger batch makes fewer steps of as many images, so it needs more images.
PRESETS = {
    # The published recipe (Chen et al., MICCAI 2025), number by number.
    "paper": PAPER,
    # ReCo-Diff (arXiv 2603.02691): the published recipe with two passes a call, the second beside a residual channel.
    "reco": replace(PAPER, channels=2, epochs=200, val_sampler="reco"),
    # 2.2 M parameters, 11.5 GFLOP a call: trains on a CPU, in so few steps that flips and turns cost 0.2 to 0.5 dB.
    "tiny": TINY,
    # `tiny` goes on with noise, other scanners, flips and turns: --init models/tiny.safetensors.
    "real": replace(
        TINY, **REAL, images=2400, batch=4, augment=True, focus_views="18 24 36 72", epct_start=0, lr=7e-4, warmup=50,
        ema_start=0, val_slices=5, val_every=400, save_every=80),
    # 8.6 M parameters, 46 GFLOP a call, the recipe of `tiny` and `real`: for one GPU. No trained result yet.
    "small": replace(
        TINY, **REAL, width=64, images=200_000, batch=16, augment=True, epct_start=1000, lr=5e-4, warmup=500,
        ema=0.9995, val_slices=16, val_every=10_000, save_every=5_000),
    # The published network with the recipe of `tiny`: for one large GPU or several. No result is documented yet.
    "base": replace(
        TINY, width=128, stem=1, images=400_000, batch=32, augment=True, epct_start=2000, lr=2e-4, warmup=1000,
        ema=0.9995, val_slices=16, val_every=20_000, save_every=5_000),
}
