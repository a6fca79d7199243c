"""The operators on the reference backend: `reference.step` and `noise.randn`, any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import noise as contract


def randn(
    seed: Tensor, sample_index: Tensor, shape: Sequence[int], step: int, stream: int
) -> Tensor:
    for name, value in (("seed", seed), ("sample_index", sample_index)):
        if value.dtype != torch.int64 or value.ndim != 1 or len(value) != len(seed):
            raise ValueError(
                f"{name} must be int64 of shape (N,), but it is {value.dtype} of shape"
                f" {tuple(value.shape)}."
            )
    normals = contract.randn(seed.cpu().numpy(), sample_index.cpu().numpy(), step, shape, stream)
    return torch.from_numpy(normals).to(seed.device)


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if len(timesteps) and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < len(coefficients):
        raise ValueError(
            f"timesteps must be between 0 and {len(coefficients) - 1}, the table's rows, but they"
            f" are {timesteps.tolist()}."
        )
    if noise is None:
        noise = randn(seed, sample_index, x_start.shape[1:], 0, contract.Q_SAMPLE)
    elif noise.shape != x_start.shape:
        raise ValueError(
            f"noise must have the shape of x_start, {tuple(x_start.shape)}, but it is"
            f" {tuple(noise.shape)}."
        )
    rows = coefficients[timesteps].reshape(-1, 2, *[1] * (x_start.ndim - 1))
    return rows[:, 0] * x_start + rows[:, 1] * noise, noise


def _draw(
    index: Tensor, row: Tensor, seed: Tensor, sample_index: Tensor, shape: Sequence[int]
) -> Tensor:
    """Each sample's normals at its own noise step."""
    seeds, samples = seed.cpu().numpy(), sample_index.cpu().numpy()
    steps = index[row, 1].cpu().numpy()
    normals = np.empty((len(steps), *shape), np.float32)
    for step in np.unique(steps):
        mine = steps == step
        normals[mine] = contract.randn(seeds[mine], samples[mine], int(step), shape)
    return torch.from_numpy(normals).to(row.device)


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
) -> Tensor:
    from . import reference

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
    if status is not None and int(status[0]) == 0:
        bad = ~torch.isfinite(x_prev).flatten(1).all(1)
        if bad.any():
            sample = int(bad.nonzero()[0])
            status[:3] = torch.tensor([2, int(row[sample]), sample], dtype=status.dtype)
    return x_prev
