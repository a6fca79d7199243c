"""The plan of a diffusers scheduler: its numbers, also where they are not the published ones."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch

from ...arguments import one_of, real, shown
from ...families.diffusers import VARIANCES
from ...methods import (
    CLIP_HI,
    CLIP_LO,
    LEARNED_VARIANCE,
    MAX_LOG,
    METHODS,
    MIN_LOG,
    SIGMA,
    WIDTH,
    Settings,
    predict_xstart,
)
from ...plan import Plan
from ...schedule import PREDICTION_TYPES, NoiseSchedule

LEAST_VARIANCE = 1e-20  # to diffusers, of the step to x_0


def settings_of(scheduler: Any) -> tuple[str, str, str]:
    """(method, prediction_type, variance_type) of a DDPMScheduler or DDIMScheduler of diffusers.

    ValueError in one sentence for another scheduler, and for what the fused step has not.
    """
    config = scheduler.config
    if not isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.DDIMScheduler)):
        raise ValueError(
            f"the scheduler must be a DDPMScheduler or a DDIMScheduler, not a"
            f" {type(scheduler).__name__}; make one with its from_config(pipe.scheduler.config)."
        )
    if config.thresholding:
        raise ValueError("thresholding=True of the scheduler is not supported; use clip_sample.")
    prediction = one_of("prediction_type", config.prediction_type, PREDICTION_TYPES)
    if isinstance(scheduler, diffusers.DDIMScheduler):
        return "ddim", prediction, "fixed_small"
    # "fixed_large_log" is NaN in diffusers' own step; here it is what its name says.
    variance = VARIANCES[one_of("variance_type", config.variance_type, VARIANCES)]
    return "ddpm", prediction, variance


def _levels(scheduler: Any, method: str) -> NoiseSchedule:
    """alphas_cumprod at the scheduler's timesteps, rising, and where the step from each leads to.

    diffusers has them in float32, and takes beta from their rounded quotient: so it is here, since
    of a beta near 1e-4 that is the fourth digit. All else is float64.
    """
    t = scheduler.timesteps.cpu().flip(0)
    if len(t) == 0 or t.min() < 0 or t.max() >= scheduler.config.num_train_timesteps:
        last = scheduler.config.num_train_timesteps - 1
        raise ValueError(
            f"the scheduler's timesteps must be some of 0 to {last}, but are {shown(t.tolist())}."
        )
    if method == "ddim":  # which takes the stride for the distance, whatever the spacing
        previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        last = scheduler.final_alpha_cumprod
    else:
        previous, last = torch.cat((t.new_tensor([-1]), t[:-1])), scheduler.one
    levels = scheduler.alphas_cumprod.cpu()
    ac = levels[t]
    ac_prev = torch.where(previous >= 0, levels[previous.clamp(min=0)], last.cpu())
    betas = 1 - ac / ac_prev
    return NoiseSchedule.of_levels(*(x.double().numpy() for x in (betas, ac, ac_prev)))


def _last_noise(levels: NoiseSchedule, table: np.ndarray, variance_type: str) -> np.ndarray:
    """Their DDPM step to x_0 adds noise, too, where it does not start at timestep 0."""
    flags = np.zeros(len(table), dtype=np.int32)
    if variance_type == "fixed_large":
        table[0, SIGMA] = np.sqrt(levels.betas[0])
    elif variance_type == "learned_range":
        flags[0] = LEARNED_VARIANCE
        table[0, MIN_LOG], table[0, MAX_LOG] = np.log(LEAST_VARIANCE), np.log(levels.betas[0])
    return flags


def plan_of(scheduler: Any, eta: float = 0.0, use_clipped_model_output: bool = False) -> Plan:
    """The plan of `scheduler` at its present timesteps: its steps, to float32's rounding.

    scheduler: a DDPMScheduler or DDIMScheduler of diffusers, or ours. eta, 0 .. 1, and
    use_clipped_model_output: of its step, for DDIM. ValueError in one sentence for what the fused
    step has not, and where a coefficient is not finite.
    """
    method, prediction_type, variance_type = settings_of(scheduler)
    eta = real("eta", eta, 0.0, 1.0)
    settings = Settings(prediction_type, variance_type, eta, use_clipped_model_output)
    levels = _levels(scheduler, method)
    timesteps = scheduler.timesteps.tolist()
    table = np.zeros((len(timesteps), WIDTH))
    predict_xstart(levels, table, prediction_type)
    flags = METHODS[method].fill(levels, table, settings)
    if method == "ddpm" and timesteps[-1] > 0:
        flags |= _last_noise(levels, table, variance_type)
    config = scheduler.config
    clip = config.clip_sample_range if config.clip_sample else np.inf
    table[:, CLIP_LO], table[:, CLIP_HI] = -clip, clip
    return Plan.of_table(
        table[::-1],
        flags[::-1],
        timesteps,
        start=None,
        method=method,
        spacing=config.timestep_spacing,
        strength=None,
        eta=eta,
        prediction_type=prediction_type,
        variance_type=variance_type,
        use_clipped_model_output=use_clipped_model_output,
        clip_denoised=bool(config.clip_sample),
    )


def draws(plan: Plan, row: int) -> bool:
    """Whether diffusers draws noise for this step from its generator, be it used or not."""
    return plan.eta > 0 if plan.method == "ddim" else plan.timesteps[row] > 0
