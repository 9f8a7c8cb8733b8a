"""The network R(x_t, t) -> x0: the published DDPM U-Net of CvG-Diff (Chen et al., MICCAI 2025), and its few options.

On a GPU images stay channels-last from the first convolution to the last, and models/norm.py serves the norms and what
surrounds them. Everywhere else PyTorch's own operators do. docs/performance.md says why.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.dropout import Dropout


@dataclass(frozen=True)
class UNetConfig:
    """Architecture. The defaults are the published network."""

    width: int = 128              # channels at the first resolution
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2               # residual blocks a resolution going down; one more going up
    dropout: float = 0.1
    stem: int = 1                 # pixel-unshuffle factor in front (and shuffle behind): 2 works on H/2 x W/2
    residual: bool = False        # predict x0 - x_t instead of x0
    shift: float = 0.0            # the network sees (mu - shift)/scale, 1/cm,
    scale: float = 1.0            # and its output is multiplied by scale
    channels: int = 1             # 2: a residual beside x_t; where it is not given it is zero
    residual_channel: str = "two-pass"  # ReCo-Diff's, of a first pass | anchored: RBG-Diff's, of the estimate before
    zero_init: bool = False       # last layer starts at zero: a residual network starts as the identity
    told_photons: bool = False    # knows the photons of a measurement
    conditioning: str = "level"   # of t on the view count: level: the nearest published one | log-views: interpolated

    @property
    def anchored(self) -> bool:
        """Whether it was trained with the `anchored_residual` of models/samplers.py."""
        return self.channels == 2 and self.residual_channel == "anchored"

    @property
    def multiple(self) -> int:
        """Image sides must be divisible by this."""
        return self.stem * 2 ** (len(self.multipliers) - 1)


def sinusoidal_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """(B,) -> (B, dim): first half sin, second half cos of t * exp(-ln(10000) i/(dim/2 - 1))."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    phase = t.float()[:, None] * frequencies[None, :]
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


@functools.cache
def _kernels():
    """models/norm.py, or None where there is no Triton."""
    try:
        from models import norm
    except ImportError:
        return None
    return norm


def _fused(x: torch.Tensor):
    """models/norm.py where it serves this tensor, else None."""
    return _kernels() if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def _normalised(norm: nn.GroupNorm, x: torch.Tensor, silu: bool = True, shift=None) -> torch.Tensor:
    """Group norm, then SiLU if `silu`. shift: (B, C), added to x before, or None."""
    if kernels := _fused(x):
        return kernels.group_norm(x, norm.weight, norm.bias, norm.eps, silu=silu, shift=shift)
    x = norm(x if shift is None else x + shift[:, :, None, None])
    return F.silu(x) if silu else x


def _without_bias(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _unshuffle(x: torch.Tensor, factor: int) -> torch.Tensor:
    """F.pixel_unshuffle, which on a GPU has channels-first results; these are channels-last."""
    if not _fused(x):
        return F.pixel_unshuffle(x, factor)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // factor, factor, width // factor, factor).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height // factor, width // factor, channels * factor**2).permute(0, 3, 1, 2)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])

    def forward(self, t):
        return self.dense[1](F.silu(self.dense[0](sinusoidal_embedding(t, self.width).to(self.dense[0].weight.dtype))))


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, time_channels: int, dropout: float):
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.temb_proj = nn.Linear(time_channels, channels_out)
        self.norm2 = _norm(channels_out)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x, temb):
        time = self.temb_proj(F.silu(temb))
        h = _normalised(self.norm1, x)
        if kernels := _fused(h):  # a GPU adds a bias in a pass of its own; here the kernel that comes next adds it
            h = _normalised(self.norm2, _without_bias(self.conv1, h), shift=time + self.conv1.bias)
            h, bias = _without_bias(self.conv2, self.dropout(h)), self.conv2.bias
            if isinstance(self.nin_shortcut, nn.Conv2d):
                x, bias = _without_bias(self.nin_shortcut, x), bias + self.nin_shortcut.bias
            return kernels.add(x, h, bias)
        h = self.conv2(self.dropout(_normalised(self.norm2, self.conv1(h), shift=time)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, scale C^-1/2."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = _normalised(self.norm, x, silu=False)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # which would copy values in float32 on a GPU
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class UNet(nn.Module):
    """x_t (B, 1, H, W) in mu (1/cm) and t (B,), a level, possibly fractional -> estimate of x0 (B, 1, H, W) in mu.

    With config.channels = 2 the input may have a second channel. photons (B,): I0 of the measurements, inf or None
    without noise; only a network with config.told_photons makes use of it.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width, levels = config.width, len(config.multipliers)
        channels = [width * m for m in config.multipliers]
        block = lambda c_in, c_out: ResidualBlock(c_in, c_out, 4 * width, config.dropout)  # noqa: E731
        self.temb = TimeEmbedding(width)
        self.conv_in = nn.Conv2d(config.channels * config.stem**2, width, 3, padding=1)
        skips, now = [width], width
        self.down = nn.ModuleList()
        for i in range(levels):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.blocks):
                stage.block.append(block(now, channels[i]))
                now = channels[i]
                skips.append(now)
            if i < levels - 1:
                stage.downsample = Downsample(now)
                skips.append(now)
            self.down.append(stage)
        self.mid = nn.Module()
        self.mid.block_1 = block(now, now)
        self.mid.attn_1 = Attention(now)
        self.mid.block_2 = block(now, now)
        stages = []
        for i in reversed(range(levels)):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.blocks + 1):
                stage.block.append(block(now + skips.pop(), channels[i]))
                now = channels[i]
            if i > 0:
                stage.upsample = Upsample(now)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = _norm(now)
        self.conv_out = nn.Conv2d(now, config.stem**2, 3, padding=1)
        if config.zero_init:
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)
        if config.told_photons:  # last, so that all else is drawn as without; zero, so that it begins as without
            self.photons = TimeEmbedding(width)
            nn.init.zeros_(self.photons.dense[1].weight)
            nn.init.zeros_(self.photons.dense[1].bias)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, photons: torch.Tensor | None = None) -> torch.Tensor:
        if any(side % self.config.multiple for side in x_t.shape[-2:]):
            raise ValueError(f"the image is {x_t.shape[-2]} x {x_t.shape[-1]} pixels; this network takes sides "
                             f"divisible by {self.config.multiple}")
        if x_t.shape[1] > self.config.channels:
            raise ValueError(f"the input has {x_t.shape[1]} channels; this network takes {self.config.channels}")
        temb = self.temb(t)
        if self.config.told_photons and photons is not None:
            noisy = photons.isfinite()
            told = self.photons(torch.where(noisy, photons, 1.0).log())
            temb = temb + told.masked_fill(~noisy[:, None], 0)
        x_t, others = x_t[:, :1], x_t[:, 1:]
        others = F.pad(others, (0, 0, 0, 0, 0, self.config.channels - 1 - others.shape[1]))
        x = torch.cat([x_t - self.config.shift, others], dim=1) / self.config.scale
        h = self.conv_in(_unshuffle(x, self.config.stem))
        skips = [h]
        for stage in self.down:
            for block in stage.block:
                h = block(h, temb)
                skips.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        h = self.conv_out(_normalised(self.norm_out, h))
        h = F.pixel_shuffle(h, self.config.stem).to(x_t.dtype) * self.config.scale
        return x_t + h if self.config.residual else self.config.shift + h


def to_bf16(network: UNet) -> UNet:
    """The network for evaluation under bf16 autocast: weights are rounded once, in place, instead of in every call.

    Estimates keep their bits where PyTorch's operators compute. The norms stay float32. Not for training.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    return network.requires_grad_(False)
