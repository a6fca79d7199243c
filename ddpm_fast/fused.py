"""The layers of a prepared U-Net: convolutions of packed weights, and normalisation in one kernel.

Tensors are (N, C, H, W) in channels_last order, float32 or bfloat16; series have H = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

Size = tuple[int, int]
DTYPES = (torch.float32, torch.bfloat16)
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
    """A convolution whose weight lies as the kernel wants it, so that no call reorders it.

    The kernel is `ops.conv2d` where that is faster than oneDNN.

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
        self.shape, self.size = tuple(weight.shape), size
        self.is_own = ops.is_conv2d_fastest(dtype)
        self.place = (list(padding), list(stride), [1, 1], 1)
        self.own_place = (self.shape[0], list(self.shape[2:]), list(stride), list(padding))
        bias_dtype = torch.float32 if self.is_own else dtype
        self.bias = None if bias is None else bias.detach().to(bias_dtype, copy=True)
        weight = weight.to(dtype, copy=True, memory_format=torch.channels_last)
        if self.is_own:
            self.is_fused, self.weight = True, ops.pack_conv2d(weight)
        else:
            self._take(weight)

    def _take(self, weight: Tensor) -> None:
        self.is_fused = is_packable(weight.dtype)
        if self.is_fused:
            shape = [16, weight.shape[1], *self.size]
            weight = _onednn._reorder_convolution_weight(weight.contiguous(), *self.place, shape)
        self.weight = weight

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a file, which oneDNN's order of the weight cannot go into."""
        is_onednn = self.is_fused and not self.is_own
        return self.__dict__ | {"weight": self.weight.to_dense() if is_onednn else self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.is_own:
            self._take(self.weight)
        elif not ops.is_conv2d_fastest(self.weight.dtype):
            raise RuntimeError(
                "this network was prepared for another CPU, by ddpm_fast's own convolutions: "
                "prepare the model anew"
            )

    def forward(self, x: Tensor, to: Tensor | None = None) -> Tensor:
        """The convolution of x, plus `to`, rounded once."""
        if self.is_own:
            return ops.conv2d(x, self.weight, self.bias, to, *self.own_place)
        if not self.is_fused:
            padding, stride, _, _ = self.place
            y = F.conv2d(x, self.weight, self.bias, stride, padding)
            return (y if to is None else y + to).contiguous(memory_format=torch.channels_last)
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

    def __init__(self, conv: nn.Module, dtype: torch.dtype, size: Size, bias: bool = True) -> None:
        super().__init__()
        weight = as_image(conv.weight)
        self.channels = weight.shape[0]
        self.phases = tuple(2 if taps == 3 else 1 for taps in weight.shape[2:])
        weights = [weight]
        for dim in (2, 3):
            if weight.shape[dim] == 3:
                weights = [part for w in weights for part in self._two_taps(w, dim)]
        biases = conv.bias.repeat(len(weights)) if bias else None
        padding = tuple(p - 1 for p in self.phases)
        self.conv = Conv(torch.cat(weights), biases, dtype, size, padding)

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
    """GroupNorm, and SiLU if `silu`, in one pass; see `ops.group_norm`."""

    def __init__(self, norm: nn.GroupNorm, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight = norm.weight.detach().float().clone()
        self.bias = norm.bias.detach().float().clone()
        self.is_fused = ops.resolve_backend("cpu")[0] == "cpu"

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        shift: Tensor | None = None,
        affine: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Of x, whose channels `skip`'s follow, plus shift; affine: other weights and biases."""
        weight, bias = affine or (self.weight, self.bias)
        return ops.group_norm(x, skip, shift, weight, bias, self.groups, self.eps, self.silu)
