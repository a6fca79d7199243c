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
    """Sinusoidal embedding of the timesteps t (N,), as float32 (N, channels), channels even.

    Angle i is t * 10000 ** (-i / (half - shift)), i below half = channels / 2. order: "sin_cos"
    (Ho et al., with shift 1), "cos_sin" (guided-diffusion, with shift 0) or "interleaved".
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


def _embedding(rows: int, width: int) -> nn.Embedding:
    """With normal weights; but not on "meta", where drawing them imports all of torch._dynamo."""
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        weight.normal_()
    return nn.Embedding.from_pretrained(weight, freeze=False)


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
        dims, width = config.dims, config.time_channels[1]
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

    def __init__(self, config: UNetConfig, channels: int, normalised: bool = True) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else config.num_heads
        self.order = config.qkv_order
        self.norm = nn.Identity()
        if normalised:
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
    """A convolution of stride 2; "asymmetric" is TensorFlow's padding, as in Ho et al."""

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

    def __init__(
        self, config: UNetConfig, channels: int, out: int, attention: bool, normalised: bool = True
    ) -> None:
        super().__init__()
        self.block = ResBlock(config, channels, out)
        self.attention = Attention(config, out, normalised) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.block(x, emb)
        return x if self.attention is None else self.attention(x)


def embed(
    config: UNetConfig,
    time_mlp: nn.Sequential,
    class_embedding: nn.Embedding | None,
    t: Tensor,
    class_labels: Tensor | None,
) -> Tensor:
    """The activated embedding (N, time_channels[1]) that every block projects."""
    channels, order = config.time_channels[0], config.embedding_order
    t = t if config.timestep_scale == 1 else t.float() * config.timestep_scale
    emb = timestep_embedding(t, channels, order, config.embedding_shift)
    emb = time_mlp(emb.to(time_mlp[0].weight.dtype))
    if class_embedding is not None:
        if class_labels is None:
            class_labels = torch.full_like(t, config.num_classes, dtype=torch.int64)
        rows = class_embedding.weight
        if config.null_class == "zero":
            rows = F.pad(rows, (0, 0, 0, 1))
        emb = emb + F.embedding(class_labels, rows)
    return F.silu(emb)


def check_inputs(config: UNetConfig, x: Tensor, t: Tensor, class_labels: Tensor | None) -> None:
    """Raise ValueError, in one sentence, for inputs that a U-Net of this kind does not take."""
    c, n = config, x.shape[0]
    if n == 0:
        raise ValueError(f"x must have at least one sample, got shape {tuple(x.shape)}")
    c.check_size(tuple(x.shape[2:]))
    if x.shape[1] != c.in_channels:
        raise ValueError(f"x must have {c.in_channels} channels, got {x.shape[1]}")
    if t.shape != (n,):
        raise ValueError(f"t must have shape ({n},), one per sample, got {tuple(t.shape)}")
    if class_labels is None:
        if c.num_classes and c.null_class == "none":
            raise ValueError("this model was trained without a null class: give class_labels")
        return
    if c.num_classes is None:
        raise ValueError("class_labels were given, but this model was trained without classes")
    if class_labels.shape != (n,) or class_labels.dtype != torch.int64:
        raise ValueError(
            f"class_labels must be int64 of shape ({n},), got {class_labels.dtype} of shape "
            f"{tuple(class_labels.shape)}"
        )
    last = c.num_classes - (c.null_class == "none")
    if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high > last:
            raise ValueError(f"class_labels must be in 0..{last}, got {low} to {high}")


class UNet(nn.Module):
    """Predicts the noise in x_t (or x_0, or v: the checkpoint says which).

    Args of forward:
        x: x_t, (N, C, *size), each size a multiple of 2 ** (levels - 1).
        t: timesteps of the schedule, (N,), integer or float.
        class_labels: (N,) int64 in 0..num_classes, the last meaning "no class", as None does for
            all. Only for class-conditional models; with null_class "none", 0..num_classes - 1.
    Returns (N, C, *size), or (N, 2C, *size) with learned variance.
    Raises ValueError, in one sentence, for shapes and labels that do not fit. Labels on a GPU are
    not looked at (that would wait for it): there, one out of range is CUDA's device-side assert.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        ch, (sinusoids, width) = config.base_channels, config.time_channels
        self.time_mlp = nn.Sequential(
            nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width)
        )
        rows = (config.num_classes or 0) + (config.null_class == "row")
        self.class_embedding = _embedding(rows, width) if config.num_classes else None
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
            [
                Stage(config, ch, ch, config.mid_attention, config.mid_attention_norm),
                Stage(config, ch, ch, False),
            ]
        )
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(config.level_channels))):
            for block in range(config.num_res_blocks + 1):
                here = config.up_attention == "every" or block == config.num_res_blocks
                attention = config.attention_levels[level] and here
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

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        check_inputs(self.config, x, t, class_labels)
        emb = embed(self.config, self.time_mlp, self.class_embedding, t, class_labels)
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
