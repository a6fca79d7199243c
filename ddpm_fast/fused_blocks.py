"""The blocks of a prepared U-Net, each made of the block of `unet.py` that it stands for.

`is_fused` is False where a block needs PyTorch's ordinary operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .fused import Conv, Layer, Norm, Size, UpsampleConv, as_image
from .time_table import TimeTable
from .unet import Attention, Downsample, ResBlock, Stage, Upsample

LONGEST_SCORES = 512  # positions up to which torch's attention keeps its scores whole


def packed(
    conv: nn.Module, dtype: torch.dtype, size: Size, bias: bool = True, exact: bool = False
) -> Conv:
    """A trained convolution, of one dimension or two, as a `Conv`."""
    missing = 2 - len(conv.padding)
    padding, stride = (0,) * missing + conv.padding, (1,) * missing + conv.stride
    weight, values = as_image(conv.weight), conv.bias if bias else None
    return Conv(weight, values, dtype, size, padding, stride, exact)


def _fits_half(block: ResBlock, size: Size) -> bool:
    """Whether no input of this size makes the first convolution overflow float16.

    Of n values that are normalised together none is beyond sqrt(n).
    """
    norm, conv = block.norm1, block.conv1
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
        dtype: torch.dtype,
        size: Size,
        skip_channels: int = 0,
    ) -> None:
        super().__init__()
        dims = block.conv1.weight.ndim - 2
        self.resample, self.scale_shift = block.resample, block.scale_shift
        self.is_fused = self.resample is None
        self.factors = (1,) * (2 - dims) + (2,) * dims
        bias = self.scale_shift  # otherwise it is in the table
        if block.resample == "up":
            self.conv1 = UpsampleConv(block.conv1, dtype, size, bias)
        else:
            self.conv1 = packed(block.conv1, dtype, size, bias)
        self.conv2 = packed(block.conv2, dtype, size)
        self.norm1 = Norm(block.norm1, to=None if self.resample else self.conv1)
        self.norm2 = Norm(block.norm2, to=self.conv2)
        if self.norm1.half and self.norm2.half:
            self.conv1.half = _fits_half(block, size)
        self.column = self._tabulate(block, table)
        self.shortcut = self.skip_shortcut = None
        if not isinstance(block.shortcut, nn.Identity):
            weight, bias = as_image(block.shortcut.weight), block.shortcut.bias
            channels = weight.shape[1] - skip_channels
            self.shortcut = Conv(weight[:, :channels], bias, dtype, size)
            if skip_channels:
                self.skip_shortcut = Conv(weight[:, channels:], None, dtype, size)

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

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, self.factors)
        factors = [float(factor) for factor in self.factors]
        return F.interpolate(x, scale_factor=factors, mode="nearest")

    def forward(self, x: Tensor, skip: Tensor | None, rows: Sequence[Tensor]) -> Tensor:
        h = self.norm1(x, skip)
        if self.resample == "down":
            h = self._resampled(h)
        h, row = self.conv1(h), rows[self.column]
        h = self.norm2(h, affine=row.chunk(2, 1)) if self.scale_shift else self.norm2(h, shift=row)
        if self.resample:
            x = self._resampled(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
            if skip is not None:
                x = self.skip_shortcut(skip, x)
        return self.conv2(h, x)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, heads * C, H, W) as (N, heads, H * W, C); a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)


class FusedAttention(Layer):
    """See `unet.Attention`. With one head, query and key, and value and output, are one projection.

    The score (Wq x + bq) (Wk y + bk) is (Wk' Wq x + Wk' bq) y, and something equal for all y, which
    the softmax does not see. Its weights have the sum 1, so Wo may come before them.
    """

    def __init__(self, attention: Attention, dtype: torch.dtype, size: Size) -> None:
        super().__init__()
        normalised = isinstance(attention.norm, nn.GroupNorm)
        self.norm = Norm(attention.norm, silu=False) if normalised else nn.Identity()
        self.heads = attention.heads
        weight, bias = as_image(attention.qkv.weight), attention.qkv.bias.detach().float()
        out, out_bias = as_image(attention.proj.weight), attention.proj.bias.detach().float()
        if attention.order == "heads":
            weight, bias = (
                v.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                for v in (weight, bias)
            )
        q, k, v = weight.flatten(1).double().chunk(3)
        q_bias, k_bias, v_bias = bias.double().chunk(3)
        scale = math.sqrt(self.heads / len(q))
        if self.heads == 1:
            o = out.flatten(1).double()
            weight, bias = scale * k.T @ q, scale * k.T @ q_bias
            out, out_bias = (o @ v)[..., None, None], o @ v_bias + out_bias
        else:
            weight, bias = torch.cat((scale * q, k, v)), torch.cat((scale * q_bias, k_bias, v_bias))
        self.project = Conv(weight[..., None, None], bias, dtype, size)
        self.out = Conv(out, out_bias, dtype, size)
        self.is_own = ops.is_attention_fastest(dtype)
        self.is_fused = self.is_own or self.heads == 1

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.is_own:
            return ops.attention(query, key, value, self.heads)
        q, k, v = (_heads(x, self.heads) for x in (query, key, value))
        if self.heads > 1 or q.shape[2] > LONGEST_SCORES:
            h = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            h = torch.bmm(torch.bmm(q[:, 0], k[:, 0].mT).softmax(-1), v[:, 0]).unsqueeze(1)
        return h.transpose(1, 2).flatten(2).unflatten(1, query.shape[2:]).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        projected = self.project(normed)
        inputs = (projected, normed, normed) if self.heads == 1 else projected.chunk(3, 1)
        return self.out(self._attend(*inputs), x)


class FusedStage(Layer):
    """See `unet.Stage`."""

    def __init__(
        self,
        stage: Stage,
        table: TimeTable,
        dtype: torch.dtype,
        size: Size,
        skip_channels: int = 0,
    ) -> None:
        super().__init__()
        self.block = FusedResBlock(stage.block, table, dtype, size, skip_channels)
        attention = stage.attention
        self.attention = None if attention is None else FusedAttention(attention, dtype, size)

    def forward(self, x: Tensor, skip: Tensor | None, rows: Sequence[Tensor]) -> Tensor:
        x = self.block(x, skip, rows)
        return x if self.attention is None else self.attention(x)


class FusedResampler(Layer):
    """See `unet.Downsample` and `unet.Upsample`."""

    def __init__(self, layer: Downsample | Upsample, dtype: torch.dtype, size: Size) -> None:
        super().__init__()
        is_up = isinstance(layer, Upsample)
        self.pad = () if is_up else layer.pad
        self.conv = (UpsampleConv if is_up else packed)(layer.conv, dtype, size)

    def forward(self, x: Tensor, skip: None, rows: Sequence[Tensor]) -> Tensor:
        return self.conv(F.pad(x, self.pad) if self.pad else x)
