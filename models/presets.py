"""Presets: every row is the configuration of a documented result. Any field is a flag of train.py."""

import math
from dataclasses import asdict, dataclass, replace

from models.unet import UNetConfig


@dataclass(frozen=True)
class Preset:
    # network
    width: int = 128               # channels at the first resolution
    dropout: float = 0.1
    blocks: int = 2                # residual blocks a resolution going down; one more going up
    stem: int = 1                  # pixel-unshuffle factor before the network
    channels: int = 1              # 2: a residual channel beside x_t
    residual_channel: str = "two-pass"  # two-pass: ReCo-Diff's, by a first pass without gradient | anchored: RBG-Diff's
    conditioning: str = "level"    # level: the nearest published t | log-views: interpolated between them
    residual: bool = False         # predict x0 - x_t instead of x0
    shift: float = 0.0             # the network sees (mu - shift)/scale, 1/cm
    scale: float = 1.0
    zero_init: bool = False        # start as the identity (with residual)
    # budget and batches
    images: int = 0                # training images to see in all; 0: `epochs` passes over the data
    epochs: int = 40
    batch: int = 4                 # the last, smaller batch of a pass is kept
    augment: bool = False          # flips and quarter turns of x0, which commute with R
    rotate: float = 0.0            # each slice is turned by up to so many degrees before x0 = R(slice),
    zoom: float = 0.0              # scaled by up to this share,
    translate: float = 0.0         # and moved by up to this share of its side
    starts: int = 1                # angles of the first view to draw from, one a batch; 1: always 0
    # levels and EPCT
    per_sample_levels: bool = False  # one t (and t') a slice instead of one a batch
    epct_start: int = 2000         # optimizer steps before composed inputs begin
    hops: int = 1                  # composed inputs after each restore input, an optimizer step each
    jumps: float = 1.0             # share of hops to t' ~ U{0..t-1}; the others go to t - 1
    update: str = "shift"          # shift: x_t - D(x0_hat, n_t) + D(x0_hat, n_s) | naive: D(x0_hat, n_s)
    dc: int = 0                    # iterations of data consistency on an estimate before it is composed
    focus: float = 0.0             # share of measurements drawn at `focus_views`; the others at any level
    focus_views: str = "18 36 72"  # those that the field reports; one that stands twice is drawn twice as often
    between: float = 0.0           # share of measurements with any 18 to 288 views instead of a level's
    loss: str = "mse"              # mse | rmse | charbonnier | spectral, of each slice
    combined: bool = False         # one optimizer step a batch, on the mean loss of its inputs
    rollout: str = "ema"           # whose estimate a hop uses: ema | own (that of the training call: no extra call)
    # optimizer
    optimizer: str = "adam"        # adam | adamw
    lr: float = 4e-5
    weight_decay: float = 0.0
    clip: float = 1.0              # largest gradient norm
    schedule: str = "step"         # step: x0.8 every 25 epochs | cosine: warm-up, then to zero at the last step
    warmup: int = 0                # optimizer steps of linear warm-up (cosine)
    precision: str = "fp32"        # fp32 | bf16: autocast of the network, projectors in fp32 | fp64: all, for checks
    # EMA
    ema: float = 0.995
    ema_every: int = 10            # optimizer steps between two averages
    ema_start: int = 2000          # before this step the EMA copies the weights
    ema_dropout: bool = True       # the EMA network runs with dropout in the compose input
    # validation and what is published
    publish: str = "raw"           # raw | ema: which weights validation measures and checkpoint.safetensors holds
    val_sampler: str = "sequential"  # sampler of the validation, with the preset's data consistency
    val_slices: int = 0            # slices, evenly spread over the validation set; 0: all
    val_every: int = 0             # images between validations; 0: after passes 0, 3, 6, ... and the last
    save_every: int = 4000         # images between checkpoints
    # what changes results by rounding alone: free to differ when a run is resumed
    accumulate: int = 1            # parts of a batch that a process computes one after another, to save memory
    channels_last: bool = False    # memory layout of the network, on CUDA
    compile: bool = False          # torch.compile
    patience: int = 20             # non-finite optimizer steps (each skipped) in a row that stop the run

    def check(self) -> None:
        """Raises ValueError with a sentence for values that cannot be."""
        for name, least in {"width": 32, "blocks": 1, "stem": 1, "images": 0, "epochs": 1, "batch": 1, "hops": 0,
                            "save_every": 1, "ema_every": 1, "val_every": 0, "val_slices": 0, "warmup": 0, "dc": 0,
                            "lr": 0.0, "rotate": 0.0, "translate": 0.0, "starts": 1, "patience": 1,
                            "accumulate": 1}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
        for name in ("focus", "between", "zoom", "dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share from 0 to below 1")
        if not 0 <= self.jumps <= 1:
            raise ValueError(f"jumps is {self.jumps}; expected a share from 0 to 1")
        for name in ("scale", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not math.isfinite(self.lr + self.weight_decay + self.shift + self.scale):
            raise ValueError("lr, weight_decay, shift or scale is not finite")
        views = self.focus_views.split()
        if not views or not all(n.isdecimal() and 1 <= int(n) <= 720 for n in views):
            raise ValueError(f"focus_views is {self.focus_views!r}; expected counts from 1 to 720, as '18 36 72'")
        if self.channels not in (1, 2):
            raise ValueError(f"channels is {self.channels}; expected 1, or 2 for the residual channel")
        if self.residual_channel == "anchored" and self.channels == 1:
            raise ValueError("residual_channel anchored needs channels 2")
        if self.val_sampler == "reco" and (self.channels, self.residual_channel) != (2, "two-pass"):
            raise ValueError("val_sampler reco needs channels 2 and residual_channel two-pass")
        if self.width % 32:
            raise ValueError(f"width is {self.width}; expected a multiple of 32, the groups of its normalisation")

    def network(self) -> UNetConfig:
        return UNetConfig(width=self.width, blocks=self.blocks, dropout=self.dropout, stem=self.stem,
                          channels=self.channels, residual_channel=self.residual_channel,
                          conditioning=self.conditioning, residual=self.residual, shift=self.shift, scale=self.scale,
                          zero_init=self.zero_init)

    @property
    def deforms(self) -> bool:
        """Whether slices are deformed before x0 = R(slice), so that x0 is made anew each time."""
        return self.rotate > 0 or self.zoom > 0 or self.translate > 0

    @property
    def focused(self) -> tuple[int, ...]:
        """`focus_views` as numbers."""
        return tuple(int(n) for n in self.focus_views.split())

    def mathematics(self) -> dict:
        """The fields that a resumed run must share: all but those of how a step is computed."""
        return {name: value for name, value in asdict(self).items() if name not in COMPUTATION}


COMPUTATION = ("accumulate", "channels_last", "compile", "patience")

PAPER = Preset()
TINY = replace(
    PAPER, width=32, dropout=0.0, stem=2, channels=2, residual_channel="anchored", conditioning="log-views",
    residual=True, shift=0.1, scale=0.1, zero_init=True, images=6000, batch=2, per_sample_levels=True, focus=0.7,
    between=0.5, epct_start=500, hops=5, jumps=0.5, update="naive", dc=8, loss="rmse", rollout="own",
    optimizer="adamw", lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=100, precision="bf16", ema=0.999,
    ema_every=1, ema_start=100, ema_dropout=False, publish="ema", val_sampler="naive", val_slices=8, val_every=1000,
    save_every=200)
PRESETS = {
    # The published recipe (Chen et al., MICCAI 2025), number by number.
    "paper": PAPER,
    # ReCo-Diff (arXiv 2603.02691): the published recipe with two passes a call, the second beside a residual channel.
    "reco": replace(PAPER, channels=2, epochs=200, val_sampler="reco"),
    # 2.2 M parameters, 11.5 GFLOP a call: trains on a CPU, in so few steps that flips and turns cost 0.2 to 0.5 dB.
    "tiny": TINY,
    # 8.6 M parameters, 46 GFLOP a call, the recipe of `tiny`: for one GPU. No trained result is documented yet.
    "small": replace(
        TINY, width=64, images=200_000, batch=16, augment=True, epct_start=1000, lr=5e-4, warmup=500, ema=0.9995,
        channels_last=True, val_slices=16, val_every=10_000, save_every=5_000),
    # The published network with the recipe of `tiny`: for one large GPU or several. No result is documented yet.
    "base": replace(
        TINY, width=128, stem=1, images=400_000, batch=32, augment=True, epct_start=2000, lr=2e-4, warmup=1000,
        ema=0.9995, channels_last=True, compile=True, val_slices=16, val_every=20_000, save_every=5_000),
}
