"""What a prepared U-Net's layers have in common on a CPU (fused.py) and a GPU (fused_cuda.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]


class Layer(nn.Module):
    """A module whose parts are found and called as any object's are.

    What torch's modules do beside that takes more than a microsecond for each part and each call,
    which is much of a small network's time. Its own hooks are called, torch's global ones not.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop(name, None)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.pop(name, None)

    def __call__(self, *inputs: Any, **settings: Any) -> Tensor:
        if self._forward_pre_hooks or self._forward_hooks:
            return super().__call__(*inputs, **settings)
        return self.forward(*inputs, **settings)


def as_image(weight: Tensor) -> Tensor:
    """A convolution's weight (O, I, [kH,] kW) as (O, I, kH, kW), in float32."""
    weight = weight.detach().float()
    return weight if weight.ndim == 4 else weight.unsqueeze(2)


def as_pair(values: Sequence[int], missing: int) -> Size:
    """A convolution's padding or stride as that of (height, width)."""
    return (missing,) * (2 - len(values)) + tuple(values)


def phases(weight: Tensor) -> tuple[list[Tensor], Size]:
    """Of a convolution's weight with 3 taps, (O, I, 3, 3) or (O, I, 1, 3), after nearest-neighbour
    doubling: the weights of 2 taps that make each phase of the result, and the phases by
    dimension. See `ops.upsample_conv2d`."""
    weights = [weight]
    for dim in (2, 3):
        if weight.shape[dim] == 3:
            weights = [part for w in weights for part in _two_taps(w, dim)]
    height, width = (2 if taps == 3 else 1 for taps in weight.shape[2:])
    return weights, (height, width)


def _two_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(N, heads * C, H, W) as (N, heads, H * W, C); a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)


def image_of(x: Tensor, size: Size) -> Tensor:
    """(N, heads, H * W, C) as (N, heads * C, H, W)."""
    return x.transpose(1, 2).flatten(2).unflatten(1, size).permute(0, 3, 1, 2)
