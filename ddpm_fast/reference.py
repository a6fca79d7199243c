"""The pure-Python path: the oracle of everything fused. Plain tensor operations, any dtype.

Two forms, held together in float64 by the tests:
- the published formulas under guided-diffusion's names (`q_sample` ... `p_sample_loop`), for
  tensors of any rank from 2: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W); t is int64 (N,);
- `step`, the table's formula (`plan.py`) in a fixed order, which fused kernels equal bit for bit.

A learned variance comes from the network as C further channels. Tables are looked up in float64
and rounded once to the state's dtype. Wrong arguments raise ValueError, in one sentence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.arguments import one_of, real
from ddpm_fast.reference_process import (
    PMeanVariance,
    condition_mean,
    condition_score,
    extract,
    p_mean_variance,
    predict_eps,
    predict_xstart,
    q_mean_variance,
    q_posterior_mean_variance,
    q_sample,
    q_step,
    same_shape,
    split,
)
from ddpm_fast.reference_step import step
from ddpm_fast.schedule import VARIANCE_TYPES, NoiseSchedule

__all__ = [
    "PMeanVariance",
    "Sample",
    "ancestral_step",
    "condition_mean",
    "condition_score",
    "ddim_reverse_step",
    "ddim_sample",
    "ddim_step",
    "p_mean_variance",
    "p_sample",
    "p_sample_loop",
    "p_sample_loop_progressive",
    "predict_eps",
    "predict_xstart",
    "q_mean_variance",
    "q_posterior_mean_variance",
    "q_sample",
    "q_step",
    "step",
]


class Sample(NamedTuple):
    """One step's result: `sample` is x_{t-1}; each of x_t's shape."""

    sample: Tensor
    pred_xstart: Tensor


def ancestral_step(mean: Tensor, log_variance: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A draw from p(x_{t-1} | x_t) with the given standard normal noise; the mean where t = 0."""
    same_shape("noise", noise, mean)
    noisy = mean + torch.exp(0.5 * log_variance) * noise
    last = (t == 0).reshape(-1, *[1] * (mean.ndim - 1))
    return torch.where(last, mean, noisy)


def p_sample(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_denoised: bool = True,
) -> Sample:
    """One DDPM step (Ho et al. 2020, algorithm 2); no noise is added where t = 0."""
    out = p_mean_variance(
        schedule, model_output, x_t, t, prediction_type, variance_type, clip_denoised
    )
    return Sample(ancestral_step(out.mean, out.log_variance, t, noise), out.pred_xstart)


def ddim_step(
    schedule: NoiseSchedule,
    pred_xstart: Tensor,
    eps: Tensor,
    t: Tensor,
    noise: Tensor,
    eta: float = 0.0,
) -> Tensor:
    """x_{t-1} of DDIM from x_0 and eps (Song et al. 2020, equations 12 and 16)."""
    same_shape("noise", noise, eps)
    eta = real("eta", eta, 0.0, 1.0)
    ac, ac_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    with np.errstate(invalid="ignore"):  # 0 / 0 past the signal's end comes out as NaN
        sigma = eta * np.sqrt((1 - ac_prev) / (1 - ac)) * np.sqrt(1 - ac / ac_prev)
    direction = np.sqrt(np.maximum(1 - ac_prev - sigma**2, 0.0))
    mean = extract(np.sqrt(ac_prev), t, eps) * pred_xstart + extract(direction, t, eps) * eps
    return mean + extract(sigma, t, eps) * noise


def ddim_reverse_step(
    schedule: NoiseSchedule, pred_xstart: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """x_{t+1} of DDIM without noise from x_0 and eps (Song et al. 2020, section 4.3), as
    guided-diffusion has it: the network was asked at t, and past the last t comes eps itself."""
    keep = extract(np.sqrt(schedule.alphas_cumprod_next), t, eps)
    return keep * pred_xstart + extract(np.sqrt(1.0 - schedule.alphas_cumprod_next), t, eps) * eps


def ddim_sample(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_denoised: bool = True,
    use_clipped_model_output: bool = True,
) -> Sample:
    """One DDIM step (Song et al. 2020, equations 12 and 16), on the schedule's own t -> t-1.

    To take fewer steps, `schedule.respace` first. eps is derived from pred_xstart as it is after
    the clip, or before it (use_clipped_model_output=False); a learned variance is ignored.
    """
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    output, _ = split(model_output, x_t, variance_type.startswith("learned"))
    unclipped = predict_xstart(schedule, output, x_t, t, prediction_type)
    pred_xstart = unclipped.clamp(-1, 1) if clip_denoised else unclipped
    eps = predict_eps(schedule, pred_xstart if use_clipped_model_output else unclipped, x_t, t)
    return Sample(ddim_step(schedule, pred_xstart, eps, t, noise, eta), pred_xstart)


@torch.no_grad()
def p_sample_loop_progressive(
    model: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    schedule: NoiseSchedule,
    *,
    timesteps: Sequence[int] | np.ndarray | None = None,
    method: str = "ddpm",
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_denoised: bool = True,
    use_clipped_model_output: bool = True,
    noise: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yields x_T, then x_t after each of the S steps, all of shape `shape`; the last is the sample.

    model(x_t, t) takes the original timesteps, int64 (N,), and returns its prediction.
    timesteps: those kept, increasing (`spacing.timesteps_for`); None is all. noise: x_T, else
    drawn. step_noise(i): the noise of the i-th step, i = 1 .. S, else drawn; draws use `generator`.
    """
    one_of("method", method, ("ddpm", "ddim"))
    kept = np.arange(schedule.num_timesteps) if timesteps is None else np.asarray(timesteps)
    respaced = schedule.respace(kept)

    def draw() -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    x_t = draw() if noise is None else noise.to(device=device, dtype=dtype)
    if x_t.shape != torch.Size(shape):
        raise ValueError(f"noise must have the shape {tuple(shape)}, but has {tuple(x_t.shape)}.")
    yield x_t
    for i, row in enumerate(range(len(kept) - 1, -1, -1), start=1):
        output = model(x_t, torch.full((len(x_t),), int(kept[row]), device=device))
        t = torch.full((len(x_t),), row, device=device)
        z = draw() if step_noise is None else step_noise(i)
        types = (prediction_type, variance_type, clip_denoised)
        if method == "ddpm":
            x_t = p_sample(respaced, output, x_t, t, z, *types).sample
        else:
            types += (use_clipped_model_output,)
            x_t = ddim_sample(respaced, output, x_t, t, z, eta, *types).sample
        yield x_t


def p_sample_loop(
    model: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    schedule: NoiseSchedule,
    **options: object,
) -> Tensor:
    """The sample at the end of `p_sample_loop_progressive`, with the same options."""
    return deque(p_sample_loop_progressive(model, shape, schedule, **options), maxlen=1).pop()
