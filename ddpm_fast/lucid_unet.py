"""The U-Net of lucidrains/denoising-diffusion-pytorch (2.x), whose blocks are not Ho et al.'s.

Here for its trained models; new ones are `unet`. What differs: norms after the convolutions,
by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467); linear attention (Shen et al.
2018, arXiv:1812.01243) at all levels but some, and learned keys and values beside the image's own;
two skips per level; 2x2 patches and a convolution of size 1 instead of a strided one; and the first
feature map once more before the last block.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import count, from_fields, real
from .unet import timestep_embedding

MAX_LEVELS = 10


@dataclass(frozen=True)
class LucidUNetConfig:
    """What such a U-Net is made of.

    Attributes:
        in_channels, sample_size, learn_sigma, dropout: as in `UNetConfig`; two sizes.
        base_channels, init_channels, channel_mult: the first convolution has init_channels, level
            i takes what the one before gave and gives base_channels * channel_mult[i].
        full_attention: per level, whether its attention is over all pairs of positions.
        num_heads, head_channels: of the attention of each level; the last level's in the middle.
        memory: learned keys and values of each head.
    Raises ValueError, in one sentence, for values that make no network.
    """

    in_channels: int = 3
    sample_size: tuple[int, int] = (128, 128)
    base_channels: int = 64
    init_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    full_attention: tuple[bool, ...] = (False, False, False, True)
    num_heads: tuple[int, ...] = (4, 4, 4, 4)
    head_channels: tuple[int, ...] = (32, 32, 32, 32)
    memory: int = 4
    dropout: float = 0.0
    learn_sigma: bool = False

    def __post_init__(self) -> None:
        for name in ("sample_size", "channel_mult", "full_attention", "num_heads", "head_channels"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name} must be a list, got {str(value)[:80]!r}")
            object.__setattr__(self, name, tuple(value))
        levels = len(self.channel_mult)
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"channel_mult must have 1 to {MAX_LEVELS} levels, got {levels}")
        for name in ("full_attention", "num_heads", "head_channels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} needs one entry per level of channel_mult ({levels})")
        if not all(isinstance(v, bool) for v in (*self.full_attention, self.learn_sigma)):
            raise ValueError("full_attention and learn_sigma must be true or false")
        for name in ("in_channels", "base_channels", "init_channels"):
            count(name, getattr(self, name), 1, 2**14)
        for name in ("sample_size", "channel_mult", "num_heads", "head_channels"):
            for value in getattr(self, name):
                count(name, value, 1, 2**12)
        count("memory", self.memory, 0, 2**10)
        real("dropout", self.dropout, 0.0, 1.0)
        if self.base_channels % 2 or self.base_channels < 4:
            raise ValueError(f"base_channels must be even and above 2, got {self.base_channels}")
        if len(self.sample_size) != 2:
            raise ValueError(f"sample_size must have 2 numbers, got {self.sample_size}")
        self.check_size(self.sample_size)

    num_classes = None
    null_class = "none"

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels before the first level and after each."""
        return (self.init_channels, *(self.base_channels * m for m in self.channel_mult))

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W)."""
        return (self.in_channels, *self.sample_size)

    def check_size(self, size: tuple[int, ...]) -> None:
        """Raise unless every level can be halved and doubled back to the same size."""
        factor = 2 ** (len(self.channel_mult) - 1)
        if len(size) != 2 or any(s < 1 or s % factor for s in size):
            raise ValueError(f"this U-Net needs 2 sizes that are multiples of {factor}, got {size}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able; `from_dict` is the way back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LucidUNetConfig:
        """The configuration of `to_dict`; ValueError in one sentence if it is none."""
        return from_fields(cls, values)


class RMSNorm(nn.Module):
    """Each position's channels over their root mean square, times a weight per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.weight * len(self.weight) ** 0.5)[:, None, None]


class ResBlock(nn.Module):
    """conv, norm, scale and shift by time, SiLU, dropout; conv, norm, SiLU; + shortcut."""

    def __init__(self, config: LucidUNetConfig, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm1 = RMSNorm(out_channels)
        self.time = nn.Linear(4 * config.base_channels, 2 * out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = RMSNorm(out_channels)
        same = channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.dropout(F.silu(self.norm1(self.conv1(x)) * (1 + scale) + shift))
        return F.silu(self.norm2(self.conv2(h))) + self.shortcut(x)


class Attention(nn.Module):
    """Self-attention of every position with every other and with `memory`, with a residual."""

    def __init__(self, config: LucidUNetConfig, level: int, channels: int) -> None:
        super().__init__()
        self.heads, self.width = config.num_heads[level], config.head_channels[level]
        self.norm = RMSNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * self.heads * self.width, 1, bias=False)
        self.memory = nn.Parameter(torch.randn(2, self.heads, config.memory, self.width))
        self.proj = nn.Conv2d(self.heads * self.width, channels, 1)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (N, heads, width, positions)."""
        qkv = self.qkv(self.norm(x)).reshape(len(x), 3, self.heads, self.width, -1)
        return qkv.unbind(1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-1, -2) for part in self._qkv(x))
        keys, values = (m.expand(len(x), -1, -1, -1) for m in self.memory)
        k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(len(x), -1, *x.shape[2:]))


class LinearAttention(Attention):
    """softmax(q) (softmax(k)^T v): linear in the number of positions; a norm comes last."""

    def __init__(self, config: LucidUNetConfig, level: int, channels: int) -> None:
        super().__init__(config, level, channels)
        self.memory = nn.Parameter(torch.randn(2, self.heads, self.width, config.memory))
        self.norm_out = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._qkv(x)
        keys, values = (m.expand(len(x), -1, -1, -1) for m in self.memory)
        k, v = torch.cat((keys, k), dim=-1), torch.cat((values, v), dim=-1)
        q = q.softmax(dim=-2) * self.width**-0.5
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)
        h = (context.transpose(-1, -2) @ q).reshape(len(x), -1, *x.shape[2:])
        return x + self.norm_out(self.proj(h))


class Level(nn.Module):
    """Two residual blocks, the attention after the second, and what changes the size."""

    def __init__(
        self, config: LucidUNetConfig, level: int, channels: tuple[int, int], resample: nn.Module
    ) -> None:
        super().__init__()
        taken, given = channels
        kind = Attention if config.full_attention[level] else LinearAttention
        self.block1 = ResBlock(config, taken, given)
        self.block2 = ResBlock(config, taken, given)
        self.attention = kind(config, level, given)
        self.resample = resample


class LucidUNet(nn.Module):
    """Predicts eps, x_0 or v from x_t (N, C, H, W) and timesteps t (N,), as `unet.UNet` does.

    Without classes: class_labels must be None. Raises ValueError for shapes that do not fit.
    """

    def __init__(self, config: LucidUNetConfig) -> None:
        super().__init__()
        self.config = config
        base, widths, last = config.base_channels, config.widths, len(config.channel_mult) - 1
        self.time_mlp = nn.Sequential(
            nn.Linear(base, 4 * base), nn.GELU(), nn.Linear(4 * base, 4 * base)
        )
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 7, padding=3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            # Four pixels become four channels, in the order that pixel_unshuffle has.
            resample = (
                nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * narrow, wide, 1))
                if level < last
                else nn.Sequential(nn.Identity(), nn.Conv2d(narrow, wide, 3, padding=1))
            )
            self.down.append(Level(config, level, (narrow, narrow), resample))
        self.middle1 = ResBlock(config, wide, wide)
        self.middle_attention = Attention(config, last, wide)
        self.middle2 = ResBlock(config, wide, wide)
        for level in reversed(range(last + 1)):
            narrow, wide = widths[level], widths[level + 1]
            double = nn.Upsample(scale_factor=2.0, mode="nearest") if level else nn.Identity()
            resample = nn.Sequential(double, nn.Conv2d(wide, narrow, 3, padding=1))
            self.up.append(Level(config, level, (wide + narrow, wide), resample))
        self.last = ResBlock(config, 2 * widths[0], widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.config.check_size(tuple(x.shape[2:]))
        if x.shape[1] != self.config.in_channels or t.shape != (len(x),):
            raise ValueError(
                f"x must have {self.config.in_channels} channels and t one number per sample, got "
                f"{tuple(x.shape)} and {tuple(t.shape)}"
            )
        if class_labels is not None:
            raise ValueError("class_labels were given, but this model was trained without classes")
        emb = timestep_embedding(t, self.config.base_channels, "sin_cos", 1.0)
        emb = F.silu(self.time_mlp(emb.to(x.dtype)))
        first = h = self.conv_in(x)
        skips = []
        for level in self.down:
            skips.append(level.block1(h, emb))
            skips.append(level.attention(level.block2(skips[-1], emb)))
            h = level.resample(skips[-1])
        h = self.middle2(self.middle_attention(self.middle1(h, emb)), emb)
        for level in self.up:
            h = level.block1(torch.cat((h, skips.pop()), dim=1), emb)
            h = level.block2(torch.cat((h, skips.pop()), dim=1), emb)
            h = level.resample(level.attention(h))
        return self.conv_out(self.last(torch.cat((h, first), dim=1), emb))
