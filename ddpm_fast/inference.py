"""A trained `UNet` as a network that computes the same function faster, on a CPU.

Nothing is compiled: weights are packed once, what the timestep decides is tabulated, and each block
is a few calls of fused operators. `prepare` is what the sampler calls.
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .device import memory_format
from .fused import (
    DTYPES,
    LONGEST_SCORES,
    Conv,
    Norm,
    Size,
    UpsampleConv,
    _image,
    _positions,
    as_image,
)
from .time_table import TimeTable
from .unet import Attention, Downsample, ResBlock, Stage, UNet, Upsample, check_inputs


def _conv(conv: nn.Module, dtype: torch.dtype, size: Size, bias: bool = True) -> Conv:
    padding = (0,) * (2 - len(conv.padding)) + conv.padding
    stride = (1,) * (2 - len(conv.stride)) + conv.stride
    return Conv(
        as_image(conv.weight), conv.bias if bias else None, dtype, size, padding, stride
    )


class FusedResBlock(nn.Module):
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
        self.resample, self.scale_shift = block.resample, block.scale_shift
        self.factors = (1,) * (4 - block.conv1.weight.ndim) + (2,) * (block.conv1.weight.ndim - 2)
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.columns = self._tabulate(block, table)
        self.channels = block.conv1.out_channels
        bias = block.conv1.bias if self.scale_shift else None
        if block.resample == "up":
            self.conv1 = UpsampleConv(as_image(block.conv1.weight), bias, dtype, size)
        else:
            self.conv1 = _conv(block.conv1, dtype, size, bias=self.scale_shift)
        self.conv2 = _conv(block.conv2, dtype, size)
        self.shortcut = nn.ModuleList()
        if not isinstance(block.shortcut, nn.Identity):
            weight, bias = as_image(block.shortcut.weight), block.shortcut.bias
            parts = [weight.shape[1] - skip_channels, *[skip_channels] * (skip_channels > 0)]
            for part in weight.split(parts, 1):
                self.shortcut.append(Conv(part, bias, dtype, size))
                bias = None

    def _tabulate(self, block: ResBlock, table: TimeTable) -> slice:
        """The first convolution's bias joins the shift, or the second norm's affine the scale."""
        weight, bias = block.time.weight.detach().float(), block.time.bias.detach().float()
        if not self.scale_shift:
            return table.add(weight, bias + block.conv1.bias.detach())
        (w_scale, w_shift), (b_scale, b_shift) = weight.chunk(2), bias.chunk(2)
        gamma, beta = self.norm2.weight, self.norm2.bias
        return table.add(
            torch.cat((gamma[:, None] * w_scale, beta[:, None] * w_scale + w_shift)),
            torch.cat((gamma * (1 + b_scale), beta * (1 + b_scale) + b_shift)),
        )

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, self.factors)
        factors = [float(f) for f in self.factors]
        return F.interpolate(x, scale_factor=factors, mode="nearest")

    def forward(self, x: Tensor, skip: Tensor | None, rows: Tensor) -> Tensor:
        h = self.norm1(x, skip)
        if self.resample == "down":
            h = self._resampled(h)
        h, rows = self.conv1(h), rows[:, self.columns]
        if self.scale_shift:
            h = self.norm2(h, None, None, *rows.chunk(2, 1))
        else:
            h = self.norm2(h, None, rows)
        if self.resample:
            x = self._resampled(x)
        if self.shortcut:
            x = self.shortcut[0](x)
            if skip is not None:
                x = self.shortcut[1](skip, x)
        elif skip is not None:
            x = torch.cat((x, skip), 1)
        return self.conv2(h, x)


class FusedAttention(nn.Module):
    """See `unet.Attention`. With one head, query and key, and value and output, are one projection.

    The scores (Wq x + bq) (Wk y + bk) are (Wk' Wq x + Wk' bq) y, plus what is equal for all y and
    so has no part in the softmax; and the softmax's weights have the sum 1.
    """

    def __init__(self, attention: Attention, dtype: torch.dtype, size: Size) -> None:
        super().__init__()
        self.norm, self.heads = Norm(attention.norm, silu=False), attention.heads
        weight, bias = as_image(attention.qkv.weight), attention.qkv.bias.detach().float()
        proj, proj_bias = as_image(attention.proj.weight), attention.proj.bias.detach().float()
        if attention.order == "heads":
            weight, bias = (
                v.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                for v in (weight, bias)
            )
        self.is_fused = self.heads == 1
        if self.is_fused:
            q, k, v = (w.flatten(1).double() for w in weight.chunk(3))
            b_q, _, b_v = bias.double().chunk(3)
            scale, out = 1 / math.sqrt(len(q)), proj.flatten(1).double()
            weight, bias = scale * (k.T @ q), scale * (k.T @ b_q)
            proj, proj_bias = out @ v, out @ b_v + proj_bias.double()
            weight, bias, proj, proj_bias = (v.float() for v in (weight, bias, proj, proj_bias))
            weight, proj = weight[:, :, None, None], proj[:, :, None, None]
        self.project = Conv(weight, bias, dtype, size)
        self.out = Conv(proj, proj_bias, dtype, size)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        projected = _positions(self.project(normed))
        if not self.is_fused:
            q, k, v = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            keys = _positions(normed)
            if keys.shape[1] > LONGEST_SCORES:
                q, k = projected.unsqueeze(1), keys.unsqueeze(1)
                h = F.scaled_dot_product_attention(q, k, k, scale=1.0).squeeze(1)
            else:
                h = torch.bmm(torch.bmm(projected, keys.mT).softmax(-1), keys)
        return self.out(_image(h, x), x)


class FusedStage(nn.Module):
    """See `unet.Stage`."""

    def __init__(self, stage: Stage, table: TimeTable, dtype, size: Size, skip: int = 0) -> None:
        super().__init__()
        self.block = FusedResBlock(stage.block, table, dtype, size, skip)
        attention = stage.attention
        self.attention = None if attention is None else FusedAttention(attention, dtype, size)

    def forward(self, x: Tensor, skip: Tensor | None, rows: Tensor) -> Tensor:
        x = self.block(x, skip, rows)
        return x if self.attention is None else self.attention(x)


class FusedResampler(nn.Module):
    """See `unet.Downsample` and `unet.Upsample`."""

    def __init__(self, layer: Downsample | Upsample, dtype: torch.dtype, size: Size) -> None:
        super().__init__()
        if isinstance(layer, Upsample):
            self.pad = ()
            self.conv = UpsampleConv(as_image(layer.conv.weight), layer.conv.bias, dtype, size)
        else:
            self.pad = layer.pad
            self.conv = _conv(layer.conv, dtype, size)

    def forward(self, x: Tensor, skip: None, rows: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad) if self.pad else x)


class FusedUNet(nn.Module):
    """Called as the `UNet` that it was made of, with x in its own dtype; no gradients."""

    def __init__(self, unet: UNet, dtype: torch.dtype) -> None:
        super().__init__()
        config = self.config = unet.config
        self.dtype = dtype
        self.table = TimeTable(unet)
        size = (1,) * (2 - config.dims) + config.sample_size
        self.conv_in = _conv(unet.conv_in, dtype, size)
        skips = [config.base_channels]
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for module in unet.down:
            self.down.append(self._fused(module, size, 0))
            if not isinstance(module, Stage):
                size = self._halved(size)
            channels = module.block.conv1 if isinstance(module, Stage) else None
            skips.append(channels.out_channels if channels is not None else skips[-1])
        for module in unet.middle:
            self.middle.append(self._fused(module, size, 0))
        for module in unet.up:
            self.up.append(self._fused(module, size, skips.pop() if isinstance(module, Stage) else 0))
            if not isinstance(module, Stage):
                size = tuple(2 * s if s > 1 or config.dims == 2 else s for s in size)
        self.norm_out = Norm(unet.norm_out)
        self.conv_out = _conv(unet.conv_out, dtype, size)
        self.eval().requires_grad_(False)

    def _halved(self, size: Size) -> Size:
        return tuple(s // 2 if i >= 2 - self.config.dims else s for i, s in enumerate(size))

    def _fused(self, module: nn.Module, size: Size, skip: int) -> nn.Module:
        if isinstance(module, Stage):
            return FusedStage(module, self.table, self.dtype, size, skip)
        if isinstance(module, ResBlock):
            return FusedResBlock(module, self.table, self.dtype, size, skip)
        return FusedResampler(module, self.dtype, size)

    def _run(self, x: Tensor, rows: Tensor) -> Tensor:
        h = self.conv_in(x)
        skips = [h]
        for module in self.down:
            h = module(h, None, rows)
            skips.append(h)
        for module in self.middle:
            h = module(h, None, rows)
        for module in self.up:
            h = module(h, skips.pop() if isinstance(module, FusedStage) else None, rows)
        return self.conv_out(self.norm_out(h))

    GROUP = 0
    pool = None

    @torch.no_grad()
    def _run_alone(self, x, rows):
        return self._run(x, rows)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        check_inputs(self.config, x, t, class_labels)
        rows = self.table(t, class_labels)
        if self.config.dims == 1:
            x = x.unsqueeze(2)
        x = x.contiguous(memory_format=torch.channels_last)
        if self.GROUP and len(x) > self.GROUP:
            if self.pool is None:
                n = torch.get_num_threads()
                FusedUNet.pool = ThreadPoolExecutor(n, initializer=lambda: torch.set_num_threads(1))
                list(self.pool.map(lambda _: __import__("time").sleep(0.05), range(2*n)))
                torch.set_num_threads(n)
            xs = x.split(self.GROUP)
            rs = [rows] * len(xs) if len(rows) == 1 else rows.split(self.GROUP)
            out = torch.cat(list(self.pool.map(self._run_alone, xs, rs)))
        else:
            out = self._run(x, rows)
        return out.squeeze(2) if self.config.dims == 1 else out


def prepare(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The network for sampling: on `device`, in `dtype`."""
    if isinstance(unet, UNet) and device.type == "cpu" and dtype in DTYPES:
        return FusedUNet(unet, dtype)
    network = copy.deepcopy(unet).to(device, dtype).eval().requires_grad_(False)
    if any(p.ndim == 4 for p in network.parameters()):
        network.to(memory_format=memory_format(device, dtype, 4))
    return network
