"""The fused operators: noise, the forward process, one step of sampling, and normalisation.

Each is `torch.ops.ddpm_fast.*`, registered in C++ (csrc/torch_ops.cpp), behind a typed function
that picks the backend. (Triton's are plain functions, triton_ops.py: for eager code and captured
loops, not for `torch.compile`.) All tensors of a call lie on one device. Equations are those of Ho
et al. 2020, "Denoising diffusion probabilistic models".
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import fakes, fallback, noise
from .backend import (
    BackendError,
    conv_kernels,
    has_attention,
    is_available,
    is_overridden,
    resolve_backend,
)

__all__ = [
    "BackendError",
    "attention",
    "conv2d",
    "group_norm",
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


def _require_extension() -> None:
    """For what has no other backend: BackendError where it is missing."""
    if not is_available():
        resolve_backend("cpu", "cpu")


def _refuse_grad(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"ddpm_fast: {name} is not differentiable; call it under torch.no_grad()."
        )


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
    _refuse_grad("the sampling step", *arguments)
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
    _refuse_grad("the sampling step", *arguments)
    name = resolve_backend(x_t.device, backend)[0]
    if name == "reference":
        return fallback.p_sample_step(*arguments, in_place=True)
    if name == "triton":
        return _triton().p_sample_step(*arguments, in_place=True)
    torch.ops.ddpm_fast.p_sample_step_.default(*arguments)
    return x_t


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    half: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """GroupNorm (Wu and He 2018, arXiv:1803.08494) of x + shift, then SiLU if `silu`.

    x: (N, C, H, W), float32, bfloat16 or float16, channels_last; with skip, likewise, its channels
    follow x's. shift, weight, bias: float32 (C,), (1, C) or (N, C), of all channels. Sums are
    float32. Returns (N, C, H, W), channels_last, in x's dtype, or with `half`, which float32 cannot
    have, in float16, where what is beyond 65504 is infinite. On a CPU only; no gradients. Raises
    RuntimeError where an argument is not so, and BackendError where `backend` is not available.
    """
    _refuse_grad("group_norm", x, skip, shift, weight, bias)
    if resolve_backend(x.device, backend)[0] != "cpu":
        return fallback.group_norm(x, skip, shift, weight, bias, groups, eps, silu, half)
    return torch.ops.ddpm_fast.group_norm.default(
        x, skip, shift, weight, bias, groups, eps, silu, half
    )


def is_conv2d_fastest(dtype: torch.dtype) -> bool:
    """Whether the backend is "cpu" and this CPU has `conv2d`; and no AMX, with which oneDNN is
    faster in bfloat16."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False
    return resolve_backend("cpu")[0] == "cpu" and conv_kernels(dtype) is not None


def pack_conv2d(weight: Tensor, dtype: torch.dtype, winograd: bool = False) -> Tensor:
    """A convolution's weight (O, I, kH, kW), float32, as `conv2d` reads it for an x of `dtype`.

    dtype: float32 or bfloat16. winograd: see `conv2d`. Returns a flat tensor. No gradients. Raises
    RuntimeError where an argument is not so, and as `conv2d`.
    """
    _require_extension()
    _refuse_grad("pack_conv2d", weight)
    return torch.ops.ddpm_fast.pack_conv2d.default(weight, dtype, winograd)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    winograd: bool = False,
    half: bool = False,
) -> Tensor:
    """A convolution, as torch's, plus residual: summed in float32, rounded once.

    x: (N, C, H, W), float32 or bfloat16, channels_last; by Winograd's algorithm also float16, with
    the weight for bfloat16. weight: from `pack_conv2d`, for x's dtype. bias: float32 (O,).
    residual: like the result, (N, O, H', W') in x's dtype, channels_last; but for float16 both are
    bfloat16, unless the result is to stay float16, `half`.
    kernel_size, stride, padding: of (height, width). winograd: by Winograd's algorithm with tiles
    of 4 x 4 (Lavin and Gray, 2015, equation 8), for kernels of 3 x 3 and stride 1; a quarter of the
    products, in float32 with about twice the error, and many channels must share what it costs.
    A sample's bits depend on the sample alone. No gradients. Raises RuntimeError where an argument
    is not so, and on a CPU without AVX2, or without AVX512-BF16 for bfloat16; BackendError without
    the compiled extension.
    """
    _require_extension()
    _refuse_grad("conv2d", x, weight, bias, residual)
    return torch.ops.ddpm_fast.conv2d.default(
        x, weight, bias, residual, out_channels, kernel_size, stride, padding, winograd, half
    )


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, out_channels: int) -> Tensor:
    """Nearest-neighbour doubling of x, and a convolution with 3 taps and padding 1, on the small x.

    An output pixel at 2 i + phase reads the inputs i - 1 and i, or i and i + 1, one of them twice:
    a convolution with 2 taps for each phase, at 4/9 of the multiplications for images.
    x: (N, C, H, W), as in `conv2d`. weight: (4, packed), of the phases' weights (O, C, 2, 2), each
    from `pack_conv2d`, in the order of the pixels; or (2, packed), of (O, C, 1, 2), to double the
    width alone. bias: float32 (O,). Returns (N, O, 2 H, 2 W) or (N, O, H, 2 W). A sample's bits
    depend on the sample alone. No gradients. Raises as `conv2d`.
    """
    _require_extension()
    _refuse_grad("upsample_conv2d", x, weight, bias)
    return torch.ops.ddpm_fast.upsample_conv2d.default(x, weight, bias, out_channels)


def is_attention_fastest(dtype: torch.dtype) -> bool:
    """Whether the backend is "cpu" and this CPU has `attention`; and no AMX, with which torch's is
    faster in bfloat16."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False
    return resolve_backend("cpu")[0] == "cpu" and has_attention(dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int = 1) -> Tensor:
    """softmax(query key') value over the pixels of each sample, for each of `heads` equal ranges of
    channels (Vaswani et al. 2017, arXiv:1706.03762, equation 1, with the scale in the query).

    query, key, value: (N, C, H, W), float32 or bfloat16, channels_last, or as many neighbouring
    channels of such a tensor. Returns (N, C, H, W) in their dtype, channels_last. Scores and sums
    are float32; softmax's weights are rounded to the dtype. A sample's bits depend on the sample
    alone, and only the scores of a few queries are kept. No gradients. Raises RuntimeError where an
    argument is not so, and on a CPU without AVX-512, or without AVX512-BF16 for bfloat16;
    BackendError without the compiled extension.
    """
    _require_extension()
    _refuse_grad("attention", query, key, value)
    return torch.ops.ddpm_fast.attention.default(query, key, value, heads)


if is_available():
    fakes.register()
