"""The U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B), and its published variations.

This is the network that is trained, and the reference for whatever computes the same function
faster. What it is made of is a `UNetConfig`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet_config import UNetConfig


def timestep_embedding(t: Tensor, channels: int, order: str, shift: float) -> Tensor:
    """Sinusoidal embedding of the timesteps t (N,), as float32 (N, channels).

    Ho et al. use sines then cosines with shift 1, guided-diffusion cosines then sines with 0.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)[None]
    sin, cos = angles.sin(), angles.cos()
    if order == "interleaved":
        return torch.stack((sin, cos), dim=-1).flatten(1)
    return torch.cat((sin, cos) if order == "sin_cos" else (cos, sin), dim=1)


def _conv(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    return (nn.Conv1d if dims == 1 else nn.Conv2d)(*args, **kwargs)


def _zero(module: nn.Module) -> nn.Module:
    """A layer that starts as zero, so that each block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, dropout, conv, + shortcut; optionally resampling."""

    def __init__(
        self, config: UNetConfig, channels: int, out_channels: int, resample: str | None = None
    ) -> None:
        super().__init__()
        dims, width = config.dims, 4 * config.base_channels
        self.resample = resample
        self.scale_shift = config.scale_shift_norm
        self.norm1 = nn.GroupNorm(config.norm_groups, channels, config.norm_eps)
        self.conv1 = _conv(dims, channels, out_channels, 3, padding=1)
        self.time = nn.Linear(width, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _zero(_conv(dims, out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.shortcut = nn.Identity() if same else _conv(dims, channels, out_channels, 1)
        self._pool = F.avg_pool1d if dims == 1 else F.avg_pool2d

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return self._pool(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))
        time = self.time(emb).to(h.dtype)
        time = time.view(*time.shape, *[1] * (x.ndim - 2))
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(self._resampled(x)) + h


class Attention(nn.Module):
    """Self-attention over all positions, with a residual connection."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else config.num_heads
        self.order = config.qkv_order
        self.norm = nn.GroupNorm(config.norm_groups, channels, config.norm_eps)
        self.qkv = _conv(config.dims, channels, 3 * channels, 1)
        self.proj = _zero(_conv(config.dims, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        split = (3, self.heads) if self.order == "qkv" else (self.heads, 3)
        qkv = self.qkv(self.norm(x)).reshape(n, *split, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1 if self.order == "qkv" else 2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(x.shape))


class Downsample(nn.Module):
    """A convolution of stride 2. TensorFlow's padding, as in Ho et al., adds one at the end only."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        symmetric = config.downsample_padding == "symmetric"
        self.pad = () if symmetric else (0, 1) * config.dims
        padding = 1 if symmetric else 0
        self.conv = _conv(config.dims, channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad) if self.pad else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.conv = _conv(config.dims, channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """A residual block, and the attention that may follow it."""

    def __init__(self, config: UNetConfig, channels: int, out: int, attention: bool) -> None:
        super().__init__()
        self.block = ResBlock(config, channels, out)
        self.attention = Attention(config, out) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.block(x, emb)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """Predicts the noise in x_t (or x_0, or v: the checkpoint says which).

    Args of forward:
        x: x_t, (N, C, *size), each size a multiple of 2 ** (levels - 1).
        t: timesteps, (N,), integer or float (models trained on rescaled timesteps).
        class_labels: (N,) int64 in 0..num_classes, the last meaning "no class"; None is all of
            those. Only for class-conditional models.
    Returns (N, C, *size), or (N, 2C, *size) with learned variance.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        ch, width = config.base_channels, 4 * config.base_channels
        self.time_mlp = nn.Sequential(nn.Linear(ch, width), nn.SiLU(), nn.Linear(width, width))
        rows = (config.num_classes or 0) + (config.null_class == "row")
        self.class_embedding = nn.Embedding(rows, width) if config.num_classes else None
        self.conv_in = _conv(config.dims, config.in_channels, ch, 3, padding=1)

        self.down, skips = nn.ModuleList(), [ch]
        last = len(config.channel_mult) - 1
        for level, out in enumerate(config.level_channels):
            for _ in range(config.num_res_blocks):
                self.down.append(Stage(config, ch, out, config.attention_levels[level]))
                ch = out
                skips.append(ch)
            if level < last:
                self.down.append(self._resampler(config, ch, "down"))
                skips.append(ch)
        self.middle = nn.ModuleList(
            [Stage(config, ch, ch, config.mid_attention), Stage(config, ch, ch, False)]
        )
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(config.level_channels))):
            for _ in range(config.num_res_blocks + 1):
                attention = config.attention_levels[level]
                self.up.append(Stage(config, ch + skips.pop(), out, attention))
                ch = out
            if level > 0:
                self.up.append(self._resampler(config, ch, "up"))
        self.norm_out = nn.GroupNorm(config.norm_groups, ch, config.norm_eps)
        self.conv_out = _zero(_conv(config.dims, ch, config.out_channels, 3, padding=1))

    @staticmethod
    def _resampler(config: UNetConfig, channels: int, way: str) -> nn.Module:
        if config.resblock_updown:
            return ResBlock(config, channels, channels, resample=way)
        return (Downsample if way == "down" else Upsample)(config, channels)

    def embed(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """The activated embedding (N, 4 * base_channels) that every block projects."""
        c = self.config
        emb = timestep_embedding(t, c.base_channels, c.embedding_order, c.embedding_shift)
        emb = self.time_mlp(emb.to(self.time_mlp[0].weight.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(t, c.num_classes, dtype=torch.int64)
            if c.null_class == "zero":
                given = (class_labels < c.num_classes)[:, None]
                emb = emb + self.class_embedding(class_labels.clamp(max=c.num_classes - 1)) * given
            else:
                emb = emb + self.class_embedding(class_labels)
        return F.silu(emb)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.config.check_size(tuple(x.shape[2:]))
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("class_labels were given, but this model was trained without classes")
        if class_labels is None and self.class_embedding is not None:
            if self.config.null_class == "none":
                raise ValueError("this model was trained without a null class: give class_labels")
        emb = self.embed(t, class_labels)
        h = self.conv_in(x)
        skips = [h]
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else module(h, emb)
            skips.append(h)
        for module in self.middle:
            h = module(h, emb)
        for module in self.up:
            if isinstance(module, Stage):
                h = module(torch.cat((h, skips.pop()), dim=1), emb)
            else:
                h = module(h) if isinstance(module, Upsample) else module(h, emb)
        return self.conv_out(F.silu(self.norm_out(h)))
