"""Checks of the arguments of a U-Net's own operators, for a backend in Python.

As in checks.py, each failure is a RuntimeError of one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import MODEL_DTYPES, require_device, require_dtype, shape_text
from .memory import require
from .moments import num_parts


def image(name: str, t: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    """(N, C, H, W) of `dtype`, channels_last without gaps, whose samples' places take 32 bits."""
    require_dtype(name, t, dtype)
    require_device(name, t, like)
    require(t.ndim == 4, f"{name} must have the shape (N, C, H, W), but it is {shape_text(t)}.")
    require(
        t.is_contiguous(memory_format=torch.channels_last),
        f"{name} must be channels_last without gaps.",
    )
    require(
        t.shape[1:].numel() < 2**31,
        f"a sample of {name} must have fewer than 2^31 values, but it is {shape_text(t)}.",
    )


def _columns(name: str, t: Tensor, samples: int, channels: int, like: Tensor) -> int:
    """Float32 (C,), (1, C) or (N, C), with neighbouring columns; returns the stride of the rows."""
    require_dtype(name, t, torch.float32)
    require_device(name, t, like)
    require(
        t.ndim in (1, 2)
        and t.shape[-1] == channels
        and (channels == 1 or t.stride(-1) == 1)
        and (t.ndim == 1 or t.shape[0] in (1, samples)),
        f"{name} must have the shape ({channels},), (1, {channels}) or ({samples}, {channels}) with"
        f" neighbouring columns, but it is {shape_text(t)}.",
    )
    return 0 if t.ndim == 1 or t.shape[0] == 1 else t.stride(0)


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    half: bool,
    moments: Sequence[Tensor | None],
) -> tuple[int, int, int]:
    """(channels, stride of shift's rows, stride of weight's and bias's)."""
    require_dtype("x", x, *MODEL_DTYPES)
    image("x", x, x.dtype, x)
    samples, channels = x.shape[:2]
    if skip is not None:
        image("skip", skip, x.dtype, x)
        require(
            skip.shape[0] == samples and skip.shape[2:] == x.shape[2:],
            f"skip must have the samples and the sizes of x, {shape_text(x)}, but it is"
            f" {shape_text(skip)}.",
        )
        channels += skip.shape[1]
    require(
        groups > 0 and channels % groups == 0,
        f"groups must divide the {channels} channels, but it is {groups}.",
    )
    require(
        not half or x.dtype != torch.float32,
        "half is for an x of bfloat16 or float16, but it is float32.",
    )
    shift_stride = 0 if shift is None else _columns("shift", shift, samples, channels, x)
    strides = [
        _columns(name, t, samples, channels, x) for name, t in (("weight", weight), ("bias", bias))
    ]
    require(strides[0] == strides[1], "weight and bias must have the same rows.")
    for t, given in zip((x, skip), moments, strict=True):
        if given is not None:
            require_dtype("moments", given, torch.float32)
            require_device("moments", given, x)
            wanted = t is not None and (samples, num_parts(t.shape[2:].numel()), 2, t.shape[1])
            require(
                given.shape == wanted and given.is_contiguous(),
                f"moments must be those that finish_conv2d gave, {wanted}, but they are"
                f" {shape_text(given)}.",
            )
    return channels, shift_stride, strides[0]


def finish_conv2d(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, phases: Sequence[int]
) -> tuple[int, int, int, int]:
    """The result's shape."""
    require_dtype("x", x, *MODEL_DTYPES)
    image("x", x, x.dtype, x)
    rows, columns = phases
    n, channels, height, width = x.shape
    require(
        rows in (1, 2)
        and columns in (1, 2)
        and channels % (rows * columns) == 0
        and height >= rows
        and width >= columns,
        f"phases must be two of 1 and 2 by which x's channels and sizes can be had, but x is"
        f" {shape_text(x)} and phases are {tuple(phases)}.",
    )
    shape = (
        n,
        channels // (rows * columns),
        (height - rows + 1) * rows,
        (width - columns + 1) * columns,
    )
    if bias is not None:
        require_dtype("bias", bias, torch.float32)
        require_device("bias", bias, x)
        require(
            bias.shape == shape[1:2] and bias.is_contiguous(),
            f"bias must be contiguous, of the shape ({shape[1]},), but it is {shape_text(bias)}.",
        )
    if residual is not None:
        image("residual", residual, x.dtype, x)
        require(
            residual.shape == shape,
            f"residual must have the result's shape, {shape}, but it is {shape_text(residual)}.",
        )
    return shape


def table_rows(table: Tensor, known: Tensor, t: Tensor, labels: Tensor | None) -> None:
    require_dtype("table", table, torch.float32)
    require_dtype("known", known, torch.float32)
    for name, tensor in (("known", known), ("t", t), ("labels", labels)):
        if tensor is not None:
            require_device(name, tensor, table)
    require(
        table.ndim == 2
        and known.ndim == 1
        and len(known) > 0
        and len(table) % len(known) == 0
        and table.is_contiguous()
        and known.is_contiguous(),
        f"table must have the shape (labels * timesteps, columns), contiguous, and known"
        f" (timesteps,), but they are {shape_text(table)} and {shape_text(known)}.",
    )
    require(
        t.ndim == 1 and t.is_contiguous(),
        f"t must have the shape (N,), but it is {shape_text(t)}.",
    )
    if labels is not None:
        require_dtype("labels", labels, torch.int64)
        require(
            labels.shape == t.shape and labels.is_contiguous(),
            f"labels must have the shape of t, {shape_text(t)}, but it is {shape_text(labels)}.",
        )
