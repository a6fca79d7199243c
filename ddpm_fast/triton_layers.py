"""A U-Net's own operators on a GPU: checks, and launches of triton_layer_kernels.py.

A sample's bits depend on the sample alone: into how many parts its pixels are cut for the moments
depends on their number, not on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import fallback, layer_checks, triton_layer_kernels
from .moments import SMALLEST_PART, num_parts, part_pixels

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
BLOCK_C = 64  # channels of a program: 128 bytes of bfloat16
NORM_PIXELS = 32  # that a program normalises at once
MOST_NORM_PIXELS = 256  # that it takes
MANY = 2048  # programs, from which each takes more
FEWEST_PARTS, FEWEST_GROUPS = 16, 16  # that a variant of the kernel is for
MOST_MOMENTS = 8192  # that a program adds up: wider groups would not fit its registers
TABLE_BLOCK = 1024  # columns of a program


def _launch(kernel: Any, programs: int, like: Tensor, *args: Any, **named: Any) -> None:
    with torch.cuda.device_of(like) if like.is_cuda else nullcontext():
        kernel[programs,](*args, **named, **OPTIONS)


def _tiles(channels: int) -> tuple[int, int]:
    """(channels of a tile, tiles)."""
    block = min(BLOCK_C, triton.next_power_of_2(channels))
    return block, -(-channels // block)


def _finish(
    out: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """The moments of `out`, or of x without it."""
    n, channels, height, width = (x if out is None else out).shape
    pixels = height * width
    each, parts = part_pixels(pixels), num_parts(pixels)
    moments = x.new_empty((n, parts, 2, channels), dtype=torch.float32)
    block, tiles = _tiles(channels)
    _launch(
        triton_layer_kernels.finish_kernel,
        n * parts * tiles,
        *(x, out, moments, x, bias, residual, pixels, channels, width, parts, each, tiles),
        ROWS=rows,
        COLUMNS=columns,
        BLOCK_P=SMALLEST_PART,
        BLOCK_C=block,
    )
    return moments


def finish_conv2d(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, phases: Sequence[int]
) -> tuple[Tensor, Tensor]:
    n, channels, height, width = layer_checks.finish_conv2d(x, bias, residual, phases)
    out = x.new_empty((n, height, width, channels)).permute(0, 3, 1, 2)
    return out, _finish(out, x, bias, residual, *phases)


def _span(group: int, block: int) -> tuple[int, int]:
    """(channels, number) of all groups that a tile has a part in, at most; powers of 2.

    The channels from a multiple of 16 on. Few different ones, each of which is compiled.
    """
    if block % group == 0:
        groups = block // group
    else:
        groups = 1 if group % block == 0 else (block - 2) // group + 2
    before = 0 if block % group == 0 or group % 16 == 0 else 15
    channels = triton.next_power_of_2(before + groups * group)
    return channels, max(FEWEST_GROUPS, triton.next_power_of_2(groups))


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    half: bool,
    moments: Sequence[Tensor | None],
) -> Tensor:
    channels, *strides = layer_checks.group_norm(
        x, skip, shift, weight, bias, groups, half, moments
    )
    n, x_channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    block, tiles = _tiles(channels)
    each, parts, share = part_pixels(pixels), num_parts(pixels), NORM_PIXELS
    most_parts = max(FEWEST_PARTS, triton.next_power_of_2(parts))
    span, spanned_groups = _span(group, block)
    if most_parts * span > MOST_MOMENTS:
        return fallback.group_norm(x, skip, shift, weight, bias, groups, eps, silu, half)
    first, second = (
        given if given is not None or t is None else _finish(None, t, None, None, 1, 1)
        for t, given in zip((x, skip), moments, strict=True)
    )
    dtype = torch.float16 if half else x.dtype
    out = x.new_empty((n, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    while share < MOST_NORM_PIXELS and n * -(-pixels // share) * tiles > MANY:
        share *= 2
    shares = -(-pixels // share)
    _launch(
        triton_layer_kernels.normalise_kernel,
        n * shares * tiles,
        *(x, out, x, skip, first, second, shift, weight, bias, x_channels, channels - x_channels),
        *(group, *strides, pixels, parts, each, shares, share, tiles, eps),
        SILU=silu,
        PARTS=most_parts,
        SPAN=span,
        GROUPS=spanned_groups,
        BLOCK_P=NORM_PIXELS,
        BLOCK_C=block,
    )
    return out


def table_rows(table: Tensor, known: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    layer_checks.table_rows(table, known, t, labels)
    columns, count = table.shape[1], len(known)
    out = table.new_empty((len(t), columns))
    tiles = -(-columns // TABLE_BLOCK)
    _launch(
        triton_layer_kernels.rows_kernel,
        len(t) * tiles,
        *(table, out, table, known, t, labels, count, len(table), columns, tiles),
        KNOWN=triton.next_power_of_2(count),
        BLOCK=TABLE_BLOCK,
    )
    return out
