"""The sampling methods: each is a function that fills the table of the one update.

Per step (row) of a plan, with the columns below:

    pred_xstart = clip(A * x_t + B * model_output, CLIP_LO, CLIP_HI)
    x_prev = C0 * pred_xstart + C1 * x_t + C2 * previous_pred_xstart + C3 * model_output
             + SIGMA * noise

A new method is such a function, entered in `METHODS`. It gets the respaced schedule and the table,
both by rising timestep, with A and B filled for the prediction type; it fills C0 to MAX_LOG and
returns the flags, one per row. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_fast.schedule import NoiseSchedule

# Columns of Plan.coefficients; the rest up to WIDTH is spare.
A, B, C0, C1, C2, C3, SIGMA, MIN_LOG, MAX_LOG, CLIP_LO, CLIP_HI = range(11)
WIDTH = 16
# Columns of Plan.index; the fourth is spare.
TIMESTEP, NOISE_STEP, FLAGS = range(3)
# Bit of FLAGS: sigma comes from the model's extra channels, between MIN_LOG and MAX_LOG.
LEARNED_VARIANCE = 1


class Settings(NamedTuple):
    """What a method may depend on besides the schedule; `plan.make_plan` says what each means."""

    prediction_type: str
    variance_type: str
    eta: float
    use_clipped_model_output: bool


Fill = Callable[[NoiseSchedule, np.ndarray, Settings], np.ndarray]


class Method(NamedTuple):
    """inverse: the plan goes from x_0 to x_T, by rising timestep, and not the other way."""

    fill: Fill
    inverse: bool = False


def predict_xstart(schedule: NoiseSchedule, table: np.ndarray, prediction_type: str) -> None:
    """Fill A and B: pred_xstart from x_t and what the network predicts."""
    if prediction_type == "epsilon":  # Ho et al. 2020, equation 4 solved for x_0
        table[:, A] = schedule.sqrt_recip_alphas_cumprod
        table[:, B] = -schedule.sqrt_recipm1_alphas_cumprod
    elif prediction_type == "sample":
        table[:, B] = 1.0
    elif prediction_type == "previous_x":  # the mean of equation 7 solved for x_0
        with np.errstate(divide="ignore"):  # past the signal's end: make_plan refuses it
            table[:, B] = 1.0 / schedule.posterior_mean_coef1
            table[:, A] = -schedule.posterior_mean_coef2 / schedule.posterior_mean_coef1
    else:  # v_prediction: Salimans & Ho 2022 (arXiv:2202.00512), appendix D
        table[:, A] = schedule.sqrt_alphas_cumprod
        table[:, B] = -schedule.sqrt_one_minus_alphas_cumprod


def _eps(schedule: NoiseSchedule, prediction_type: str) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) with eps = p * x_t + q * model_output, before any clip; each (S,)."""
    keep, root = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    if prediction_type == "epsilon":
        return np.zeros_like(keep), np.ones_like(keep)
    if prediction_type == "sample":
        return 1.0 / root, -keep / root
    if prediction_type == "previous_x":  # by way of x_0
        table = np.zeros((len(keep), WIDTH))
        predict_xstart(schedule, table, prediction_type)
        with np.errstate(invalid="ignore"):  # likewise
            return (1.0 - keep * table[:, A]) / root, -keep * table[:, B] / root
    return root, keep


def _ddpm(schedule: NoiseSchedule, table: np.ndarray, settings: Settings) -> np.ndarray:
    """Ho et al. 2020, equation 7; learned variances: Nichol & Dhariwal 2021, equation 15."""
    if settings.prediction_type == "previous_x":
        table[:, C3] = 1.0
    else:
        table[:, C0] = schedule.posterior_mean_coef1
        table[:, C1] = schedule.posterior_mean_coef2
    flags = np.zeros(len(table), dtype=np.int32)
    if settings.variance_type == "fixed_small":
        table[:, SIGMA] = np.sqrt(schedule.posterior_variance)
    elif settings.variance_type == "fixed_large":
        table[:, SIGMA] = np.sqrt(schedule.betas)
    elif settings.variance_type == "learned_range":
        flags[:] = LEARNED_VARIANCE
        table[:, MIN_LOG] = schedule.posterior_log_variance_clipped
        table[:, MAX_LOG] = np.log(schedule.betas)
    else:  # learned: between -1 and 1 the interpolation of the range gives the output itself
        flags[:] = LEARNED_VARIANCE
        table[:, MIN_LOG], table[:, MAX_LOG] = -1.0, 1.0
    # The last step, to x_0, adds no noise.
    table[0, SIGMA], flags[0] = 0.0, 0
    return flags


def _ddim(schedule: NoiseSchedule, table: np.ndarray, settings: Settings) -> np.ndarray:
    """Song et al. 2020 (arXiv:2010.02502), equation 12, sigma from eta by equation 16.

    A learned variance is ignored, here and below.
    """
    ac, ac_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    with np.errstate(invalid="ignore"):  # 0 / 0 past the signal's end: make_plan refuses the NaN
        kept_signal = ac / ac_prev
    sigma = settings.eta * np.sqrt((1.0 - ac_prev) / (1.0 - ac)) * np.sqrt(1.0 - kept_signal)
    # Zero within rounding where eta = 1 and no signal is left.
    k = np.sqrt(np.maximum(1.0 - ac_prev - sigma**2, 0.0))
    table[:, SIGMA] = sigma
    if settings.use_clipped_model_output:
        # eps = (x_t - sqrt(ac) * pred_xstart) / sqrt(1 - ac), which is finite without signal too.
        table[:, C0] = np.sqrt(ac_prev) - k * np.sqrt(ac / (1.0 - ac))
        table[:, C1] = k / np.sqrt(1.0 - ac)
    else:
        p, q = _eps(schedule, settings.prediction_type)
        table[:, C0], table[:, C1], table[:, C3] = np.sqrt(ac_prev), k * p, k * q
    return np.zeros(len(table), dtype=np.int32)


def _ddim_inverse(schedule: NoiseSchedule, table: np.ndarray, settings: Settings) -> np.ndarray:
    """Song et al. 2020, section 4.3: DDIM's deterministic step the other way, from x_0 to x_T.

    A row takes the state at the level of the timestep before (x_0 itself in the first row) up to
    its own level: what the sampling row of the same timestep undoes, given the same eps. As in
    diffusers' DDIMInverseScheduler the network is asked at the row's own timestep; asked at the
    timestep before, as in guided-diffusion's ddim_reverse_sample, the way there and back loses
    about twice as much. What it predicts is read at the level of the timestep it was asked at, so
    eps is the same for each prediction type (diffusers reads a v at the level before, which also
    loses more). pred_xstart may be clipped; eps is kept as it is.
    """
    ac, ac_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    p, q = _eps(schedule, settings.prediction_type)
    # pred_xstart = (x - sqrt(1 - ac_prev) * eps) / sqrt(ac_prev); the first row's is x itself.
    root_prev = np.sqrt(1.0 - ac_prev)
    with np.errstate(divide="ignore", invalid="ignore"):  # past the signal's end, likewise
        table[:, A] = (1.0 - root_prev * p) / np.sqrt(ac_prev)
        table[:, B] = -root_prev * q / np.sqrt(ac_prev)
    table[:, C0] = np.sqrt(ac)
    table[:, C1], table[:, C3] = np.sqrt(1.0 - ac) * p, np.sqrt(1.0 - ac) * q
    return np.zeros(len(table), dtype=np.int32)


def _dpmpp_2m(schedule: NoiseSchedule, table: np.ndarray, settings: Settings) -> np.ndarray:
    """DPM-Solver++ 2M: Lu et al. 2022 (arXiv:2211.01095), algorithm 2, on the kept timesteps.

    The first step, which has no step before it, and the last one, to x_0, are of first order, that
    is DDIM without noise: as in diffusers' DPMSolverMultistepScheduler (dpmsolver++, order 2,
    midpoint) and in k-diffusion's sample_dpmpp_2m, whose name this is.
    """
    ac, ac_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    with np.errstate(divide="ignore"):  # without signal it is minus infinity
        half_log_snr = 0.5 * (np.log(ac) - np.log1p(-ac))  # the paper's lambda
    with np.errstate(invalid="ignore"):  # past the signal's end: make_plan refuses the NaN
        h = np.append(np.inf, half_log_snr[:-1]) - half_log_snr
        # 1 / (2 r) of the paper: this step over twice the one before, which has the next row.
        weight = np.zeros(len(table))
        weight[1:-1] = h[1:-1] / (2.0 * h[2:])
    gain = -np.sqrt(ac_prev) * np.expm1(-h)
    table[:, C0] = gain * (1.0 + weight)
    table[:, C1] = np.sqrt((1.0 - ac_prev) / (1.0 - ac))
    table[:, C2] = -gain * weight
    return np.zeros(len(table), dtype=np.int32)


METHODS: dict[str, Method] = {
    "ddpm": Method(_ddpm),
    "ddim": Method(_ddim),
    "dpmpp_2m": Method(_dpmpp_2m),
    "ddim_inverse": Method(_ddim_inverse, inverse=True),
}
