"""The moments of a channel, over parts of a sample's pixels, that normalisations on a GPU share.

Float32 (N, parts, 2, C): each part's mean, and its sum of squared differences from that. Moments of
parts are added without loss (Chan et al. 1983, "Algorithms for computing the sample variance",
equation 2.1), and what is added to a whole channel shifts its means alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_PART = 64  # pixels


def part_pixels(pixels: int) -> int:
    """Pixels of each part of a sample, but for the last, which may have fewer.

    There are 16 parts, which fill a GPU by one sample; fewer of small images, more of large ones.
    """
    most = min(32, max(16, pixels // 512))
    return SMALLEST_PART * -(-pixels // (SMALLEST_PART * most))


def num_parts(pixels: int) -> int:
    return -(-pixels // part_pixels(pixels))


def of(x: Tensor) -> Tensor:
    """Of x (N, C, H, W): the reference."""
    parts = x.float().flatten(2).split(part_pixels(x.shape[2:].numel()), 2)
    means = [part.mean(2) for part in parts]
    squares = [(part - m[..., None]).square().sum(2) for part, m in zip(parts, means, strict=True)]
    return torch.stack((torch.stack(means, 1), torch.stack(squares, 1)), 2)


class Features(NamedTuple):
    """An activation (N, C, H, W), and its moments, which what made it had at hand."""

    x: Tensor
    moments: Tensor


def tensor(x: Tensor | Features) -> Tensor:
    return x.x if isinstance(x, Features) else x
