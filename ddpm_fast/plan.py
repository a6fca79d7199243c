"""A sampling method and a step count -> the timesteps, and one table of coefficients.

Every method is the one update of the design's section 3, per step (row):

    pred_xstart = clip(A * x_t + B * model_output, CLIP_LO, CLIP_HI)
    x_prev = C0 * pred_xstart + C1 * x_t + C2 * previous_pred_xstart + C3 * model_output
             + SIGMA * noise

A new method is a function that fills the columns, entered in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddpm_fast.arguments import one_of, real, shown
from ddpm_fast.schedule import PREDICTION_TYPES, VARIANCE_TYPES, NoiseSchedule, timesteps_for

# Columns of Plan.coefficients; the rest up to WIDTH is spare.
A, B, C0, C1, C2, C3, SIGMA, MIN_LOG, MAX_LOG, CLIP_LO, CLIP_HI = range(11)
WIDTH = 16
# Columns of Plan.index; the fourth is spare.
TIMESTEP, NOISE_STEP, FLAGS = range(3)
# Bit of FLAGS: sigma comes from the model's extra channels, between MIN_LOG and MAX_LOG.
LEARNED_VARIANCE = 1


@dataclass(frozen=True)
class Plan:
    """S sampling steps, noisiest first.

    timesteps: what the network is given at each step, in sampling order (original numbering).
    coefficients64: (S, 16) float64, on the CPU. coefficients: the same, rounded once to float32.
    index: (S, 4) int32: timestep, noise step (row + 1; step 0 draws x_T), flags, spare.
    The rest says how the plan was made; `describe` returns it.
    """

    timesteps: list[int]
    coefficients64: torch.Tensor
    coefficients: torch.Tensor
    index: torch.Tensor
    method: str
    spacing: str
    eta: float
    prediction_type: str
    variance_type: str
    clip_denoised: bool

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with `coefficients` and `index` on `device`."""
        return replace(self, coefficients=self.coefficients.to(device), index=self.index.to(device))

    def describe(self) -> dict[str, Any]:
        """What decides the samples, JSON-able, for run.json."""
        return {
            "method": self.method,
            "num_steps": self.num_steps,
            "spacing": self.spacing,
            "timesteps": list(self.timesteps),
            "eta": self.eta,
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "clip_denoised": self.clip_denoised,
        }


def _ddpm(schedule: NoiseSchedule, table: np.ndarray, variance_type: str, eta: float) -> np.ndarray:
    """Ho et al. 2020, equation 7; learned variances: IDDPM (Nichol & Dhariwal 2021), equation 15.

    Like every method it gets the respaced schedule and the table, both by rising timestep, fills
    the table's columns C0 .. MAX_LOG and returns the flags, one per row.
    """
    table[:, C0] = schedule.posterior_mean_coef1
    table[:, C1] = schedule.posterior_mean_coef2
    flags = np.zeros(len(table), dtype=np.int32)
    if variance_type == "fixed_small":
        table[:, SIGMA] = np.sqrt(schedule.posterior_variance)
    elif variance_type == "fixed_large":
        table[:, SIGMA] = np.sqrt(schedule.betas)
    elif variance_type == "learned_range":
        flags[:] = LEARNED_VARIANCE
        table[:, MIN_LOG] = schedule.posterior_log_variance_clipped
        table[:, MAX_LOG] = np.log(schedule.betas)
    else:  # learned: between -1 and 1 the interpolation of the range gives the output itself
        flags[:] = LEARNED_VARIANCE
        table[:, MIN_LOG], table[:, MAX_LOG] = -1.0, 1.0
    # The last step, to x_0, adds no noise.
    table[0, SIGMA], flags[0] = 0.0, 0
    return flags


def _ddim(schedule: NoiseSchedule, table: np.ndarray, variance_type: str, eta: float) -> np.ndarray:
    """Song et al. 2020 (arXiv:2010.02502), equation 12, sigma from eta by equation 16.

    eps is derived again from the clipped pred_xstart, as guided-diffusion does. `variance_type`
    only says whether the model has extra channels, and the step leaves those alone.
    """
    ac, ac_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    with np.errstate(invalid="ignore"):  # 0 / 0 past the signal's end: make_plan refuses the NaN
        kept_signal = ac / ac_prev
    sigma = eta * np.sqrt((1.0 - ac_prev) / (1.0 - ac)) * np.sqrt(1.0 - kept_signal)
    # Zero within rounding where eta = 1 and no signal is left.
    k = np.sqrt(np.maximum(1.0 - ac_prev - sigma**2, 0.0))
    # eps = (x_t - sqrt(ac) * pred_xstart) / sqrt(1 - ac), which is finite without signal too.
    table[:, C0] = np.sqrt(ac_prev) - k * np.sqrt(ac / (1.0 - ac))
    table[:, C1] = k / np.sqrt(1.0 - ac)
    table[:, SIGMA] = sigma
    return np.zeros(len(table), dtype=np.int32)


Method = Callable[[NoiseSchedule, np.ndarray, str, float], np.ndarray]
METHODS: dict[str, Method] = {"ddpm": _ddpm, "ddim": _ddim}


def _fill_prediction(schedule: NoiseSchedule, table: np.ndarray, prediction_type: str) -> None:
    """Columns A and B: pred_xstart from x_t and what the network predicts."""
    if prediction_type == "epsilon":  # Ho et al. 2020, equation 4 solved for x_0
        table[:, A] = schedule.sqrt_recip_alphas_cumprod
        table[:, B] = -schedule.sqrt_recipm1_alphas_cumprod
    elif prediction_type == "sample":
        table[:, B] = 1.0
    else:  # v_prediction: Salimans & Ho 2022 (arXiv:2202.00512), appendix D
        table[:, A] = schedule.sqrt_alphas_cumprod
        table[:, B] = -schedule.sqrt_one_minus_alphas_cumprod


def _check_finite(coefficients: torch.Tensor, timesteps: list[int], prediction_type: str) -> None:
    """Refuse what a step would use and is not finite, in float32 as it will be used."""
    bad = ~torch.isfinite(coefficients[:, : MAX_LOG + 1]).all(dim=1)
    if not bad.any():
        return
    timestep = timesteps[int(bad.nonzero()[0])]
    advice = (
        "use a model with v_prediction or sample, or leave this timestep out"
        if prediction_type == "epsilon"
        else "leave this timestep out"
    )
    raise ValueError(
        f"timestep {timestep} cannot be used with prediction_type {prediction_type}, because no"
        f" signal is left there and a coefficient is not finite; {advice}."
    )


def make_plan(
    schedule: NoiseSchedule,
    method: str = "ddpm",
    steps: int | str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_denoised: bool = True,
) -> Plan:
    """The plan that samples a model trained on `schedule` with `method`.

    method: ddpm or ddim. steps, spacing: see `schedule.timesteps_for`; None is every timestep.
    eta: 0 .. 1, ddim only (0 draws no noise, 1 has DDPM's fixed_small variance). prediction_type,
    variance_type: what the model was trained for. clip_denoised: pred_xstart into [-1, 1].
    Computed in float64, rounded once. Raises ValueError, in one sentence, on anything else, and
    where a coefficient in use would be infinite (epsilon at a timestep without signal).
    """
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(f"schedule must be a NoiseSchedule, but {shown(schedule)} was given.")
    one_of("method", method, METHODS)
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    eta = real("eta", eta, 0.0, 1.0)
    if eta and method != "ddim":
        raise ValueError(f"eta belongs to method ddim, but method {method} was given eta {eta}.")
    if not isinstance(clip_denoised, (bool, np.bool_)):
        raise ValueError(f"clip_denoised must be True or False, but is {shown(clip_denoised)}.")

    kept = timesteps_for(schedule.num_timesteps, steps, spacing)
    respaced = schedule.respace(kept)
    table = np.zeros((len(kept), WIDTH))
    _fill_prediction(respaced, table, prediction_type)
    flags = METHODS[method](respaced, table, variance_type, eta)
    table[:, CLIP_LO], table[:, CLIP_HI] = (-1.0, 1.0) if clip_denoised else (-np.inf, np.inf)

    timesteps = kept[::-1].tolist()
    coefficients64 = torch.from_numpy(table[::-1].copy())
    coefficients = coefficients64.float()
    _check_finite(coefficients, timesteps, prediction_type)
    index = torch.zeros((len(kept), 4), dtype=torch.int32)
    index[:, TIMESTEP] = torch.tensor(timesteps)
    index[:, NOISE_STEP] = torch.arange(1, len(kept) + 1)
    index[:, FLAGS] = torch.from_numpy(flags[::-1].copy())
    if spacing is None:
        spacing = "all" if steps is None else steps if isinstance(steps, str) else "openai"
    return Plan(
        timesteps=timesteps,
        coefficients64=coefficients64,
        coefficients=coefficients,
        index=index,
        method=method,
        spacing=spacing,
        eta=eta,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_denoised=bool(clip_denoised),
    )
