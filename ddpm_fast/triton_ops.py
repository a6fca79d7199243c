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
from .fallback import q_sample_gradients
from .memory import Layout, channels_and_pixels, layout_of, walkable

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
    seed, sample_index = checks.randn(seed, sample_index, shape, step, stream)
    elements = math.prod(shape)
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
        x_t = like = torch.empty_like(x_start)
        layout = layout_of(x_t)
        if layout is None:
            x_t = torch.empty_like(x_start, memory_format=torch.contiguous_format)
            layout = layout_of(x_t)
        # One layout serves all: where they differ (a slice, say), the inputs are copied.
        x_start, given = (_ordered_like(x_t, t) for t in (x_start, given))
        drawn = torch.empty_like(x_t) if given is None else None
        channels, pixels = channels_and_pixels(x_t)
        _launch(
            triton_kernels.q_sample_kernel,
            *(x_t, _extent([layout], channels, pixels), channels * pixels, x_t, drawn, x_start),
            *(given, coefficients, timesteps, seed, sample_index, layout),
            pixels=pixels,
            table_rows=len(coefficients),
            counter=noise.Q_SAMPLE << 20,
            TOGETHER=_together([layout], channels, pixels),
        )
        x_t, drawn = (_ordered_like(like, t) for t in (x_t, drawn))
        ctx.save_for_backward(coefficients, timesteps)
        if drawn is not None:
            ctx.mark_non_differentiable(drawn)
        return x_t, drawn

    @staticmethod
    def backward(ctx, grad_x_t, grad_drawn):
        return q_sample_gradients(*ctx.saved_tensors, grad_x_t, ctx.needs_input_grad)


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
    tables = checks.q_sample(x_start, coefficients, timesteps, seed, sample_index, given)
    x_t, drawn = _QSample.apply(x_start, *tables, given)
    return x_t, drawn if given is None else given


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
    tables = checks.p_sample_step(
        *(x_t, model_output, coefficients, index, row, seed, sample_index, given, guidance_scale),
        *(previous, status, next_input, in_place),
    )
    like = x_t
    x_t = walkable(x_t)
    out = x_t if in_place else torch.empty_like(x_t)
    model_output, given = walkable(model_output), walkable(given)
    channels, pixels = channels_and_pixels(x_t)

    tensors = (out, x_t, model_output, given, previous, next_input)
    layouts = [None if t is None else layout_of(t) for t in tensors]
    known = [layout for layout in layouts if layout is not None]
    _launch(
        triton_kernels.step_kernel,
        *(out, _extent(known, channels, pixels), channels * pixels, *tensors, guidance_scale),
        *(*tables, status, *layouts),
        unconditional=len(x_t) * layouts[2].sample,
        variance=channels * layouts[2].channel,
        next_copy=0 if next_input is None else len(x_t) * layouts[5].sample,
        pixels=pixels,
        table_rows=len(coefficients),
        LEARNED=model_output.shape[1] != channels,
        TOGETHER=_together(known, channels, pixels),
    )
    return out if x_t is like else torch.empty_like(like).copy_(out)
