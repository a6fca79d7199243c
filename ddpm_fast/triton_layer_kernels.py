"""A U-Net's own kernels for GPUs, in Triton: what lies between the library's convolutions.

Activations are (samples, pixels, channels) without gaps: channels_last. Sums are float32. A
normalisation takes two stages, so that one sample fills a GPU too: the first makes the moments of
each channel over parts of the pixels (moments.py), and is also the last thing done to what a
convolution made; the second adds up those of a group, and normalises. `part_pixels`: of a part, but
for the last, which may have fewer.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _of_tile(count, tiles):
    """(sample, its place among `count`, the tile of channels) of this program."""
    program = tl.program_id(0)
    place = program // tiles
    return (place // count).to(tl.int64), place % count, program % tiles


# Compiled once for all sizes: only whether channels are multiples of 16 is worth a variant.
SIZES = ("pixels", "width", "parts", "part_pixels", "shares", "share_pixels", "tiles", "group")


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    out, moments, x, bias, residual, pixels, channels, width, parts, part_pixels, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x + bias + residual, and its moments; without out, those of x alone.

    x: of `out`'s size, or ROWS x COLUMNS phases as channels: pixel (i, j) of a phase at (r, c) is
    x's pixel (i + r, j + c), and out's (ROWS i + r, COLUMNS j + c), of `width` a row.
    """
    sample, part, tile = _of_tile(parts, tiles)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    first = part * part_pixels
    count = tl.minimum(part_pixels, pixels - first)
    small_width = width // COLUMNS + COLUMNS - 1
    small_height = pixels // width // ROWS + ROWS - 1
    x += sample * (small_width * small_height * (ROWS * COLUMNS)) * channels
    # Within a sample, places take 32 bits.
    here = sample * pixels * channels
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for begin in range(0, count, BLOCK_P):
        offset = begin + tl.arange(0, BLOCK_P)
        pixel = first + offset
        mask = (offset < count)[:, None] & inside[None, :]
        row, column = pixel // width, pixel % width
        phase = row % ROWS * COLUMNS + column % COLUMNS
        source = (row // ROWS + row % ROWS) * small_width + column // COLUMNS + column % COLUMNS
        source = (source * (ROWS * COLUMNS) + phase) * channels
        y = tl.load(x + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        place = pixel[:, None] * channels + channel[None, :]
        if bias is not None:
            y += tl.load(bias + channel, mask=inside, other=0.0)[None, :]
        if residual is not None:
            y += tl.load(residual + here + place, mask=mask, other=0.0).to(tl.float32)
        if out is not None:
            rounded = y.to(out.dtype.element_ty)
            tl.store(out + here + place, rounded, mask=mask)
            y = rounded.to(tl.float32)
        n = tl.cast(tl.minimum(BLOCK_P, count - begin), tl.float32)
        block_mean = tl.sum(tl.where(mask, y, 0.0), 0) / n
        difference = tl.where(mask, y - block_mean[None, :], 0.0)
        seen = tl.cast(begin, tl.float32)
        delta = block_mean - mean
        mean += delta * (n / (seen + n))
        squares += tl.sum(difference * difference, 0) + delta * delta * (seen * n / (seen + n))
    at = moments + (sample * parts + part) * (2 * channels) + channel
    tl.store(at, mean, mask=inside)
    tl.store(at + channels, squares, mask=inside)


@triton.jit
def _statistics(
    moments, skip_moments, shift, sample, first, group, x_channels, skip_channels, pixels, parts,
    part_pixels, PARTS: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """(mean, variance) of GROUPS groups of `group` channels, from number `first` on.

    SPAN: at least the channels of those that the program needs, from a multiple of 16 on.
    """
    channel = first * group // 16 * 16 + tl.arange(0, SPAN)
    part = tl.arange(0, PARTS)
    counts = tl.maximum(tl.minimum(part_pixels, pixels - part * part_pixels), 0).to(tl.float32)
    here = (part < parts)[:, None] & (channel < x_channels)[None, :]
    at = (sample * parts + part)[:, None] * (2 * x_channels) + channel[None, :]
    means = tl.load(moments + at, mask=here, other=0.0)
    squares = tl.load(moments + x_channels + at, mask=here, other=0.0)
    if skip_moments is not None:
        other = channel - x_channels
        here = (part < parts)[:, None] & ((other >= 0) & (other < skip_channels))[None, :]
        at = (sample * parts + part)[:, None] * (2 * skip_channels) + other[None, :]
        means += tl.load(skip_moments + at, mask=here, other=0.0)
        squares += tl.load(skip_moments + skip_channels + at, mask=here, other=0.0)
    inside = channel < x_channels + skip_channels
    if shift is not None:
        means += tl.load(shift + channel, mask=inside, other=0.0)[None, :]
    belongs = (channel // group - first)[None, :] == tl.arange(0, GROUPS)[:, None]
    belongs = belongs & inside[None, :]
    count = tl.cast(pixels * group, tl.float32)
    sums = tl.sum(means * counts[:, None], 0)
    mean = tl.sum(tl.where(belongs, sums[None, :], 0.0), 1) / count
    difference = means - tl.sum(tl.where(belongs, mean[:, None], 0.0), 0)[None, :]
    sums = tl.sum(squares + counts[:, None] * difference * difference, 0)
    return mean, tl.sum(tl.where(belongs, sums[None, :], 0.0), 1) / count


@triton.jit(do_not_specialize=SIZES)
def normalise_kernel(
    out, x, skip, moments, skip_moments, shift, weight, bias, x_channels, skip_channels, group,
    shift_stride, affine_stride, pixels, parts, part_pixels, shares, share_pixels, tiles, eps,
    SILU: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = group_norm((x, skip) + shift) in groups of `group` channels; moments are without shift.

    shift, weight and bias: a row for each sample, or one for all with stride 0. PARTS: at least
    `parts`. SPAN, GROUPS: at least the channels and the number of the groups that a tile has a part
    in. A program takes `share_pixels` pixels.
    """
    sample, share, tile = _of_tile(shares, tiles)
    channels = x_channels + skip_channels
    first = tile * BLOCK_C // group
    if shift is not None:
        shift += sample * shift_stride
    mean, variance = _statistics(
        moments, skip_moments, shift, sample, first, group, x_channels, skip_channels, pixels,
        parts, part_pixels, PARTS, SPAN, GROUPS,
    )  # fmt: skip
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    belongs = (channel // group - first)[None, :] == tl.arange(0, GROUPS)[:, None]
    mean = tl.sum(tl.where(belongs, mean[:, None], 0.0), 0)
    variance = tl.sum(tl.where(belongs, variance[:, None], 0.0), 0)
    affine = sample * affine_stride + channel
    scale = tl.load(weight + affine, mask=inside, other=0.0) / tl.sqrt(variance + eps)
    offset = tl.load(bias + affine, mask=inside, other=0.0)
    if shift is not None:  # subtracted from the mean, which may be larger than what is left of x
        mean -= tl.load(shift + channel, mask=inside, other=0.0)
    begun = share * share_pixels
    count = tl.minimum(share_pixels, pixels - begun)
    of_x, of_skip = channel < x_channels, inside & (channel >= x_channels)
    x += sample * pixels * x_channels
    out += sample * pixels * channels
    if skip is not None:
        skip += sample * pixels * skip_channels
    for begin in range(0, count, BLOCK_P):
        pixel = begun + begin + tl.arange(0, BLOCK_P)
        present = begin + tl.arange(0, BLOCK_P) < count
        at = pixel[:, None] * x_channels + channel[None, :]
        y = tl.load(x + at, mask=present[:, None] & of_x[None, :], other=0.0).to(tl.float32)
        if skip is not None:
            at = pixel[:, None] * skip_channels + (channel - x_channels)[None, :]
            mask = present[:, None] & of_skip[None, :]
            y += tl.load(skip + at, mask=mask, other=0.0).to(tl.float32)
        y = (y - mean[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        at = pixel[:, None] * channels + channel[None, :]
        mask = present[:, None] & inside[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    out, table, known, t, labels, count, rows, columns, tiles,
    KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n] = table[labels[n] * count + the place of t[n] in known]; NaN where there is none.

    rows: of the table. KNOWN: at least `count`.
    """
    sample, _, tile = _of_tile(1, tiles)
    lane = tl.arange(0, KNOWN)
    wanted = tl.load(t + sample).to(tl.float32)
    same = tl.load(known + lane, mask=lane < count, other=float("nan")) == wanted
    place = tl.max(tl.where(same, lane, -1), 0).to(tl.int64)
    is_there = place >= 0
    if labels is not None:
        place += tl.load(labels + sample) * count
    is_there = is_there & (place >= 0) & (place < rows)
    place = tl.where(is_there, place, 0)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    row = tl.load(table + place * columns + column, mask=inside)
    tl.store(out + sample * columns + column, tl.where(is_there, row, float("nan")), mask=inside)
