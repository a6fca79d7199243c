"""What `reference` is made of: the forward process, and p(x_{t-1} | x_t) of a network's output.

Use these as `reference.q_sample` and so on; what holds there holds here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.arguments import one_of, shown
from ddpm_fast.schedule import STEP_PREDICTION_TYPES, VARIANCE_TYPES, NoiseSchedule


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t): each of x_t's shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


def timesteps_on_cpu(t: Tensor, x: Tensor, num_timesteps: int) -> np.ndarray:
    """t (N,), each sample's of x; ValueError if it is not that."""
    if t.dtype != torch.int64 or t.shape != x.shape[:1]:
        raise ValueError(
            f"t must be int64 of shape ({len(x)},), one timestep per sample, but is {t.dtype} of"
            f" shape {tuple(t.shape)}."
        )
    rows = t.cpu().numpy()
    if ((rows < 0) | (rows >= num_timesteps)).any():
        raise ValueError(f"t must lie in 0 to {num_timesteps - 1}, but holds {shown(t.tolist())}.")
    return rows


def extract(table: np.ndarray, t: Tensor, x: Tensor) -> Tensor:
    """table[t] in x's dtype and on its device, shaped (N, 1, ...) to multiply x."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"the state must be a floating-point tensor (N, C, ...), but is {x.dtype} of shape"
            f" {tuple(x.shape)}."
        )
    rows = timesteps_on_cpu(t, x, len(table))
    values = torch.from_numpy(table[rows]).to(device=x.device, dtype=x.dtype)
    return values.reshape(-1, *[1] * (x.ndim - 1))


def same_shape(name: str, value: Tensor, x: Tensor) -> None:
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
    same_shape("noise", noise, x_prev)
    keep = extract(np.sqrt(schedule.alphas), t, x_prev)
    return keep * x_prev + extract(np.sqrt(schedule.betas), t, x_prev) * noise


def q_sample(schedule: NoiseSchedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A draw from q(x_t | x_0) with the given standard normal noise (Ho et al. 2020, eq. 4)."""
    same_shape("noise", noise, x_start)
    keep = extract(schedule.sqrt_alphas_cumprod, t, x_start)
    return keep * x_start + extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_start) * noise


def q_mean_variance(
    schedule: NoiseSchedule, x_start: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_t | x_0) (Ho et al. 2020, equation 4)."""
    mean = extract(schedule.sqrt_alphas_cumprod, t, x_start) * x_start
    variance = extract(1.0 - schedule.alphas_cumprod, t, x_start).expand_as(x_start)
    log_variance = extract(schedule.log_one_minus_alphas_cumprod, t, x_start).expand_as(x_start)
    return mean, variance, log_variance


def q_posterior_mean_variance(
    schedule: NoiseSchedule, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance, clipped log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 6, 7)."""
    same_shape("x_start", x_start, x_t)
    coef1 = extract(schedule.posterior_mean_coef1, t, x_t)
    coef2 = extract(schedule.posterior_mean_coef2, t, x_t)
    variance = extract(schedule.posterior_variance, t, x_t).expand_as(x_t)
    log_variance = extract(schedule.posterior_log_variance_clipped, t, x_t).expand_as(x_t)
    return coef1 * x_start + coef2 * x_t, variance, log_variance


def predict_xstart(
    schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: Tensor, prediction_type: str
) -> Tensor:
    """x_0 from what the network predicts (C channels), unclipped.

    epsilon: Ho et al. 2020, equation 4 solved for x_0, which must be finite at t; sample: x_0
    itself; v_prediction: Salimans & Ho 2022 (arXiv:2202.00512), appendix D; previous_x: equation 7
    solved for x_0.
    """
    one_of("prediction_type", prediction_type, STEP_PREDICTION_TYPES)
    same_shape("model_output", model_output, x_t)
    if prediction_type == "sample":
        return model_output.to(x_t.dtype)
    if prediction_type == "previous_x":
        coef1 = extract(schedule.posterior_mean_coef1, t, x_t)
        return (model_output - extract(schedule.posterior_mean_coef2, t, x_t) * x_t) / coef1
    if prediction_type == "v_prediction":
        a = extract(schedule.sqrt_alphas_cumprod, t, x_t)
        b = extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    else:
        a = extract(schedule.sqrt_recip_alphas_cumprod, t, x_t)
        b = extract(schedule.sqrt_recipm1_alphas_cumprod, t, x_t)
        if not torch.isfinite(a).all():
            timestep = t[~torch.isfinite(a).flatten()][0].item()
            raise ValueError(
                f"timestep {timestep} has no signal left that epsilon could be recovered from; use"
                f" a model with v_prediction or sample, or leave this timestep out."
            )
    return a * x_t - b * model_output


def predict_eps(schedule: NoiseSchedule, pred_xstart: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that made x_t of this x_0 (Ho et al. 2020, equation 4 solved for it)."""
    keep = extract(schedule.sqrt_alphas_cumprod, t, x_t)
    return (x_t - keep * pred_xstart) / extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)


def split(model_output: Tensor, x_t: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
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
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
) -> PMeanVariance:
    """p(x_{t-1} | x_t) from the network's output at x_t (guided-diffusion's function).

    learned: the extra channels are the log-variance. learned_range: they interpolate, from -1 to
    1, between the log of fixed_small and the log of beta (Nichol & Dhariwal 2021, equation 15).
    denoised_fn changes pred_xstart before it is clipped. With previous_x the mean is what the
    network predicts, so neither that nor the clip moves it.
    """
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    output, extra = split(model_output, x_t, variance_type.startswith("learned"))
    low, high = schedule.posterior_log_variance_clipped, np.log(schedule.betas)
    if variance_type == "fixed_small":
        variance = extract(schedule.posterior_variance, t, x_t).expand_as(x_t)
        log_variance = extract(low, t, x_t).expand_as(x_t)
    elif variance_type == "fixed_large":
        # t = 0 takes the posterior's, as guided-diffusion does, for a better likelihood.
        log_variance = extract(np.append(low[:1], high[1:]), t, x_t).expand_as(x_t)
        variance = extract(np.exp(np.append(low[:1], high[1:])), t, x_t).expand_as(x_t)
    else:
        log_variance = extra.to(x_t.dtype)
        if variance_type == "learned_range":
            frac = (log_variance + 1) / 2
            log_variance = frac * extract(high, t, x_t) + (1 - frac) * extract(low, t, x_t)
        variance = torch.exp(log_variance)
    pred_xstart = predict_xstart(schedule, output, x_t, t, prediction_type)
    if denoised_fn is not None:
        pred_xstart = denoised_fn(pred_xstart)
    if clip_denoised:
        pred_xstart = pred_xstart.clamp(-1, 1)
    if prediction_type == "previous_x":
        mean = output.to(x_t.dtype)
    else:
        mean, _, _ = q_posterior_mean_variance(schedule, pred_xstart, x_t, t)
    return PMeanVariance(mean, variance, log_variance, pred_xstart)


def condition_mean(mean: Tensor, variance: Tensor, gradient: Tensor) -> Tensor:
    """Classifier guidance of p(x_{t-1} | x_t): its mean, given grad log p(y | x_t) (Dhariwal and
    Nichol 2021, arXiv:2105.05233, algorithm 1)."""
    return mean + variance * gradient.to(mean.dtype)


def condition_score(
    schedule: NoiseSchedule, pred_xstart: Tensor, x_t: Tensor, t: Tensor, gradient: Tensor
) -> Tensor:
    """Classifier guidance of DDIM: pred_xstart, given grad log p(y | x_t) (algorithm 2 there).

    The guided pred_xstart is not clipped again.
    """
    root = extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    eps = predict_eps(schedule, pred_xstart, x_t, t) - root * gradient.to(x_t.dtype)
    return predict_xstart(schedule, eps, x_t, t, "epsilon")
