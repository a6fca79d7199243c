"""The layers of a U-Net prepared for a CPU: convolutions of packed weights, fused normalisation.

`CpuLayers` makes them of trained ones; fused_cuda.py has the same for a GPU. Tensors are
(N, C, H, W) in channels_last order, float32 or bfloat16; series have H = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backend, ops
from .fused_layer import Layer, Size, as_image, as_pair, heads_of, image_of, phases
from .time_table import TimeTable
from .unet import UNet

DTYPES = (torch.float32, torch.bfloat16)
# Where Winograd's algorithm pays, measured with AVX-512. With fewer channels on either side its
# transformations cost more than is saved; below so many pixels its weights, which are four times as
# many, are read for too little.
FEWEST_CHANNELS = {torch.float32: 16, torch.bfloat16: 64}
FEWEST_PIXELS = 49
FEWEST_OF_EXACT = 16  # channels on one side, where it is used to round less
LONGEST_SCORES = 512  # positions up to which torch's attention keeps its scores whole
PACKING = 5  # one more with each change of what `ops.pack_conv2d` makes, or of a layer's parts
_onednn = torch.ops.mkldnn
# Without what `ops` looks for first: a prepared network found the extension when it was made, and
# has no gradients.
_own = torch.ops.ddpm_fast


def _packing(dtype: torch.dtype) -> tuple[torch.dtype, str | None, int]:
    """What the order of our own packed weights depends on."""
    return dtype, backend.conv_kernels(dtype), PACKING


def is_packable(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's convolutions, in this dtype, on this CPU."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or bool(_onednn._is_mkldnn_bf16_supported())


def require_packing(found: object, wanted: object) -> None:
    """RuntimeError where a network's file was made with other layers, or packed weights."""
    if found != wanted:
        raise RuntimeError(
            "this network was prepared for another CPU or by another ddpm_fast, or with another "
            "DDPM_FAST_CPU, whose packed weights lie in another order: prepare the model anew"
        )


class PackedLayer(Layer):
    """One that may have our own packed weights."""

    packing: tuple[torch.dtype, str | None, int] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.packing is not None:
            require_packing(self.packing, _packing(self.packing[0]))


class Conv(PackedLayer):
    """A convolution whose weight lies as the kernel wants it, so that no call reorders it.

    The kernel is `ops.conv2d` where that is faster than oneDNN.

    weight (O, I, kH, kW) and bias (O) float32, padding on both sides; size: (H, W) of the usual
    input, which decides the order of the weight, but not what may be given. exact: in bfloat16 by
    our own Winograd's algorithm, whose weights are float16, also with few channels, and where
    oneDNN is faster. end: more padding, (below, to the right).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        size: Size,
        padding: Size = (0, 0),
        stride: Size = (1, 1),
        exact: bool = False,
        end: Size = (0, 0),
    ) -> None:
        super().__init__()
        self.shape, self.size, self.end = tuple(weight.shape), size, end
        self.place = (list(padding), list(stride), [1, 1], 1)
        exact = exact and dtype == torch.bfloat16
        least, most = sorted(self.shape[:2])
        has_tiles = backend.multiplies_tiles(dtype)
        pays = least >= FEWEST_CHANNELS[dtype] and not has_tiles
        winograd = (
            self.shape[2:] == (3, 3)
            and tuple(stride) == (1, 1)
            and (most >= FEWEST_OF_EXACT if exact else pays)
            and size[0] * size[1] >= FEWEST_PIXELS
        )
        is_exact = exact and winograd and ops.has_conv2d(dtype)
        self.is_own = ops.is_conv2d_fastest(dtype) or is_exact
        kernel = list(self.shape[2:])
        around = [*padding]
        if any(end):
            around += [padding[0] + end[0], padding[1] + end[1]]
        self.own_place = (self.shape[0], kernel, list(stride), around, winograd)
        # Winograd's algorithm works in float32: then x is rounded less as float16, and the result
        # may be float16 too, if `half` is set: with tiles x is for this alone.
        self.takes_half = self.is_own and dtype == torch.bfloat16 and (winograd or has_tiles)
        self.half = False
        self.packing = _packing(dtype) if self.is_own else None
        bias_dtype = torch.float32 if self.is_own else dtype
        self.bias = None if bias is None else bias.detach().to(bias_dtype, copy=True)
        if self.is_own:
            self.is_fused, self.weight = True, ops.pack_conv2d(weight.float(), dtype, winograd)
        else:
            self._take(weight.to(dtype, copy=True, memory_format=torch.channels_last))

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

    def forward(self, x: Tensor, to: Tensor | None = None) -> Tensor:
        """The convolution of x, plus `to`, rounded once."""
        if self.is_own:
            return _own.conv2d.default(x, self.weight, self.bias, to, *self.own_place, self.half)
        if any(self.end):
            x = F.pad(x, (0, self.end[1], 0, self.end[0]))
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


class UpsampleConv(PackedLayer):
    """Nearest-neighbour doubling and a convolution with 3 taps: see `ops.upsample_conv2d`.

    shape: of the weight of each phase, (O, I, 2, 2), or (O, I, 1, 2) for series.
    Where that is not the fastest, one convolution makes all phases as channels, which are then put
    in their places.
    """

    def __init__(self, conv: nn.Module, dtype: torch.dtype, size: Size, bias: bool = True) -> None:
        super().__init__()
        weights, self.factors = phases(as_image(conv.weight))
        self.shape = tuple(weights[0].shape)
        self.is_own = ops.is_conv2d_fastest(dtype)
        if self.is_own:
            self.packing = _packing(dtype)
            self.weight = torch.stack([ops.pack_conv2d(w, dtype) for w in weights])
            self.bias = conv.bias.detach().float().clone() if bias else None
        else:
            biases = conv.bias.repeat(len(weights)) if bias else None
            padding = tuple(factor - 1 for factor in self.factors)
            self.conv = Conv(torch.cat(weights), biases, dtype, size, padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_own:
            return _own.upsample_conv2d.default(x, self.weight, self.bias, self.shape[0])
        n, _, height, width = x.shape
        (rows, columns), channels = self.factors, self.shape[0]
        y = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (rows, columns, channels))
        out = y.new_empty(n, height, rows, width, columns, channels)
        for i in range(rows):
            for j in range(columns):
                out[:, :, i, :, j] = y[:, i : i + height, j : j + width, i, j]
        return out.view(n, height * rows, width * columns, channels).permute(0, 3, 1, 2)


class Norm(Layer):
    """GroupNorm, and SiLU if `silu`, in one pass; see `ops.group_norm`.

    to: the convolution that takes the result, as float16 if it `takes_half`.
    """

    def __init__(self, norm: nn.GroupNorm, silu: bool = True, to: Conv | None = None) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.half = to is not None and to.takes_half
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
        return ops.group_norm(
            x, skip, shift, weight, bias, self.groups, self.eps, self.silu, self.half
        )


class Shortcut(Layer):
    """A projection (O, I, 1, 1) of an input that comes in one part, x, or two, x and skip."""

    def __init__(
        self, weight: Tensor, bias: Tensor, dtype: torch.dtype, size: Size, skip_channels: int
    ) -> None:
        super().__init__()
        channels = weight.shape[1] - skip_channels
        self.of_x = Conv(weight[:, :channels], bias, dtype, size)
        skip_weight = weight[:, channels:]
        self.of_skip = Conv(skip_weight, None, dtype, size) if skip_channels else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.of_x(x)
        return h if skip is None else self.of_skip(skip, h)


class Attend(Layer):
    """See `ops.attention`; torch's where that is not the fastest."""

    def __init__(self, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.is_own = heads, ops.is_attention_fastest(dtype)
        self.is_fused = self.is_own or heads == 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.is_own:
            return _own.attention.default(query, key, value, self.heads)
        q, k, v = (heads_of(x, self.heads) for x in (query, key, value))
        if self.heads > 1 or q.shape[2] > LONGEST_SCORES:
            h = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            h = torch.bmm(torch.bmm(q[:, 0], k[:, 0].mT).softmax(-1), v[:, 0]).unsqueeze(1)
        return image_of(h, query.shape[2:])


class CpuLayers:
    """Makes the layers of a network for a CPU of trained ones.

    Args:
        dtype: of the activations and the packed weights, one of DTYPES.
    """

    device = torch.device("cpu")
    in_groups = True  # cores may take groups of a batch, each by itself
    input_dtype = torch.float32  # of x, which is rounded least so: see `Conv.takes_half`

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.is_own = dtype, ops.is_conv2d_fastest(dtype)

    def time_table(self, unet: UNet) -> TimeTable:
        return TimeTable(unet)

    def conv(
        self,
        conv: nn.Module,
        size: Size,
        bias: bool = True,
        exact: bool = False,
        end: Size = (0, 0),
    ) -> Conv:
        """A convolution of one dimension or two. exact, end: see `Conv`."""
        padding, stride = as_pair(conv.padding, 0), as_pair(conv.stride, 1)
        weight, values = as_image(conv.weight), conv.bias if bias else None
        return Conv(weight, values, self.dtype, size, padding, stride, exact, end)

    def upsample(self, conv: nn.Module, size: Size, bias: bool = True) -> UpsampleConv:
        """A convolution that follows nearest-neighbour doubling."""
        return UpsampleConv(conv, self.dtype, size, bias)

    def projection(self, weight: Tensor, bias: Tensor, size: Size) -> Conv:
        """weight: (O, I)."""
        return Conv(weight[..., None, None], bias, self.dtype, size)

    def shortcut(self, conv: nn.Module, size: Size, skip_channels: int) -> Shortcut:
        return Shortcut(as_image(conv.weight), conv.bias, self.dtype, size, skip_channels)

    def norm(self, norm: nn.GroupNorm, silu: bool = True, to: nn.Module | None = None) -> Norm:
        """to: the convolution that takes the result."""
        return Norm(norm, silu, to)

    def attend(self, heads: int) -> Attend:
        return Attend(heads, self.dtype)
