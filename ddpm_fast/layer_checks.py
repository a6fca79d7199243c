"""Checks of the arguments of a U-Net's own operators, for a backend in Python.

As in checks.py, each failure is a RuntimeError of one sentence; which is made only then, since
these are called a hundred times in a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import MODEL_DTYPES, require_device, require_dtype, shape_text
from .memory import fail
from .moments import num_parts


def image(name: str, t: Tensor, like: Tensor) -> None:
    """(N, C, H, W) like `like`, channels_last without gaps, whose samples' places take 32 bits."""
    require_dtype(name, t, like.dtype)
    require_device(name, t, like)
    if t.ndim != 4:
        fail(f"{name} must have the shape (N, C, H, W), but it is {shape_text(t)}.")
    if not t.is_contiguous(memory_format=torch.channels_last):
        fail(f"{name} must be channels_last without gaps.")
    _small(name, t.shape[1], t)


def _small(name: str, channels: int, t: Tensor) -> None:
    if channels * t.shape[2] * t.shape[3] >= 2**31:
        size = channels, *t.shape[2:]
        fail(f"a sample of {name} must have fewer than 2^31 values, but it is {size}.")


def _columns(name: str, t: Tensor, samples: int, channels: int, like: Tensor) -> int:
    """Float32 (C,), (1, C) or (N, C), with neighbouring columns; returns the stride of the rows."""
    require_dtype(name, t, torch.float32)
    require_device(name, t, like)
    if (
        t.ndim not in (1, 2)
        or t.shape[-1] != channels
        or (channels > 1 and t.stride(-1) != 1)
        or (t.ndim == 2 and t.shape[0] not in (1, samples))
    ):
        fail(
            f"{name} must have the shape ({channels},), (1, {channels}) or ({samples}, {channels})"
            f" with neighbouring columns, but it is {shape_text(t)}."
        )
    # The same of one sample as of many, for which a kernel would be compiled again.
    return t.stride(0) if t.ndim == 2 and t.shape[0] == samples else 0


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
    image("x", x, x)
    samples, channels = x.shape[:2]
    if skip is not None:
        image("skip", skip, x)
        if skip.shape[0] != samples or skip.shape[2:] != x.shape[2:]:
            fail(
                f"skip must have the samples and the sizes of x, {shape_text(x)}, but it is"
                f" {shape_text(skip)}."
            )
        channels += skip.shape[1]
        _small("the result", channels, x)
    if groups <= 0 or channels % groups:
        fail(f"groups must divide the {channels} channels, but it is {groups}.")
    if half and x.dtype == torch.float32:
        fail("half is for an x of bfloat16 or float16, but it is float32.")
    shift_stride = 0 if shift is None else _columns("shift", shift, samples, channels, x)
    affine_stride = _columns("weight", weight, samples, channels, x)
    if _columns("bias", bias, samples, channels, x) != affine_stride:
        fail("weight and bias must have the same rows.")
    for t, given in zip((x, skip), moments, strict=True):
        if given is not None:
            _moments(given, t, x)
    return channels, shift_stride, affine_stride


def _moments(given: Tensor, t: Tensor | None, like: Tensor) -> None:
    require_dtype("moments", given, torch.float32)
    require_device("moments", given, like)
    wanted = None if t is None else (len(t), num_parts(t.shape[2] * t.shape[3]), 2, t.shape[1])
    if given.shape != wanted or not given.is_contiguous():
        fail(
            f"moments must be those that finish_conv2d gave, {wanted}, but they are"
            f" {shape_text(given)}."
        )


def finish_conv2d(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, phases: Sequence[int]
) -> tuple[int, int, int, int]:
    """The result's shape."""
    require_dtype("x", x, *MODEL_DTYPES)
    image("x", x, x)
    rows, columns = phases
    n, channels, height, width = x.shape
    if (
        not {rows, columns} <= {1, 2}
        or channels % (rows * columns)
        or height < rows
        or width < columns
    ):
        fail(
            f"phases must be two of 1 and 2 by which x's channels and sizes can be had, but x is"
            f" {shape_text(x)} and phases are {tuple(phases)}."
        )
    size = (height - rows + 1) * rows, (width - columns + 1) * columns
    shape = n, channels // (rows * columns), *size
    if bias is not None:
        require_dtype("bias", bias, torch.float32)
        require_device("bias", bias, x)
        if bias.shape != shape[1:2] or not bias.is_contiguous():
            fail(
                f"bias must be contiguous, of the shape ({shape[1]},), but it is"
                f" {shape_text(bias)}."
            )
    if residual is not None:
        image("residual", residual, x)
        if residual.shape != shape:
            fail(
                f"residual must have the result's shape, {shape}, but it is {shape_text(residual)}."
            )
    return shape


def table_rows(table: Tensor, known: Tensor, t: Tensor, labels: Tensor | None) -> None:
    require_dtype("table", table, torch.float32)
    require_dtype("known", known, torch.float32)
    for name, tensor in (("known", known), ("t", t), ("labels", labels)):
        if tensor is not None:
            require_device(name, tensor, table)
    if (
        table.ndim != 2
        or known.ndim != 1
        or len(known) == 0
        or len(table) % len(known)
        or not (table.is_contiguous() and known.is_contiguous())
    ):
        fail(
            f"table must have the shape (labels * timesteps, columns), contiguous, and known"
            f" (timesteps,), but they are {shape_text(table)} and {shape_text(known)}."
        )
    if t.ndim != 1 or not t.is_contiguous():
        fail(f"t must have the shape (N,), contiguous, but it is {shape_text(t)}.")
    if labels is not None:
        require_dtype("labels", labels, torch.int64)
        if labels.shape != t.shape or not labels.is_contiguous():
            fail(
                f"labels must have the shape of t, {shape_text(t)}, contiguous, but it is"
                f" {shape_text(labels)}."
            )
