"""The fused operators of a prepared U-Net: part of `ops`, where their users find them.

Images are (N, C, H, W) in channels_last order.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import fallback
from .backend import (
    BackendError,
    conv_kernels,
    has_attention,
    is_available,
    multiplies_tiles,
    resolve_backend,
)
from .checks import refuse_grad


def _triton_layers() -> ModuleType:
    from . import triton_layers

    return triton_layers


def _require_extension() -> None:
    """For what has no other backend: BackendError where it is missing."""
    if not is_available():
        resolve_backend("cpu", "cpu")


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
    moments: tuple[Tensor | None, Tensor | None] = (None, None),
    backend: str = "auto",
) -> Tensor:
    """GroupNorm (Wu and He 2018, arXiv:1803.08494) of x + shift, then SiLU if `silu`.

    x: (N, C, H, W), float32, bfloat16 or float16, channels_last; with skip, likewise, its channels
    follow x's. shift, weight, bias: float32 (C,), (1, C) or (N, C), of all channels. Sums are
    float32. moments: x's and skip's, where `finish_conv2d` gave them; else a GPU makes them first,
    and a CPU needs none. Returns (N, C, H, W), channels_last, in x's dtype, or with `half`, which
    float32 cannot have, in float16, where what is beyond 65504 is infinite. On a GPU the kernels
    are Triton's, also with the backend "cuda". No gradients. Raises RuntimeError where an argument
    is not so, and BackendError where `backend` is not available.
    """
    refuse_grad("group_norm", x, skip, shift, weight, bias)
    name = resolve_backend(x.device, backend)[0]
    settings = (x, skip, shift, weight, bias, groups, eps, silu, half)
    if name == "reference":
        return fallback.group_norm(*settings)
    if name == "cpu":
        return torch.ops.ddpm_fast.group_norm.default(*settings)
    return _triton_layers().group_norm(*settings, moments)


def finish_conv2d(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    phases: tuple[int, int] = (1, 1),
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What follows a convolution on a GPU: (x + bias + residual, its moments), rounded once.

    x: (N, C, H, W), float32, bfloat16 or float16, channels_last, which a convolution without bias
    made. bias: float32 (C,). residual: like the result. phases: (1, 1); or (2, 2), or (1, 2) to
    double the width alone, for an x (N, 4 C, H + 1, W + 1) or (N, 2 C, H, W + 1) whose channels are
    the phases of a doubled image, see `upsample_conv2d`: the result is (N, C, 2 H, 2 W) or
    (N, C, H, 2 W), and phase (i, j)'s pixel (h, w) is x's (h + i, w + j).
    moments: float32 (N, parts, 2, C), see moments.py, for `group_norm`. No gradients. Raises
    RuntimeError where an argument is not so, and BackendError where `backend` is not available or
    is the CPU's, whose convolutions do this themselves.
    """
    refuse_grad("finish_conv2d", x, bias, residual)
    return _on_gpu("finish_conv2d", x, backend).finish_conv2d(x, bias, residual, phases)


def table_rows(
    table: Tensor,
    known: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """What a time table has for each sample, float32 (N, columns), without asking the host.

    table: float32 (labels * timesteps, columns): for each label, a row for each timestep that is
    `known`, float32 (timesteps,), each once. t: (N,), integers or floats. labels: int64 (N,).
    A timestep that is not known, or a label that is out of range, makes NaN. Raises as
    `finish_conv2d`.
    """
    return _on_gpu("table_rows", t, backend).table_rows(table, known, t, labels)


def _on_gpu(name: str, x: Tensor, backend: str) -> ModuleType:
    """Whose functions serve what only a GPU's networks need."""
    chosen = resolve_backend(x.device, backend)[0]
    if chosen == "cpu":
        raise BackendError(f"{name} has no kernel for a CPU: ask for the backend 'reference'.")
    return fallback if chosen == "reference" else _triton_layers()


def has_conv2d(dtype: torch.dtype) -> bool:
    """Whether the backend is "cpu" and this CPU has `conv2d`."""
    return resolve_backend("cpu")[0] == "cpu" and conv_kernels(dtype) is not None


def is_conv2d_fastest(dtype: torch.dtype) -> bool:
    """Whether there is `conv2d`; and no AMX, with which oneDNN is faster in bfloat16, or our own
    kernels for it (tile_trial.py says when)."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return has_conv2d(dtype) and multiplies_tiles(dtype)
    return has_conv2d(dtype)


def pack_conv2d(weight: Tensor, dtype: torch.dtype, winograd: bool = False) -> Tensor:
    """A convolution's weight (O, I, kH, kW), float32, as `conv2d` reads it for an x of `dtype`.

    dtype: float32 or bfloat16. winograd: see `conv2d`. Returns a flat tensor, which belongs to the
    CPU level of this process. No gradients. Raises RuntimeError where an argument is not so, and as
    `conv2d`.
    """
    _require_extension()
    refuse_grad("pack_conv2d", weight)
    conv_kernels(dtype)  # settles whose order it is
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

    x: (N, C, H, W), float32 or bfloat16, channels_last; by Winograd's algorithm, or at the level
    amx, which rounds it to bfloat16, also float16, with the weight for bfloat16. weight: from
    `pack_conv2d`, for x's dtype. bias: float32 (O,).
    residual: like the result, (N, O, H', W') in x's dtype, channels_last; but for float16 both are
    bfloat16, unless the result is to stay float16, `half`.
    kernel_size, stride, padding: of (height, width); a padding of four: (top, left, bottom, right).
    winograd: by Winograd's algorithm with tiles of 4 x 4 (Lavin and Gray, 2015, equation 8), for
    kernels of 3 x 3 and stride 1; a quarter of the products, in float32 with about twice the error,
    and many channels must share what it costs.
    A sample's bits depend on the sample alone. No gradients. Raises RuntimeError where an argument
    is not so, and on a CPU without AVX2, or without AVX512-BF16 for bfloat16; BackendError without
    the compiled extension.
    """
    _require_extension()
    refuse_grad("conv2d", x, weight, bias, residual)
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
    refuse_grad("upsample_conv2d", x, weight, bias)
    return torch.ops.ddpm_fast.upsample_conv2d.default(x, weight, bias, out_channels)


def is_attention_fastest(dtype: torch.dtype) -> bool:
    """Whether the backend is "cpu" and this CPU has `attention`; and no AMX, with which torch's is
    faster in bfloat16, or our own kernels for it, see `is_conv2d_fastest`."""
    is_there = resolve_backend("cpu")[0] == "cpu" and has_attention(dtype)
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return is_there and multiplies_tiles(dtype)
    return is_there


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int = 1) -> Tensor:
    """softmax(query key') value over the pixels of each sample, for each of `heads` equal ranges of
    channels (Vaswani et al. 2017, arXiv:1706.03762, equation 1, with the scale in the query).

    query, key, value: (N, C, H, W), float32 or bfloat16, channels_last, or as many neighbouring
    channels of such a tensor. Returns (N, C, H, W) in their dtype, channels_last. Scores and sums
    are float32; softmax's weights are rounded to the dtype. In bfloat16 at the level amx
    (tile_trial.py) tiles make both products. A sample's bits depend on the sample alone, and only
    the scores of a few queries are kept. No gradients. Raises RuntimeError where an argument is not
    so, and on a CPU without AVX-512, or without AVX512-BF16 for bfloat16; BackendError without the
    compiled extension.
    """
    _require_extension()
    refuse_grad("attention", query, key, value)
    has_attention(query.dtype)  # settles by which kernels
    return torch.ops.ddpm_fast.attention.default(query, key, value, heads)
