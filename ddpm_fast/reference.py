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

from ddpm_fast.arguments import one_of, real, shown
from ddpm_fast.reference_step import step
from ddpm_fast.schedule import PREDICTION_TYPES, VARIANCE_TYPES, NoiseSchedule

__all__ = [
    "PMeanVariance",
    "Sample",
    "ddim_sample",
    "p_mean_variance",
    "p_sample",
    "p_sample_loop",
    "p_sample_loop_progressive",
    "predict_xstart",
    "q_posterior_mean_variance",
    "q_sample",
    "q_step",
    "step",
]


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t): each of x_t's shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


class Sample(NamedTuple):
    """One step's result: `sample` is x_{t-1}; each of x_t's shape."""

    sample: Tensor
    pred_xstart: Tensor


def _extract(table: np.ndarray, t: Tensor, x: Tensor) -> Tensor:
    """table[t] in x's dtype and on its device, shaped (N, 1, ...) to multiply x."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"the state must be a floating-point tensor (N, C, ...), but is {x.dtype} of shape"
            f" {tuple(x.shape)}."
        )
    if t.dtype != torch.int64 or t.shape != x.shape[:1]:
        raise ValueError(
            f"t must be int64 of shape ({len(x)},), one timestep per sample, but is {t.dtype} of"
            f" shape {tuple(t.shape)}."
        )
    rows = t.cpu().numpy()
    if ((rows < 0) | (rows >= len(table))).any():
        raise ValueError(f"t must lie in 0 to {len(table) - 1}, but holds {shown(t.tolist())}.")
    values = torch.from_numpy(table[rows]).to(device=x.device, dtype=x.dtype)
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _same_shape(name: str, value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape:
        raise ValueError(
            f"{name} must have the shape {tuple(x.shape)} of the state, but has"
            f" {tuple(value.shape)}."
        )


def q_step(schedule: NoiseSchedule, x_prev: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """One forward step, a draw from q(x_t | x_{t-1}) (Ho et al. 2020, equation 2).

    x_prev is x_{t-1}, and x_start for t = 0; noise is standard normal. Chained from 0 to t it has
    the distribution of `q_sample`.
    """
    _same_shape("noise", noise, x_prev)
    keep = _extract(np.sqrt(schedule.alphas), t, x_prev)
    return keep * x_prev + _extract(np.sqrt(schedule.betas), t, x_prev) * noise


def q_sample(schedule: NoiseSchedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A draw from q(x_t | x_0) with the given standard normal noise (Ho et al. 2020, eq. 4)."""
    _same_shape("noise", noise, x_start)
    keep = _extract(schedule.sqrt_alphas_cumprod, t, x_start)
    return keep * x_start + _extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_start) * noise


def q_posterior_mean_variance(
    schedule: NoiseSchedule, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance, clipped log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 6, 7)."""
    _same_shape("x_start", x_start, x_t)
    coef1 = _extract(schedule.posterior_mean_coef1, t, x_t)
    coef2 = _extract(schedule.posterior_mean_coef2, t, x_t)
    variance = _extract(schedule.posterior_variance, t, x_t).expand_as(x_t)
    log_variance = _extract(schedule.posterior_log_variance_clipped, t, x_t).expand_as(x_t)
    return coef1 * x_start + coef2 * x_t, variance, log_variance


def predict_xstart(
    schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: Tensor, prediction_type: str
) -> Tensor:
    """x_0 from what the network predicts (C channels), unclipped.

    epsilon: Ho et al. 2020, equation 4 solved for x_0, which must be finite at t; sample: x_0
    itself; v_prediction: Salimans & Ho 2022 (arXiv:2202.00512), appendix D.
    """
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    _same_shape("model_output", model_output, x_t)
    if prediction_type == "sample":
        return model_output.to(x_t.dtype)
    if prediction_type == "v_prediction":
        a = _extract(schedule.sqrt_alphas_cumprod, t, x_t)
        b = _extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    else:
        a = _extract(schedule.sqrt_recip_alphas_cumprod, t, x_t)
        b = _extract(schedule.sqrt_recipm1_alphas_cumprod, t, x_t)
        if not torch.isfinite(a).all():
            timestep = t[~torch.isfinite(a).flatten()][0].item()
            raise ValueError(
                f"timestep {timestep} has no signal left that epsilon could be recovered from; use"
                f" a model with v_prediction or sample, or leave this timestep out."
            )
    return a * x_t - b * model_output


def _split(model_output: Tensor, x_t: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
    """The prediction and the variance channels (the latter empty unless learned)."""
    channels = x_t.shape[1] if x_t.ndim > 1 else 0
    wanted = (x_t.shape[0], channels * (2 if learned else 1), *x_t.shape[2:])
    if model_output.shape != wanted:
        raise ValueError(
            f"model_output must have the shape {wanted} for a state of {tuple(x_t.shape)}"
            f"{' with learned variance' if learned else ''}, but has {tuple(model_output.shape)}."
        )
    return model_output[:, :channels], model_output[:, channels:]


def p_mean_variance(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_denoised: bool = True,
) -> PMeanVariance:
    """p(x_{t-1} | x_t) from the network's output at x_t (guided-diffusion's function).

    learned: the extra channels are the log-variance. learned_range: they interpolate, from -1 to
    1, between the log of fixed_small and the log of beta (Nichol & Dhariwal 2021, equation 15).
    """
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    output, extra = _split(model_output, x_t, variance_type.startswith("learned"))
    low, high = schedule.posterior_log_variance_clipped, np.log(schedule.betas)
    if variance_type == "fixed_small":
        variance = _extract(schedule.posterior_variance, t, x_t).expand_as(x_t)
        log_variance = _extract(low, t, x_t).expand_as(x_t)
    elif variance_type == "fixed_large":
        # t = 0 takes the posterior's, as guided-diffusion does, for a better likelihood.
        log_variance = _extract(np.append(low[:1], high[1:]), t, x_t).expand_as(x_t)
        variance = _extract(np.exp(np.append(low[:1], high[1:])), t, x_t).expand_as(x_t)
    else:
        log_variance = extra.to(x_t.dtype)
        if variance_type == "learned_range":
            frac = (log_variance + 1) / 2
            log_variance = frac * _extract(high, t, x_t) + (1 - frac) * _extract(low, t, x_t)
        variance = torch.exp(log_variance)
    pred_xstart = predict_xstart(schedule, output, x_t, t, prediction_type)
    if clip_denoised:
        pred_xstart = pred_xstart.clamp(-1, 1)
    mean, _, _ = q_posterior_mean_variance(schedule, pred_xstart, x_t, t)
    return PMeanVariance(mean, variance, log_variance, pred_xstart)


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
    _same_shape("noise", noise, x_t)
    out = p_mean_variance(
        schedule, model_output, x_t, t, prediction_type, variance_type, clip_denoised
    )
    noisy = out.mean + torch.exp(0.5 * out.log_variance) * noise
    last = (t == 0).reshape(-1, *[1] * (x_t.ndim - 1))
    return Sample(torch.where(last, out.mean, noisy), out.pred_xstart)


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
    _same_shape("noise", noise, x_t)
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    eta = real("eta", eta, 0.0, 1.0)
    output, _ = _split(model_output, x_t, variance_type.startswith("learned"))
    unclipped = predict_xstart(schedule, output, x_t, t, prediction_type)
    pred_xstart = unclipped.clamp(-1, 1) if clip_denoised else unclipped
    ac, ac_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    root = schedule.sqrt_one_minus_alphas_cumprod
    source = pred_xstart if use_clipped_model_output else unclipped
    eps = (x_t - _extract(np.sqrt(ac), t, x_t) * source) / _extract(root, t, x_t)
    with np.errstate(invalid="ignore"):  # 0 / 0 past the signal's end comes out as NaN
        sigma = eta * np.sqrt((1 - ac_prev) / (1 - ac)) * np.sqrt(1 - ac / ac_prev)
    direction = np.sqrt(np.maximum(1 - ac_prev - sigma**2, 0.0))
    mean = _extract(np.sqrt(ac_prev), t, x_t) * pred_xstart + _extract(direction, t, x_t) * eps
    return Sample(mean + _extract(sigma, t, x_t) * noise, pred_xstart)


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
