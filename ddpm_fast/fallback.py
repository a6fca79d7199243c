"""The operators on the reference backend: `reference.step` and `noise.randn`, any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, layer_checks, moments
from . import noise as contract
from .backend import is_available


def randn(
    seed: Tensor,
    sample_index: Tensor,
    shape: Sequence[int],
    step: int,
    stream: int = contract.SAMPLING,
) -> Tensor:
    """The contract's normals, made on the host.

    On the CPU the kernels are compared with these, so they are NumPy's; elsewhere they are the
    compiled kernel's, the same bits sooner, if it is there.
    """
    seed, sample_index = checks.randn(seed, sample_index, shape, step, stream)
    host = seed.cpu(), sample_index.cpu()
    if seed.device.type != "cpu" and is_available():
        normals = torch.ops.ddpm_fast.randn.default(*host, shape, step, stream)
    else:
        seeds, samples = (t.numpy().view(np.uint64) for t in host)
        normals = torch.from_numpy(contract.randn(seeds, samples, step, shape, stream))
    return normals.to(seed.device)


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    coefficients, timesteps, seed, sample_index = checks.q_sample(
        x_start, coefficients, timesteps, seed, sample_index, noise
    )
    if len(timesteps) and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < len(coefficients):
        raise ValueError(
            f"timesteps must be between 0 and {len(coefficients) - 1}, the table's rows, but they"
            f" are {timesteps.tolist()}."
        )
    if noise is None:
        noise = randn(seed, sample_index, x_start.shape[1:], 0, contract.Q_SAMPLE)
    rows = coefficients[timesteps].reshape(-1, 2, *[1] * (x_start.ndim - 1))
    return rows[:, 0] * x_start + rows[:, 1] * noise, noise


def q_sample_gradients(
    coefficients: Tensor, timesteps: Tensor, grad_x_t: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of a fused q_sample's six arguments; NaN where a timestep is not in the table."""
    known = (timesteps >= 0) & (timesteps < len(coefficients))
    rows = coefficients[timesteps.clamp(0, len(coefficients) - 1)]
    rows = torch.where(known[:, None], rows, torch.nan).reshape(-1, 2, *[1] * (grad_x_t.ndim - 1))
    x_start, noise = (rows[:, i] * grad_x_t if needed[j] else None for i, j in ((0, 0), (1, 5)))
    return x_start, None, None, None, None, noise


def _draw(
    index: Tensor, row: Tensor, seed: Tensor, sample_index: Tensor, shape: Sequence[int]
) -> Tensor:
    """Each sample's normals at its own noise step."""
    steps = index[row, 1]
    normals = torch.empty(len(steps), *shape, device=row.device)
    for step in steps.unique().tolist():
        mine = steps == step
        normals[mine] = randn(seed[mine], sample_index[mine], shape, step)
    return normals


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
    previous_pred_xstart: Tensor | None,
    status: Tensor | None,
    next_input: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    from . import reference

    coefficients, index, row, seed, sample_index = checks.p_sample_step(
        *(x_t, model_output, coefficients, index, row, seed, sample_index, noise, guidance_scale),
        *(previous_pred_xstart, status, next_input, in_place),
    )
    if len(row) and not 0 <= int(row.min()) <= int(row.max()) < len(coefficients):
        raise ValueError(
            f"row must be between 0 and {len(coefficients) - 1}, the table's rows, but it is"
            f" {row.tolist()}."
        )
    noisy = bool(((coefficients[row, 6] != 0) | (index[row, 2] & 1 != 0)).any())
    if noise is None and noisy:
        noise = _draw(index, row, seed, sample_index, x_t.shape[1:])
    scale = None if guidance_scale is None else guidance_scale.reshape(())
    x_prev, pred_xstart = reference.step(
        coefficients, index, row, x_t, model_output, noise, previous_pred_xstart, scale
    )
    if previous_pred_xstart is not None:
        previous_pred_xstart.copy_(pred_xstart)
    if next_input is not None:
        next_input.copy_(x_prev if guidance_scale is None else torch.cat((x_prev, x_prev)))
    if status is not None and int(status[0]) == 0:
        bad = ~torch.isfinite(x_prev).flatten(1).all(1)
        if bad.any():
            sample = int(bad.nonzero()[0])
            status[:3] = torch.tensor([2, int(row[sample]), sample], dtype=status.dtype)
    return x_t.copy_(x_prev) if in_place else torch.empty_like(x_t).copy_(x_prev)


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
) -> Tensor:
    h = (x if skip is None else torch.cat((x, skip), 1)).float()

    def per_channel(v: Tensor) -> Tensor:
        return v.reshape(-1, h.shape[1], *[1] * (h.ndim - 2))

    if shift is not None:
        h = h + per_channel(shift)
    h = F.group_norm(h, groups, eps=eps) * per_channel(weight) + per_channel(bias)
    h = (F.silu(h) if silu else h).to(torch.float16 if half else x.dtype)
    return h.contiguous(memory_format=torch.channels_last)


def finish_conv2d(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, phases: Sequence[int]
) -> tuple[Tensor, Tensor]:
    n, channels, height, width = layer_checks.finish_conv2d(x, bias, residual, phases)
    rows, columns = phases
    h = x.float().unflatten(1, (rows, columns, channels))
    y = h.new_empty(n, channels, height, width)
    for i in range(rows):
        for j in range(columns):
            phase = h[:, i, j, :, i : i + height // rows, j : j + width // columns]
            y[:, :, i::rows, j::columns] = phase
    if bias is not None:
        y = y + bias[:, None, None]
    if residual is not None:
        y = y + residual.float()
    y = y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return y, moments.of(y)


def table_rows(table: Tensor, known: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    layer_checks.table_rows(table, known, t, labels)
    same = known[None] == t.float()[:, None]
    place = same.int().argmax(1)
    if labels is not None:
        place = place + labels * len(known)
    is_there = same.any(1) & (place >= 0) & (place < len(table))
    return torch.where(is_there[:, None], table[place.clamp(0, len(table) - 1)], torch.nan)
