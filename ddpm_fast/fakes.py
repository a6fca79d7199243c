"""What torch needs to trace the operators: shapes without data, and q_sample's gradient.

Used by torch.compile, torch.export and tensors on "meta". What a layer's result has its shape and
dtype from is refused in the kernels' sentences; what else they refuse is left to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fallback
from .backend import multiplies_tiles
from .checks import require_one_of
from .memory import require

LAYER_DTYPES = (torch.float32, torch.bfloat16)  # of what a layer is given, and makes


def _require_one_device(*tensors: Tensor | None) -> None:
    """What torch asks of the fake implementations, because one of the tensors is on "meta"."""
    devices = sorted({str(t.device) for t in tensors if t is not None})
    if len(devices) > 1:
        raise RuntimeError(
            f"ddpm_fast: all tensors must be on one device, but they are on"
            f" {' and '.join(devices)}; move them with .to()."
        )


def _require_image(name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    require_one_of(name, t, *dtypes)
    shape = tuple(t.shape)
    require(t.ndim == 4, f"{name} must be of the shape (N, C, H, W), but it is {shape}.")


def _require_like(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    require_one_of(name, t, like.dtype)
    shape, got = tuple(like.shape), tuple(t.shape)
    require(got == shape, f"{name} must have the shape of {like_name}, {shape}, but it is {got}.")


def _require_pair(name: str, values: Sequence[int]) -> None:
    require(
        len(values) == 2 and min(values) > 0,
        f"{name} must be two integers from 1, for height and width.",
    )


def register() -> None:
    """Fake implementations (shapes without data) and q_sample's gradient."""

    @torch.library.register_fake("ddpm_fast::randn")
    def _(seed, sample_index, shape, step, stream):
        _require_one_device(seed, sample_index)
        return seed.new_empty((seed.shape[0], *shape), dtype=torch.float32)

    @torch.library.register_fake("ddpm_fast::q_sample")
    def _(x_start, coefficients, timesteps, seed, sample_index, noise=None):
        _require_one_device(x_start, coefficients, timesteps, seed, sample_index, noise)
        drawn = torch.empty_like(x_start) if noise is None else x_start.new_empty((0,))
        return torch.empty_like(x_start), drawn

    @torch.library.register_fake("ddpm_fast::p_sample_step")
    def _(x_t, *args, **kwargs):
        _require_one_device(x_t, *args, *kwargs.values())
        return torch.empty_like(x_t)

    @torch.library.register_fake("ddpm_fast::p_sample_step_")
    def _(x_t, *args, **kwargs):
        _require_one_device(x_t, *args, *kwargs.values())

    @torch.library.register_fake("ddpm_fast::group_norm")
    def _(x, skip, shift, weight, bias, groups, eps, silu, half=False):
        _require_one_device(x, skip, shift, weight, bias)
        _require_image("x", x, *LAYER_DTYPES, torch.float16)
        n, channels, *pixels = x.shape
        if skip is not None:
            _require_image("skip", skip, x.dtype)
            require(
                (skip.shape[0], *skip.shape[2:]) == (n, *pixels),
                f"skip must have the samples and the sizes of x, {tuple(x.shape)}, but it is"
                f" {tuple(skip.shape)}.",
            )
            channels += skip.shape[1]
        size = (n, channels, *pixels)
        out = x.new_empty(size, dtype=torch.float16 if half else x.dtype)
        return out.to(memory_format=torch.channels_last)

    @torch.library.register_fake("ddpm_fast::pack_conv2d")
    def _(weight, dtype, winograd=False):
        # The kernel alone knows how wide its blocks are.
        if dtype != torch.float32:
            dtype = torch.float16 if winograd else torch.bfloat16
        return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=dtype)

    @torch.library.register_fake("ddpm_fast::conv2d")
    def _(
        x,
        weight,
        bias,
        residual,
        out_channels,
        kernel_size,
        stride,
        padding,
        winograd=False,
        half=False,
    ):
        _require_one_device(x, weight, bias, residual)
        is_half = x.dtype == torch.float16
        takes_half = winograd or (is_half and multiplies_tiles(torch.bfloat16))
        _require_image("x", x, *LAYER_DTYPES, *(torch.float16,) * takes_half)
        _require_pair("kernel_size", kernel_size)
        _require_pair("stride", stride)
        require(
            len(padding) in (2, 4) and min(padding) >= 0,
            "padding must be two integers from 0, for height and width, or four, for top, left,"
            " bottom and right.",
        )
        before, after = padding[:2], padding[-2:]
        room = [x.shape[i + 2] + before[i] + after[i] - kernel_size[i] for i in range(2)]
        require(
            min(room) >= 0,
            f"x, {tuple(x.shape)}, must be as large as the kernel, with its padding.",
        )
        size = [room[i] // stride[i] + 1 for i in range(2)]
        dtype = torch.bfloat16 if is_half and not half else x.dtype
        out = x.new_empty((x.shape[0], out_channels, *size), dtype=dtype)
        out = out.to(memory_format=torch.channels_last)
        if residual is not None:
            _require_like("residual", residual, "the result", out)
        return out

    @torch.library.register_fake("ddpm_fast::upsample_conv2d")
    def _(x, weight, bias, out_channels):
        _require_one_device(x, weight, bias)
        _require_image("x", x, *LAYER_DTYPES)
        require(
            weight.ndim == 2 and weight.shape[0] in (2, 4),
            "weight must have the shape (4, packed), or (2, packed) to double the width alone, but"
            f" it is {tuple(weight.shape)}.",
        )
        n, _, height, width = x.shape
        size = (n, out_channels, weight.shape[0] // 2 * height, 2 * width)
        return x.new_empty(size).to(memory_format=torch.channels_last)

    @torch.library.register_fake("ddpm_fast::attention")
    def _(query, key, value, heads):
        _require_one_device(query, key, value)
        _require_image("query", query, *LAYER_DTYPES)
        for name, t in (("key", key), ("value", value)):
            _require_like(name, t, "query", query)
        return query.new_empty(query.shape).to(memory_format=torch.channels_last)

    def setup_context(ctx, inputs, output):
        _, coefficients, timesteps, *_ = inputs
        ctx.save_for_backward(coefficients, timesteps)
        ctx.mark_non_differentiable(output[1])

    def backward(ctx, grad_x_t, grad_drawn):
        needed = (*ctx.needs_input_grad, False)  # torch leaves an argument's default out
        return fallback.q_sample_gradients(*ctx.saved_tensors, grad_x_t, needed)

    torch.library.register_autograd("ddpm_fast::q_sample", backward, setup_context=setup_context)
