"""The blocks of a prepared U-Net, each made of the block of `unet.py` that it stands for.

`is_fused` is False where a block needs PyTorch's ordinary operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import CpuLayers
from .fused_cuda import GpuLayers
from .fused_layer import Layer, Size, as_image, as_pair
from .moments import Features, tensor
from .time_table import TimeTable
from .unet import Attention, Downsample, ResBlock, Stage, Upsample

Layers = CpuLayers | GpuLayers
Activation = Tensor | Features  # what layers give each other


def fits_half(norm: nn.GroupNorm, conv: nn.Module, size: Size) -> bool:
    """Whether no input of this size makes a norm and the convolution after it overflow float16.

    Of n values that are normalised together none is beyond sqrt(n). The bound is far from what
    happens; beyond it, with larger images than the trained ones, a run says what is not finite.
    """
    values = norm.num_channels // norm.num_groups * size[0] * size[1]
    largest = math.sqrt(values) * norm.weight.detach().abs() + norm.bias.detach().abs()
    sums = as_image(conv.weight).abs().sum((2, 3)) @ largest.float() + conv.bias.detach().abs()
    return bool(sums.max() <= torch.finfo(torch.float16).max)


class FusedResBlock(Layer):
    """See `unet.ResBlock`. The input may come in two parts, x and skip."""

    def __init__(
        self,
        block: ResBlock,
        table: TimeTable,
        layers: Layers,
        size: Size,
        skip_channels: int = 0,
    ) -> None:
        super().__init__()
        dims = block.conv1.weight.ndim - 2
        self.resample, self.scale_shift = block.resample, block.scale_shift
        self.is_fused = self.resample is None
        self.factors = (1,) * (2 - dims) + (2,) * dims
        # The first convolution's bias is added by the second norm.
        self.shift = block.conv1.bias.detach().float().clone() if self.scale_shift else None
        first = layers.upsample if block.resample == "up" else layers.conv
        self.conv1 = first(block.conv1, size, bias=False)
        self.conv2 = layers.conv(block.conv2, size)
        self.norm1 = layers.norm(block.norm1, to=None if self.resample else self.conv1)
        self.norm2 = layers.norm(block.norm2, to=self.conv2)
        if self.norm1.half and self.norm2.half:
            self.conv1.half = fits_half(block.norm1, block.conv1, size)
        self.column = self._tabulate(block, table)
        changes = not isinstance(block.shortcut, nn.Identity)
        self.shortcut = layers.shortcut(block.shortcut, size, skip_channels) if changes else None

    def _tabulate(self, block: ResBlock, table: TimeTable) -> int:
        """What is added before the second norm, or the weight and bias that it takes."""
        weight, bias = block.time.weight.detach().float(), block.time.bias.detach().float()
        if not self.scale_shift:
            return table.add(weight, bias + block.conv1.bias.detach())
        (scale, shift), (scale_bias, shift_bias) = weight.chunk(2), bias.chunk(2)
        norm_weight, norm_bias = self.norm2.weight, self.norm2.bias
        return table.add(
            torch.cat((norm_weight[:, None] * scale, norm_bias[:, None] * scale + shift)),
            torch.cat((norm_weight * (1 + scale_bias), norm_bias * (1 + scale_bias) + shift_bias)),
        )

    def _resampled(self, x: Activation) -> Tensor:
        x = tensor(x)
        if self.resample == "down":
            return F.avg_pool2d(x, self.factors)
        factors = [float(factor) for factor in self.factors]
        return F.interpolate(x, scale_factor=factors, mode="nearest")

    def forward(self, x: Activation, skip: Activation | None, rows: Sequence[Tensor]) -> Activation:
        h = self.norm1(x, skip)
        if self.resample == "down":
            h = self._resampled(h)
        h, row = self.conv1(h), rows[self.column]
        if self.scale_shift:
            h = self.norm2(h, shift=self.shift, affine=row.chunk(2, 1))
        else:
            h = self.norm2(h, shift=row)
        if self.resample:
            x = self._resampled(x)
        return self.conv2(h, x if self.shortcut is None else self.shortcut(x, skip))


class FusedAttention(Layer):
    """See `unet.Attention`. With one head, query and key, and value and output, are one projection.

    The score (Wq x + bq) (Wk y + bk) is (Wk' Wq x + Wk' bq) y, and something equal for all y, which
    the softmax does not see. Its weights have the sum 1, so Wo may come before them.
    """

    def __init__(self, attention: Attention, layers: Layers, size: Size) -> None:
        super().__init__()
        normalised = isinstance(attention.norm, nn.GroupNorm)
        self.norm = layers.norm(attention.norm, silu=False) if normalised else nn.Identity()
        self.heads = attention.heads
        weight, bias = as_image(attention.qkv.weight), attention.qkv.bias.detach().float()
        out, out_bias = as_image(attention.proj.weight), attention.proj.bias.detach().float()
        out = out.flatten(1)
        if attention.order == "heads":
            weight, bias = (
                v.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                for v in (weight, bias)
            )
        q, k, v = weight.flatten(1).double().chunk(3)
        q_bias, k_bias, v_bias = bias.double().chunk(3)
        scale = math.sqrt(self.heads / len(q))
        if self.heads == 1:
            o = out.double()
            weight, bias = scale * k.T @ q, scale * k.T @ q_bias
            out, out_bias = o @ v, o @ v_bias + out_bias
        else:
            weight, bias = torch.cat((scale * q, k, v)), torch.cat((scale * q_bias, k_bias, v_bias))
        self.project = layers.projection(weight, bias, size)
        self.attend = layers.attend(self.heads)
        self.out = layers.projection(out, out_bias, size)

    def forward(self, x: Activation) -> Activation:
        normed = self.norm(x)
        projected = self.project(normed)
        inputs = (projected, normed, normed) if self.heads == 1 else projected.chunk(3, 1)
        return self.out(self.attend(*inputs), x)


class FusedStage(Layer):
    """See `unet.Stage`."""

    def __init__(
        self,
        stage: Stage,
        table: TimeTable,
        layers: Layers,
        size: Size,
        skip_channels: int = 0,
    ) -> None:
        super().__init__()
        self.block = FusedResBlock(stage.block, table, layers, size, skip_channels)
        attention = stage.attention
        self.attention = None if attention is None else FusedAttention(attention, layers, size)

    def forward(self, x: Activation, skip: Activation | None, rows: Sequence[Tensor]) -> Activation:
        x = self.block(x, skip, rows)
        return x if self.attention is None else self.attention(x)


class FusedResampler(Layer):
    """See `unet.Downsample` and `unet.Upsample`."""

    def __init__(self, layer: Downsample | Upsample, layers: Layers, size: Size) -> None:
        super().__init__()
        is_up = isinstance(layer, Upsample)
        if is_up:
            self.conv = layers.upsample(layer.conv, size)
        else:
            # Of F.pad's (before, after) of each dimension, the last one first.
            end = as_pair(layer.pad[1::2][::-1], 0)
            self.conv = layers.conv(layer.conv, size, end=end)

    def forward(self, x: Activation, skip: None, rows: Sequence[Tensor]) -> Activation:
        return self.conv(tensor(x))
