"""The layers of a U-Net prepared for a GPU: cuDNN's and cuBLAS's, and fused kernels in between.

Tensors are (N, C, H, W) in channels_last order, float32, bfloat16 or float16; series have H = 1.
All can be captured in a CUDA graph, once a call with the same shapes has let cuDNN choose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .fused_layer import Layer, Size, as_image, as_pair, heads_of, image_of, phases
from .moments import Features, tensor
from .time_table import DeviceTimeTable
from .unet import UNet

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = torch.channels_last


def _convolution(
    x: Tensor, weight: Tensor, padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """By the fastest of cuDNN's algorithms that repeat themselves; float32 is float32, not TF32."""
    if x.is_cuda and torch.backends.cudnn.enabled:
        choice = {"benchmark": True, "deterministic": True, "allow_tf32": False}
        y = torch.ops.aten.cudnn_convolution.default(
            x, weight, padding, stride, [1, 1], 1, **choice
        )
    else:
        y = F.conv2d(x, weight, None, stride, padding)
    return y.contiguous(memory_format=LAST)


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().clone()


class Conv(Layer):
    """A convolution by cuDNN; then bias, residual and the result's moments in one kernel.

    weight: (O, I, kH, kW); with phases, of all phases' channels, see `ops.finish_conv2d`.
    """

    is_fused, takes_half = True, False

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        layers: GpuLayers,
        padding: Size,
        stride: Size,
        phases: Size = (1, 1),
        end: Size = (0, 0),
    ) -> None:
        super().__init__()
        self.end = end
        self.weight = weight.to(layers.dtype, copy=True, memory_format=LAST)
        self.bias, self.backend, self.phases = _float32(bias), layers.backend, phases
        self.padding, self.stride = list(padding), list(stride)
        self.is_finished = bias is None and phases == (1, 1)

    def forward(
        self, x: Tensor | Features, to: Tensor | Features | None = None
    ) -> Tensor | Features:
        """The convolution of x, plus `to`; without moments where there is nothing to add."""
        x = tensor(x)
        if any(self.end):
            x = F.pad(x, (0, self.end[1], 0, self.end[0]))
        y = _convolution(x, self.weight, self.padding, self.stride)
        if self.is_finished and to is None:
            return y
        to = None if to is None else tensor(to)
        return Features(*ops.finish_conv2d(y, self.bias, to, self.phases, backend=self.backend))


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N * H * W, C); a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    n, _, height, width = like.shape
    return pixels.view(n, height, width, -1).permute(0, 3, 1, 2)


class Projection(Layer):
    """A product with each pixel, which adds the bias itself; with a residual as a convolution."""

    is_fused = True

    def __init__(self, weight: Tensor, bias: Tensor, layers: GpuLayers) -> None:
        super().__init__()
        self.weight = weight.to(layers.dtype, copy=True)
        self.bias, self.backend = _float32(bias), layers.backend
        self.rounded_bias = self.bias.to(layers.dtype)

    def forward(
        self, x: Tensor | Features, to: Tensor | Features | None = None
    ) -> Tensor | Features:
        x = tensor(x)
        if to is None:
            return _image(torch.addmm(self.rounded_bias, _pixels(x), self.weight.T), x)
        y = _image(torch.mm(_pixels(x), self.weight.T), x)
        return Features(*ops.finish_conv2d(y, self.bias, tensor(to), backend=self.backend))


class Shortcut(Layer):
    """A projection of an input that comes in one part, x, or two, x and skip."""

    is_fused = True

    def __init__(self, weight: Tensor, bias: Tensor, layers: GpuLayers, skip_channels: int) -> None:
        super().__init__()
        weights = weight.to(layers.dtype).split([weight.shape[1] - skip_channels, skip_channels], 1)
        self.weight, self.skip_weight = (w.clone() for w in weights)
        self.bias = bias.detach().to(layers.dtype, copy=True)

    def forward(self, x: Tensor | Features, skip: Tensor | Features | None = None) -> Tensor:
        x = tensor(x)
        h = torch.addmm(self.bias, _pixels(x), self.weight.T)
        if skip is not None:
            h.addmm_(_pixels(tensor(skip)), self.skip_weight.T)
        return _image(h, x)


class Norm(Layer):
    """GroupNorm, and SiLU if `silu`; see `ops.group_norm`."""

    is_fused, half = True, False

    def __init__(self, norm: nn.GroupNorm, silu: bool, layers: GpuLayers) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = _float32(norm.weight), _float32(norm.bias)
        self.backend = layers.backend

    def forward(
        self,
        x: Tensor | Features,
        skip: Tensor | Features | None = None,
        shift: Tensor | None = None,
        affine: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Of x, whose channels `skip`'s follow, plus shift; affine: other weights and biases."""
        weight, bias = affine or (self.weight, self.bias)
        moments = tuple(t.moments if isinstance(t, Features) else None for t in (x, skip))
        x, skip = tensor(x), None if skip is None else tensor(skip)
        settings = (shift, weight, bias, self.groups, self.eps, self.silu)
        return ops.group_norm(x, skip, *settings, moments=moments, backend=self.backend)


class Attend(Layer):
    """softmax(query key') value, for each head: torch's fused attention."""

    is_fused = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor | Features, value: Tensor | Features) -> Tensor:
        q, k, v = (heads_of(tensor(x), self.heads) for x in (query, key, value))
        h = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return image_of(h, query.shape[2:])


class GpuLayers:
    """Makes the layers of a network for a GPU of trained ones that lie there.

    Args:
        device: where they lie.
        dtype: of the activations and the weights, one of DTYPES.
        backend: of the fused kernels.
    """

    in_groups = is_own = False

    def __init__(self, device: torch.device, dtype: torch.dtype, backend: str) -> None:
        self.device, self.dtype, self.backend = device, dtype, backend
        self.input_dtype = dtype

    def time_table(self, unet: UNet) -> DeviceTimeTable:
        return DeviceTimeTable(unet, self.backend)

    def conv(
        self,
        conv: nn.Module,
        size: Size,
        bias: bool = True,
        exact: bool = False,
        end: Size = (0, 0),
    ) -> Conv:
        """A convolution of one dimension or two. exact: nothing, on a GPU. end: see `Conv`."""
        padding, stride = as_pair(conv.padding, 0), as_pair(conv.stride, 1)
        weight, values = as_image(conv.weight), conv.bias if bias else None
        return Conv(weight, values, self, padding, stride, end=end)

    def upsample(self, conv: nn.Module, size: Size, bias: bool = True) -> Conv:
        """A convolution that follows nearest-neighbour doubling: one convolution of all phases."""
        weights, doubled = phases(as_image(conv.weight))
        padding = tuple(factor - 1 for factor in doubled)
        return Conv(torch.cat(weights), conv.bias if bias else None, self, padding, (1, 1), doubled)

    def projection(self, weight: Tensor, bias: Tensor, size: Size) -> Projection:
        """weight: (O, I)."""
        return Projection(weight, bias, self)

    def shortcut(self, conv: nn.Module, size: Size, skip_channels: int) -> Shortcut:
        return Shortcut(as_image(conv.weight).flatten(1), conv.bias, self, skip_channels)

    def norm(self, norm: nn.GroupNorm, silu: bool = True, to: nn.Module | None = None) -> Norm:
        """to: nothing, on a GPU."""
        return Norm(norm, silu, self)

    def attend(self, heads: int) -> Attend:
        return Attend(heads)
