"""Checks of the operators' arguments, for a backend in Python: those of csrc/torch_checks.h.

Each failure is a RuntimeError of one sentence that says what was wanted and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import noise as contract
from .memory import fail, require, separate, writable

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shape_text(t: Tensor) -> str:
    return f"({', '.join(map(str, t.shape))})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_one_of(name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    if t.dtype not in dtypes:
        *first, last = map(_dtype, dtypes)
        wanted = f"{', '.join(first)} or {last}" if first else last
        fail(f"{name} must be {wanted}, but it is {_dtype(t.dtype)}.")


def require_dtype(name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    """And that it is aligned, for which it must have data."""
    require_one_of(name, t, *dtypes)
    if not t.is_meta and t.data_ptr() % t.element_size():
        bytes_each = t.element_size()
        fail(f"{name} must begin at a multiple of its elements' {bytes_each} bytes; pass a copy.")


def require_device(name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        fail(f"{name} must be on the same device as the other tensors; move it there with .to().")


def require_elements(elements: int) -> None:
    require(
        elements <= contract.MAX_ELEMENTS,
        f"a sample may have 2^34 elements, but this one has {elements}.",
    )


def like_state(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """float32, of the shape and on the device of `like`."""
    require_dtype(name, t, torch.float32)
    require_device(name, t, like)
    require(
        t.shape == like.shape,
        f"{name} must have the shape of {like_name}, {shape_text(like)}, but it is"
        f" {shape_text(t)}.",
    )


def per_sample(name: str, t: Tensor, samples: int, like: Tensor) -> Tensor:
    """One int64 per sample, contiguous."""
    require_dtype(name, t, torch.int64)
    require_device(name, t, like)
    require(
        t.shape == (samples,),
        f"{name} must have the shape ({samples},), one per sample, but it is {shape_text(t)}.",
    )
    return t.contiguous()


def table(name: str, t: Tensor, dtype: torch.dtype, columns: int, like: Tensor) -> Tensor:
    """A table of (rows, columns), contiguous."""
    require_dtype(name, t, dtype)
    require_device(name, t, like)
    require(
        t.ndim == 2 and t.shape[1] == columns,
        f"{name} must have the shape (rows, {columns}), but it is {shape_text(t)}.",
    )
    return t.contiguous()


def _twice(guided: bool) -> str:
    return ", with twice the samples (conditional, then unconditional)" if guided else ""


def _model_output(x_t: Tensor, model_output: Tensor, guided: bool) -> None:
    """Its channels are C, or 2 C with a learned variance."""
    require_device("model_output", model_output, x_t)
    require_dtype("model_output", model_output, *MODEL_DTYPES)
    rows = (2 if guided else 1) * x_t.shape[0]
    same = (
        model_output.ndim == x_t.ndim
        and model_output.shape[0] == rows
        and model_output.shape[2:] == x_t.shape[2:]
        and model_output.shape[1] in (x_t.shape[1], 2 * x_t.shape[1])
    )
    require(
        same,
        f"model_output must have the shape of x_t, {shape_text(x_t)}{_twice(guided)}, and C or 2 C"
        f" channels, but it is {shape_text(model_output)}.",
    )


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
            f"guidance_scale must have one element, but it is {shape_text(guidance_scale)}.",
        )
    if status is not None:
        require_dtype("status", status, torch.int32)
        require_device("status", status, x_t)
        require(
            status.shape == (4,) and status.is_contiguous(),
            f"status must be contiguous, of shape (4,), but it is {shape_text(status)}.",
        )
    if next_input is not None:
        require_dtype("next_input", next_input, *MODEL_DTYPES)
        require_device("next_input", next_input, x_t)
        guided = guidance_scale is not None
        require(
            next_input.shape == (len(x_t) * (2 if guided else 1), *x_t.shape[1:]),
            f"next_input must have the shape of x_t, {shape_text(x_t)}{_twice(guided)}, but it is"
            f" {shape_text(next_input)}.",
        )


def randn(
    seed: Tensor, sample_index: Tensor, shape: Sequence[int], step: int, stream: int
) -> tuple[Tensor, Tensor]:
    """(seed, sample_index), contiguous."""
    require(seed.ndim == 1, f"seed must have the shape (N,), but it is {shape_text(seed)}.")
    keys = (("seed", seed), ("sample_index", sample_index))
    seed, sample_index = (per_sample(name, t, len(seed), seed) for name, t in keys)
    for name, value, bits in (("step", step, 20), ("stream", stream, 12)):
        require(
            0 <= value < 1 << bits, f"{name} must be between 0 and 2^{bits} - 1, but it is {value}."
        )
    least = min(shape, default=0)
    require(least >= 0, f"shape must have no negative size, but it has {least}.")
    require_elements(math.prod(shape))
    return seed, sample_index


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, ...]:
    """(coefficients, timesteps, seed, sample_index), contiguous."""
    require_dtype("x_start", x_start, torch.float32)
    require(x_start.ndim >= 1, "x_start must have the shape (N, ...), but it is ().")
    require_elements(x_start.shape[1:].numel())
    coefficients = table("coefficients", coefficients, torch.float32, 2, x_start)
    keys = (("timesteps", timesteps), ("seed", seed), ("sample_index", sample_index))
    numbers = [per_sample(name, t, len(x_start), x_start) for name, t in keys]
    if noise is not None:
        like_state("noise", noise, "x_start", x_start)
    return coefficients, *numbers


def p_sample_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    row: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    noise: Tensor | None,
    guidance_scale: Tensor | None,
    previous: Tensor | None,
    status: Tensor | None,
    next_input: Tensor | None,
    in_place: bool,
) -> tuple[Tensor, ...]:
    """(coefficients, index, row, seed, sample_index), contiguous."""
    require_dtype("x_t", x_t, torch.float32)
    require(x_t.ndim >= 2, f"x_t must have the shape (N, C, ...), but it is {shape_text(x_t)}.")
    require_elements(x_t.shape[1:].numel())
    _model_output(x_t, model_output, guidance_scale is not None)
    coefficients = table("coefficients", coefficients, torch.float32, 16, x_t)
    index = table("index", index, torch.int32, 4, x_t)
    require(
        len(index) == len(coefficients),
        f"index and coefficients must have as many rows, but they have {len(index)} and"
        f" {len(coefficients)}.",
    )
    keys = (("row", row), ("seed", seed), ("sample_index", sample_index))
    row, seed, sample_index = (per_sample(name, t, len(x_t), x_t) for name, t in keys)
    _optional(x_t, noise, guidance_scale, previous, status, next_input)
    written = {"previous_pred_xstart": previous, "next_input": next_input, "status": status}
    read = {"model_output": model_output, "noise": noise, "guidance_scale": guidance_scale}
    read |= {"coefficients": coefficients, "index": index}
    read |= {"row": row, "seed": seed, "sample_index": sample_index}
    if in_place:
        written["x_t"] = x_t
    separate(written, {"x_t": x_t, **read})
    for name, t in written.items():
        if t is not None:
            writable(name, t)
    return coefficients, index, row, seed, sample_index


def refuse_grad(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"ddpm_fast: {name} is not differentiable; call it under torch.no_grad()."
        )
