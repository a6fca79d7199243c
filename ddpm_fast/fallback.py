"""The operators on the reference backend: `reference.step` and `noise.randn`, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import noise as contract
from .backend import is_available
from .checks import MODEL_DTYPES


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
    for name, value in (("seed", seed), ("sample_index", sample_index)):
        if value.dtype != torch.int64 or value.ndim != 1 or len(value) != len(seed):
            raise ValueError(
                f"{name} must be int64 of shape (N,), but it is {value.dtype} of shape"
                f" {tuple(value.shape)}."
            )
    host = seed.cpu(), sample_index.cpu()
    if seed.device.type != "cpu" and is_available():
        normals = torch.ops.ddpm_fast.randn.default(*host, shape, step, stream)
    else:
        seeds, samples = (t.numpy() for t in host)
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
    steps = index[row, 1]
    normals = torch.empty(len(steps), *shape, device=row.device)
    for step in steps.unique().tolist():
        mine = steps == step
        normals[mine] = randn(seed[mine], sample_index[mine], shape, step)
    return normals


def _check_next_input(next_input: Tensor | None, x_t: Tensor, copies: int) -> None:
    if next_input is None:
        return
    wanted = (copies * x_t.shape[0], *x_t.shape[1:])
    if next_input.shape != wanted or next_input.dtype not in MODEL_DTYPES:
        raise ValueError(
            f"next_input must be float32, bfloat16 or float16 of shape {wanted}, but it is"
            f" {next_input.dtype} of shape {tuple(next_input.shape)}."
        )


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
) -> Tensor:
    from . import reference

    if len(row) and not 0 <= int(row.min()) <= int(row.max()) < len(coefficients):
        raise ValueError(
            f"row must be between 0 and {len(coefficients) - 1}, the table's rows, but it is"
            f" {row.tolist()}."
        )
    copies = 1 if guidance_scale is None else 2
    _check_next_input(next_input, x_t, copies)
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
        next_input.copy_(torch.cat([x_prev] * copies))
    if status is not None and int(status[0]) == 0:
        bad = ~torch.isfinite(x_prev).flatten(1).all(1)
        if bad.any():
            sample = int(bad.nonzero()[0])
            status[:3] = torch.tensor([2, int(row[sample]), sample], dtype=status.dtype)
    return x_prev
