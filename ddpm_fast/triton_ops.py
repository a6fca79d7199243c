"""The operators on the Triton backend: checks, and launches of triton_kernels.py.

For eager code and captured loops: these are not operators of torch, so `torch.compile` breaks its
graph at them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import checks, noise, triton_kernels
from .checks import Layout, require

# One thread takes the four elements that share a counter: 64 registers hold a step.
WARPS = 4
BLOCK = 4 * 32 * WARPS
OPTIONS = {"num_warps": WARPS, "maxnreg": 64, "enable_fp_fusion": False}
MANY = 1 << 14  # chunks from which a program takes more than one
LARGE = 1 << 30  # elements of a sample, or between two, from which places take 64 bits


def _launch(
    kernel: Any, like: Tensor, extent: int, elements: int, *args: Any, **named: Any
) -> None:
    """like: a tensor of the batch. extent: in any tensor a sample's elements lie less apart."""
    if like.numel() == 0:
        return
    chunks = -(-elements // BLOCK)
    each = 8 if len(like) * chunks >= MANY else 1
    named |= {"elements": elements, "chunks": chunks, "EACH": each, "LARGE": extent >= LARGE}
    with torch.cuda.device_of(like) if like.is_cuda else nullcontext():
        kernel[len(like) * -(-chunks // each),](*args, BLOCK=BLOCK, **named, **OPTIONS)


def _together(layouts: Sequence[Layout], channels: int, pixels: int) -> bool:
    """Whether a sample's elements lie one after another in each tensor."""
    return all(
        layout.pixel == 1 and (layout.channel == pixels or channels == 1) for layout in layouts
    )


def _extent(layouts: Sequence[Layout], channels: int, pixels: int) -> int:
    return max(channels * abs(layout.channel) + pixels * abs(layout.pixel) for layout in layouts)


def randn(
    seed: Tensor, sample_index: Tensor, shape: Sequence[int], step: int, stream: int
) -> Tensor:
    require(seed.ndim == 1, f"seed must have the shape (N,), but it is {tuple(seed.shape)}.")
    seed = checks.per_sample("seed", seed, len(seed), seed)
    sample_index = checks.per_sample("sample_index", sample_index, len(seed), seed)
    for name, value, bits in (("step", step, 20), ("stream", stream, 12)):
        require(
            0 <= value < 1 << bits, f"{name} must be between 0 and 2^{bits} - 1, but it is {value}."
        )
    require(min(shape, default=1) >= 0, f"shape must have no negative size, but it is {shape}.")
    elements = math.prod(shape)
    checks.require_elements(elements)
    out = seed.new_empty((len(seed), *shape), dtype=torch.float32)
    _launch(
        triton_kernels.randn_kernel,
        *(out, elements, elements, out, seed, sample_index),
        counter=step | stream << 20,
    )
    return out


class _QSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_start, coefficients, timesteps, seed, sample_index, given):
        x_t = torch.empty_like(x_start)
        layout = checks.layout_of(x_t)
        if layout is None:
            x_t = torch.empty_like(x_start, memory_format=torch.contiguous_format)
            layout = checks.layout_of(x_t)
        # One layout serves all: where they differ (a slice, say), the inputs are copied.
        x_start, given = (_ordered_like(x_t, t) for t in (x_start, given))
        drawn = torch.empty_like(x_t) if given is None else None
        channels, pixels = checks.channels_and_pixels(x_t)
        _launch(
            triton_kernels.q_sample_kernel,
            *(x_t, _extent([layout], channels, pixels), channels * pixels, x_t, drawn, x_start),
            *(given, coefficients, timesteps, seed, sample_index, layout),
            pixels=pixels,
            table_rows=len(coefficients),
            counter=noise.Q_SAMPLE << 20,
            TOGETHER=_together([layout], channels, pixels),
        )
        ctx.save_for_backward(coefficients, timesteps)
        if drawn is not None:
            ctx.mark_non_differentiable(drawn)
        return x_t, drawn

    @staticmethod
    def backward(ctx, grad_x_t, grad_noise):
        coefficients, timesteps = ctx.saved_tensors
        scale = coefficients[timesteps, 0].reshape(-1, *[1] * (grad_x_t.ndim - 1))
        return scale * grad_x_t, None, None, None, None, None


def _ordered_like(like: Tensor, t: Tensor | None) -> Tensor | None:
    """`t`, or a copy of it in the memory order of `like`."""
    if t is None or t.stride() == like.stride():
        return t
    return torch.empty_like(like).copy_(t)


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    checks.require_dtype("x_start", x_start, torch.float32)
    require(x_start.ndim >= 1, "x_start must have the samples as its first dimension.")
    checks.require_elements(x_start.shape[1:].numel())
    coefficients = checks.table("coefficients", coefficients, torch.float32, 2, x_start)
    keys = (("timesteps", timesteps), ("seed", seed), ("sample_index", sample_index))
    numbers = [checks.per_sample(name, t, len(x_start), x_start) for name, t in keys]
    if given is not None:
        checks.like_state("noise", given, "x_start", x_start)
    x_t, drawn = _QSample.apply(x_start, coefficients, *numbers, given)
    return x_t, drawn if given is None else given


def _separate(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """What is written shares memory with nothing else."""
    names = list(written)
    for i, name in enumerate(names):
        if written[name] is not None:
            for other, t in (*read.items(), *((n, written[n]) for n in names[i + 1 :])):
                checks.disjoint(name, written[name], other, t)


def p_sample_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    row: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    given: Tensor | None,
    guidance_scale: Tensor | None,
    previous: Tensor | None,
    status: Tensor | None,
    next_input: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """x_prev: x_t itself where `in_place`, else a new tensor."""
    channels, learned = checks.step(
        x_t, model_output, coefficients, index, given, guidance_scale, previous, status, next_input
    )
    keys = (("row", row), ("seed", seed), ("sample_index", sample_index))
    numbers = [checks.per_sample(name, t, len(x_t), x_t) for name, t in keys]
    out = x_t
    if not in_place:
        x_t = checks.walkable(x_t)
        out = torch.empty_like(x_t)
    state = {"x_t": x_t}
    written = {"previous_pred_xstart": previous, "next_input": next_input}
    read = {"model_output": model_output, "noise": given}
    _separate(written | state, read) if in_place else _separate(written, state | read)
    for name, t in (written | {"x_t": out}).items():
        checks.writable(name, t)
    model_output, given = checks.walkable(model_output), checks.walkable(given)

    tensors = (out, x_t, model_output, given, previous, next_input)
    layouts = [None if t is None else checks.layout_of(t) for t in tensors]
    known = [layout for layout in layouts if layout is not None]
    pixels = math.prod(x_t.shape[2:])
    _launch(
        triton_kernels.step_kernel,
        *(out, _extent(known, channels, pixels), channels * pixels, *tensors, guidance_scale),
        *(coefficients.contiguous(), index.contiguous(), *numbers, status, *layouts),
        unconditional=len(x_t) * layouts[2].sample,
        variance=channels * layouts[2].channel,
        next_copy=0 if next_input is None else len(x_t) * layouts[5].sample,
        pixels=pixels,
        table_rows=len(coefficients),
        LEARNED=learned,
        TOGETHER=_together(known, channels, pixels),
    )
    return out
