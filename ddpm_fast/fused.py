"""The layers of a prepared U-Net: convolutions of packed weights, and normalisation in one kernel.

Tensors are (N, C, H, W) in channels_last order, float32 or bfloat16; series have H = 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backend

Size = tuple[int, int]
DTYPES = (torch.float32, torch.bfloat16)
LONGEST_SCORES = 512  # positions up to which attention's scores are kept whole
_onednn = torch.ops.mkldnn


def is_packable(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's convolutions, in this dtype, on this CPU."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or bool(_onednn._is_mkldnn_bf16_supported())


def as_image(weight: Tensor) -> Tensor:
    """A convolution's weight (O, I, [kH,] kW) as (O, I, kH, kW), in float32."""
    weight = weight.detach().float()
    return weight if weight.ndim == 4 else weight.unsqueeze(2)


class Conv(nn.Module):
    """A convolution whose weight lies as oneDNN wants it, so that no call reorders it.

    weight (O, I, kH, kW) and bias (O) float32, padding on both sides; size: (H, W) of the usual
    input, which decides the order of the weight, but not what may be given.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        size: Size,
        padding: Size = (0, 0),
        stride: Size = (1, 1),
    ) -> None:
        super().__init__()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.is_fused = is_packable(dtype)
        self.place = (list(padding), list(stride), [1, 1], 1)
        weight = weight.to(dtype)
        if self.is_fused:
            shape = [16, weight.shape[1], *size]
            weight = _onednn._reorder_convolution_weight(weight.contiguous(), *self.place, shape)
        self.weight = weight

    def forward(self, x: Tensor, to: Tensor | None = None) -> Tensor:
        """The convolution of x, plus `to`, rounded once."""
        if not self.is_fused:
            padding, stride, _, _ = self.place
            y = F.conv2d(x, self.weight, self.bias, stride, padding)
            return y if to is None else y + to
        if to is None:
            return _onednn._convolution_pointwise.default(
                x, self.weight, self.bias, *self.place, "none", [], ""
            )
        return _onednn._convolution_pointwise.binary(
            x, to, self.weight, self.bias, *self.place, "add", None, None, [], None
        )


class UpsampleConv(nn.Module):
    """Nearest-neighbour doubling and a convolution with 3 taps, on the small input.

    An output pixel at 2 i + phase reads the inputs i - 1 and i, or i and i + 1, one of them twice:
    a convolution with 2 taps. One convolution makes all phases as channels, which are then put in
    their places. Algebraically the same, at 4/9 of the multiplications for images.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, size: Size
    ) -> None:
        super().__init__()
        self.channels = weight.shape[0]
        self.phases = tuple(2 if taps == 3 else 1 for taps in weight.shape[2:])
        weights = [weight]
        for dim in (2, 3):
            if weight.shape[dim] == 3:
                weights = [part for w in weights for part in self._two_taps(w, dim)]
        bias = None if bias is None else bias.repeat(len(weights))
        padding = tuple(p - 1 for p in self.phases)
        self.conv = Conv(torch.cat(weights), bias, dtype, size, padding)

    @staticmethod
    def _two_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = weight.unbind(dim)
        return (
            torch.stack((first, middle + last), dim),
            torch.stack((first + middle, last), dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        rows, columns = self.phases
        y = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (rows, columns, self.channels))
        out = y.new_empty(n, height, rows, width, columns, self.channels)
        for i in range(rows):
            for j in range(columns):
                out[:, :, i, :, j] = y[:, i : i + height, j : j + width, i, j]
        return out.view(n, height * rows, width * columns, self.channels).permute(0, 3, 1, 2)


class Norm(nn.Module):
    """GroupNorm, and SiLU if `silu`, in one pass of the compiled kernel where that is built."""

    def __init__(self, norm: nn.GroupNorm, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight = norm.weight.detach().float().clone()
        self.bias = norm.bias.detach().float().clone()
        self.is_fused = backend.extension is not None

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        shift: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Of x, whose channels `skip`'s follow, plus `shift`.

        shift, and weight and bias in place of the norm's own: float32 (1, C) or (N, C).
        """
        if weight is None:
            weight, bias = self.weight, self.bias
        if not self.is_fused:
            return self._unfused(x if skip is None else torch.cat((x, skip), 1), shift, weight, bias)
        shape = list(x.shape)
        if skip is not None:
            shape[1] += skip.shape[1]
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        torch.ops.ddpm_fast.group_norm.default(
            out, x, skip, shift, weight, bias, self.groups, self.eps, self.silu
        )
        return out

    def _unfused(self, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        h = x.float()
        if shift is not None:
            h = h + shift[:, :, None, None]
        h = F.group_norm(h, self.groups, eps=self.eps)
        weight, bias = (v.reshape(-1, h.shape[1], 1, 1) for v in (weight, bias))
        h = torch.addcmul(bias, h, weight)
        return (F.silu(h) if self.silu else h).to(x.dtype, memory_format=torch.channels_last)


def _positions(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H * W, C); a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(x: Tensor, like: Tensor) -> Tensor:
    """(N, H * W, C) as (N, C, H, W); a view."""
    n, _, height, width = like.shape
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
