"""The fused operators: noise, the forward process, one step of sampling; and layer_ops.py's.

Each is `torch.ops.ddpm_fast.*`, registered in C++ (csrc/torch_ops.cpp), behind a typed function
that picks the backend. (Triton's are plain functions, triton_ops.py and triton_layers.py: for eager
code and captured loops, not for `torch.compile`.) All tensors of a call lie on one device.
Equations are those of Ho et al. 2020, "Denoising diffusion probabilistic models".
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import fakes, fallback, noise
from .backend import BackendError, is_available, is_overridden, resolve_backend
from .checks import refuse_grad
from .layer_ops import (
    attention,
    conv2d,
    finish_conv2d,
    group_norm,
    has_conv2d,
    is_attention_fastest,
    is_conv2d_fastest,
    pack_conv2d,
    table_rows,
    upsample_conv2d,
)

__all__ = [
    "BackendError",
    "attention",
    "conv2d",
    "finish_conv2d",
    "group_norm",
    "has_conv2d",
    "is_attention_fastest",
    "is_available",
    "is_conv2d_fastest",
    "is_overridden",
    "p_sample_step",
    "p_sample_step_",
    "pack_conv2d",
    "q_sample",
    "randn",
    "resolve_backend",
    "table_rows",
    "upsample_conv2d",
]


def _triton() -> ModuleType:
    # Only where it is used: importing triton takes longer than all else.
    from . import triton_ops

    return triton_ops


def randn(
    seed: Tensor,
    sample_index: Tensor,
    shape: Sequence[int],
    step: int = 0,
    stream: int = noise.SAMPLING,
    *,
    backend: str = "auto",
) -> Tensor:
    """Standard normals (N, *shape), float32: the noise contract (ddpm_fast/noise.py).

    seed, sample_index: int64 (N,). shape: of one sample, in C, H, W order. step: 0 .. 2^20 - 1
    (0 draws x_T). Raises RuntimeError or ValueError where an argument is not so, and BackendError
    where `backend` is not available.
    """
    name = resolve_backend(seed.device, backend)[0]
    if name == "reference":
        return fallback.randn(seed, sample_index, shape, step, stream)
    if name == "triton":
        return _triton().randn(seed, sample_index, shape, step, stream)
    return torch.ops.ddpm_fast.randn.default(seed, sample_index, shape, step, stream)


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    noise: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Equation 4: (x_t, noise), x_t = coefficients[t, 0] * x_start + coefficients[t, 1] * noise.

    x_start: float32 (N, ...). coefficients: float32 (T, 2), the square roots of alphas_cumprod and
    of 1 - alphas_cumprod. timesteps, seed, sample_index: int64 (N,), timesteps in 0 .. T - 1.
    noise: float32 of x_start's shape; if it is not given, that of stream 1, step 0.
    Differentiable with respect to x_start and noise. Raises RuntimeError or ValueError where an
    argument is not so, and BackendError where `backend` is not available.
    """
    name = resolve_backend(x_start.device, backend)[0]
    if name == "reference":
        return fallback.q_sample(x_start, coefficients, timesteps, seed, sample_index, noise)
    if name == "triton":
        return _triton().q_sample(x_start, coefficients, timesteps, seed, sample_index, noise)
    x_t, drawn = torch.ops.ddpm_fast.q_sample.default(
        x_start, coefficients, timesteps, seed, sample_index, noise
    )
    return x_t, drawn if noise is None else noise


def p_sample_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    row: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    noise: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    previous_pred_xstart: Tensor | None = None,
    status: Tensor | None = None,
    next_input: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One step of a plan, x_{t-1} of equations 7 and 11 for DDPM; returns it like x_t.

    pred_xstart = clip(a * x_t + b * model_output), x_prev = c0 * pred_xstart + c1 * x_t
    + c2 * previous_pred_xstart + c3 * model_output + sigma * noise.

    x_t: float32 (N, C, ...), any memory order, which the result keeps. model_output: (N, C, ...),
    or 2 C channels where the model learns the variance; float32, bfloat16 or float16; any memory
    order. With guidance_scale (float32, one element) it has 2 N rows, conditional then
    unconditional, and unconditional + scale * (conditional - unconditional) is used.
    coefficients: float32 (S, 16), index: int32 (S, 4): a plan's table. row: int64 (N,), each
    sample's row in it. seed, sample_index: int64 (N,), whose noise is drawn where a row has any,
    unless `noise` (float32 like x_t) is given.
    previous_pred_xstart: float32 like x_t, read where c2 is not 0, then overwritten by pred_xstart.
    status: int32 (4,): code (1: a row that cannot be used, on CUDA; 2: a value that is not finite),
    row, position in the batch; the first report stays.
    next_input: (N, C, ...), float32, bfloat16 or float16, contiguous or channels_last: x_prev is
    written there too, rounded to its dtype, as what the network is given next; with guidance_scale
    it has 2 N rows, and both halves are written.
    Raises RuntimeError or ValueError where an argument is not so (no gradients, no shared memory
    between what is read and written), and BackendError where `backend` is not available.
    """
    arguments = (x_t, model_output, coefficients, index, row, seed, sample_index, noise)
    arguments += (guidance_scale, previous_pred_xstart, status, next_input)
    refuse_grad("the sampling step", *arguments)
    name = resolve_backend(x_t.device, backend)[0]
    if name == "reference":
        return fallback.p_sample_step(*arguments)
    if name == "triton":
        return _triton().p_sample_step(*arguments)
    return torch.ops.ddpm_fast.p_sample_step.default(*arguments)


def p_sample_step_(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    row: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    noise: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    previous_pred_xstart: Tensor | None = None,
    status: Tensor | None = None,
    next_input: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`p_sample_step` in place: x_t becomes x_prev, and is returned. x_t is contiguous,
    channels_last or a slice of such a tensor."""
    arguments = (x_t, model_output, coefficients, index, row, seed, sample_index, noise)
    arguments += (guidance_scale, previous_pred_xstart, status, next_input)
    refuse_grad("the sampling step", *arguments)
    name = resolve_backend(x_t.device, backend)[0]
    if name == "reference":
        return fallback.p_sample_step(*arguments, in_place=True)
    if name == "triton":
        return _triton().p_sample_step(*arguments, in_place=True)
    torch.ops.ddpm_fast.p_sample_step_.default(*arguments)
    return x_t


if is_available():
    fakes.register()
