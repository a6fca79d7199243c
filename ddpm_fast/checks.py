"""Checks of the operators' arguments, for a backend in Python: those of csrc/torch_checks.h.

Each failure is a RuntimeError of one sentence that says what was wanted and what came.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import noise

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """How far apart samples, channels and pixels lie, in elements."""

    sample: int
    channel: int
    pixel: int


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"ddpm_fast: {message}")


def _shape(t: Tensor) -> str:
    return f"({', '.join(map(str, t.shape))})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_dtype(name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    *first, last = map(_dtype, dtypes)
    wanted = f"{', '.join(first)} or {last}" if first else last
    require(t.dtype in dtypes, f"{name} must be {wanted}, but it is {_dtype(t.dtype)}.")


def require_device(name: str, t: Tensor, like: Tensor) -> None:
    require(
        t.device == like.device,
        f"{name} must be on the same device as the other tensors; move it there with .to().",
    )


def require_elements(elements: int) -> None:
    require(
        elements <= noise.MAX_ELEMENTS,
        f"a sample may have 2^34 elements, but this one has {elements}.",
    )


def like_state(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """float32, of the shape and on the device of `like`."""
    require_dtype(name, t, torch.float32)
    require_device(name, t, like)
    require(
        t.shape == like.shape,
        f"{name} must have the shape of {like_name}, {_shape(like)}, but it is {_shape(t)}.",
    )


def per_sample(name: str, t: Tensor, samples: int, like: Tensor) -> Tensor:
    """One int64 per sample, contiguous."""
    require_dtype(name, t, torch.int64)
    require_device(name, t, like)
    require(
        t.shape == (samples,),
        f"{name} must have the shape ({samples},), one per sample, but it is {_shape(t)}.",
    )
    return t.contiguous()


def table(name: str, t: Tensor, dtype: torch.dtype, columns: int, like: Tensor) -> Tensor:
    """A table of (rows, columns), contiguous."""
    require_dtype(name, t, dtype)
    require_device(name, t, like)
    require(
        t.ndim == 2 and t.shape[1] == columns,
        f"{name} must have the shape (rows, {columns}), but it is {_shape(t)}.",
    )
    return t.contiguous()


def channels_and_pixels(t: Tensor) -> tuple[int, int]:
    return t.shape[1] if t.ndim > 1 else 1, t.shape[2:].numel()


def layout_of(t: Tensor) -> Layout | None:
    """The tensor's memory order, if its pixels lie at one stride."""
    channels, pixels = channels_and_pixels(t)
    inner, step = 1, 1
    for size, stride in zip(t.shape[:1:-1], t.stride()[:1:-1], strict=True):
        if size == 1:
            continue
        if inner == 1:
            step = stride
        if stride != step * inner:
            return None
        inner *= size
    return Layout(t.stride(0), t.stride(1) if channels > 1 else pixels, step)


def walkable(t: Tensor | None) -> Tensor | None:
    """`t`, or a contiguous copy if the kernels cannot walk it; never for a tensor written to."""
    return t if t is None or layout_of(t) else t.contiguous()


def writable(name: str, t: Tensor | None) -> None:
    """Every element has its own address, in an order that the kernels can walk."""
    if t is None:
        return
    layout = layout_of(t)
    require(
        layout is not None and _is_distinct(t, layout),
        f"{name} is written, so it must be contiguous or channels_last; pass a tensor that is.",
    )


def _is_distinct(t: Tensor, layout: Layout) -> bool:
    """Whether no two elements share an address: from the narrowest stride on, each dimension
    clears what the ones before it span.
    """
    span = 1
    for stride, size in sorted(zip(layout, (len(t), *channels_and_pixels(t)), strict=True)):
        if size > 1:
            if stride < span:
                return False
            span += stride * (size - 1)
    return True


def disjoint(name_a: str, a: Tensor, name_b: str, b: Tensor | None) -> None:
    """`a`, which is written, and `b`, which is read or written, share no memory."""
    if b is None or a.numel() == 0 or b.numel() == 0:
        return

    def extent(t: Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (a0, a1), (b0, b1) = extent(a), extent(b)
    require(
        a1 <= b0 or b1 <= a0,
        f"{name_a} is written while {name_b} is read, so they must not share memory; pass a clone.",
    )


def _twice(guided: bool) -> str:
    return ", with twice the samples (conditional, then unconditional)" if guided else ""


def _model_channels(x_t: Tensor, model_output: Tensor, guided: bool) -> int:
    """The channels of model_output: C, or 2 C with a learned variance."""
    require_device("model_output", model_output, x_t)
    require_dtype("model_output", model_output, *MODEL_DTYPES)
    rows = (2 if guided else 1) * x_t.shape[0]
    channels = x_t.shape[1] if x_t.ndim > 1 else 1
    found = model_output.shape[1] if model_output.ndim > 1 else 1
    same = (
        model_output.ndim == x_t.ndim
        and model_output.shape[0] == rows
        and model_output.shape[2:] == x_t.shape[2:]
        and found in (channels, 2 * channels)
    )
    require(
        same,
        f"model_output must have the shape of x_t, {_shape(x_t)}{_twice(guided)}, and C or 2 C"
        f" channels, but it is {_shape(model_output)}.",
    )
    return found


def _optional(
    x_t: Tensor,
    noise: Tensor | None,
    guidance_scale: Tensor | None,
    previous: Tensor | None,
    status: Tensor | None,
    next_input: Tensor | None,
) -> None:
    for name, t in (("noise", noise), ("previous_pred_xstart", previous)):
        if t is not None:
            like_state(name, t, "x_t", x_t)
    if guidance_scale is not None:
        require_dtype("guidance_scale", guidance_scale, torch.float32)
        require_device("guidance_scale", guidance_scale, x_t)
        require(
            guidance_scale.numel() == 1,
            f"guidance_scale must have one element, but it is {_shape(guidance_scale)}.",
        )
    if status is not None:
        require_dtype("status", status, torch.int32)
        require_device("status", status, x_t)
        require(
            status.shape == (4,) and status.is_contiguous(),
            f"status must be contiguous, of shape (4,), but it is {_shape(status)}.",
        )
    if next_input is not None:
        require_dtype("next_input", next_input, *MODEL_DTYPES)
        require_device("next_input", next_input, x_t)
        guided = guidance_scale is not None
        require(
            next_input.shape == (len(x_t) * (2 if guided else 1), *x_t.shape[1:]),
            f"next_input must have the shape of x_t, {_shape(x_t)}{_twice(guided)}, but it is"
            f" {_shape(next_input)}.",
        )


def step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    noise: Tensor | None,
    guidance_scale: Tensor | None,
    previous: Tensor | None,
    status: Tensor | None,
    next_input: Tensor | None,
) -> tuple[int, bool]:
    """All of a step but its numbers and its memory: (channels, whether the variance is learned)."""
    require_dtype("x_t", x_t, torch.float32)
    require(x_t.ndim >= 1, "x_t must have the samples as its first dimension.")
    channels, pixels = channels_and_pixels(x_t)
    require_elements(channels * pixels)
    learned = _model_channels(x_t, model_output, guidance_scale is not None) != channels
    table("coefficients", coefficients, torch.float32, 16, x_t)
    table("index", index, torch.int32, 4, x_t)
    require(
        len(index) == len(coefficients),
        f"index and coefficients must have as many rows, but they have {len(index)} and"
        f" {len(coefficients)}.",
    )
    _optional(x_t, noise, guidance_scale, previous, status, next_input)
    return channels, learned
