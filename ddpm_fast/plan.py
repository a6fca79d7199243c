"""A sampling method and a step count -> the timesteps, and one table of coefficients.

What the table's columns mean, and the functions that fill them: `methods`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ddpm_fast.arguments import one_of, real, shown
from ddpm_fast.methods import (
    C2,
    CLIP_HI,
    CLIP_LO,
    FLAGS,
    MAX_LOG,
    METHODS,
    NOISE_STEP,
    TIMESTEP,
    WIDTH,
    Settings,
    predict_xstart,
)
from ddpm_fast.schedule import STEP_PREDICTION_TYPES, VARIANCE_TYPES, NoiseSchedule
from ddpm_fast.spacing import timesteps_for


@dataclass(frozen=True)
class Plan:
    """S steps in the order in which they are taken: noisiest first, but for an inverse method.

    timesteps: what the network is given at each step (original numbering).
    coefficients64: (S, 16) float64, on the CPU. coefficients: the same, rounded once to float32.
    index: (S, 4) int32: timestep, noise step (row + 1; step 0 draws x_T), flags, spare.
    start: None if the first step takes x_T; else it takes q_sample of a given x_start with these
    (1, 2) float32 coefficients, as `ops.q_sample` wants them.
    The rest says how the plan was made; `describe` returns it.
    """

    timesteps: list[int]
    coefficients64: torch.Tensor
    coefficients: torch.Tensor
    index: torch.Tensor
    start: torch.Tensor | None
    method: str
    spacing: str
    strength: float | None
    eta: float
    prediction_type: str
    variance_type: str
    use_clipped_model_output: bool
    clip_denoised: bool

    @classmethod
    def of_table(
        cls, table: np.ndarray, flags: np.ndarray, timesteps: list[int], **how: Any
    ) -> Plan:
        """The plan of a float64 table (S, 16), its rows' flags (S,) and how it was made.

        ValueError where a coefficient in use is not finite.
        """
        coefficients64 = torch.from_numpy(table.copy())
        coefficients = coefficients64.float()
        _check_finite(coefficients, timesteps, how["prediction_type"])
        index = torch.zeros((len(timesteps), 4), dtype=torch.int32)
        index[:, TIMESTEP] = torch.tensor(timesteps)
        index[:, NOISE_STEP] = torch.arange(1, len(timesteps) + 1)
        index[:, FLAGS] = torch.from_numpy(flags.copy())
        return cls(timesteps, coefficients64, coefficients, index, **how)

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def multistep(self) -> bool:
        """Whether a step uses the pred_xstart of the step before."""
        return bool((self.coefficients64[:, C2] != 0).any())

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with `coefficients`, `index` and `start` on `device`."""
        return replace(
            self,
            coefficients=self.coefficients.to(device),
            index=self.index.to(device),
            start=None if self.start is None else self.start.to(device),
        )

    def describe(self) -> dict[str, Any]:
        """What decides the samples, JSON-able, for run.json."""
        return {
            "method": self.method,
            "num_steps": self.num_steps,
            "spacing": self.spacing,
            "timesteps": list(self.timesteps),
            "strength": self.strength,
            "eta": self.eta,
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "use_clipped_model_output": self.use_clipped_model_output,
            "clip_denoised": self.clip_denoised,
        }


def _check_finite(coefficients: torch.Tensor, timesteps: list[int], prediction_type: str) -> None:
    """Refuse what a step would use and is not finite, in float32 as it will be used."""
    bad = ~torch.isfinite(coefficients[:, : MAX_LOG + 1]).all(dim=1)
    if not bad.any():
        return
    timestep = timesteps[int(bad.nonzero()[0])]
    advice = (
        "use a model with v_prediction or sample, or leave this timestep out"
        if prediction_type in ("epsilon", "previous_x")
        else "leave this timestep out"
    )
    raise ValueError(
        f"timestep {timestep} cannot be used with prediction_type {prediction_type}, because no"
        f" signal is left there and a coefficient is not finite; {advice}."
    )


def _check_options(
    schedule: Any, method: Any, settings: Settings, clip_denoised: Any, strength: Any
) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(f"schedule must be a NoiseSchedule, but {shown(schedule)} was given.")
    one_of("method", method, METHODS)
    one_of("prediction_type", settings.prediction_type, STEP_PREDICTION_TYPES)
    one_of("variance_type", settings.variance_type, VARIANCE_TYPES)
    for name, value in (
        ("clip_denoised", clip_denoised),
        ("use_clipped_model_output", settings.use_clipped_model_output),
    ):
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False, but is {shown(value)}.")
    eta = real("eta", settings.eta, 0.0, 1.0)
    if eta and method != "ddim":
        raise ValueError(f"eta belongs to method ddim, but method {method} was given eta {eta}.")
    if not settings.use_clipped_model_output and method != "ddim":
        raise ValueError(
            f"use_clipped_model_output=False belongs to method ddim, but method {method} was given"
            f" it."
        )
    if strength is not None and METHODS[method].inverse:
        raise ValueError(
            f"strength belongs to a method that samples, but method {method} goes from x_0 to x_T"
            f" and was given strength {shown(strength)}."
        )


def _last_part(kept: np.ndarray, strength: Any) -> np.ndarray:
    """The int(S * strength) timesteps nearest to x_0, as diffusers' img2img has it."""
    remaining = int(len(kept) * real("strength", strength, 0.0, 1.0))
    if remaining < 1:
        raise ValueError(
            f"strength {strength} of {len(kept)} steps leaves no step to take; use a larger"
            f" strength or more steps."
        )
    return kept[:remaining]


def make_plan(
    schedule: NoiseSchedule,
    method: str = "ddpm",
    steps: int | str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_denoised: bool = True,
    *,
    steps_offset: int = 0,
    use_clipped_model_output: bool = True,
    strength: float | None = None,
) -> Plan:
    """The plan that samples a model trained on `schedule` with `method`.

    method: ddpm, ddim, dpmpp_2m (DPM-Solver++), or ddim_inverse, which goes from x_0 to x_T.
    steps, spacing, steps_offset: see `spacing.timesteps_for`; None is every timestep.
    eta: 0 .. 1, ddim only (0 draws no noise, 1 has DDPM's fixed_small variance). prediction_type,
    variance_type: what the model was trained for (previous_x: the mean of x_{t-1}, which no clip
    moves). clip_denoised: pred_xstart into [-1, 1].
    use_clipped_model_output: ddim only; where the clip has moved pred_xstart, True derives eps from
    it again (guided-diffusion), False keeps the network's own beside it (diffusers' default).
    strength: img2img (SDEdit, Meng et al. 2022, arXiv:2108.01073): start from a given x_start,
    noised to the first of the last int(S * strength) steps, 0 < strength <= 1.
    Computed in float64, rounded once. Raises ValueError, in one sentence, on anything else, and
    where a coefficient in use would be infinite (epsilon at a timestep without signal).
    """
    settings = Settings(prediction_type, variance_type, eta, use_clipped_model_output)
    _check_options(schedule, method, settings, clip_denoised, strength)
    fill, inverse = METHODS[method]
    kept = timesteps_for(schedule.num_timesteps, steps, spacing, steps_offset)
    if strength is not None:
        kept = _last_part(kept, strength)
    respaced = schedule.respace(kept)

    table = np.zeros((len(kept), WIDTH))
    predict_xstart(respaced, table, prediction_type)
    flags = fill(respaced, table, settings)
    table[:, CLIP_LO], table[:, CLIP_HI] = (-1.0, 1.0) if clip_denoised else (-np.inf, np.inf)

    order = slice(None) if inverse else slice(None, None, -1)
    start = None
    if inverse:
        start = torch.tensor([[1.0, 0.0]])
    elif strength is not None:
        level = respaced.sqrt_alphas_cumprod[-1], respaced.sqrt_one_minus_alphas_cumprod[-1]
        start = torch.tensor([level], dtype=torch.float32)
    if spacing is None:
        spacing = "all" if steps is None else steps if isinstance(steps, str) else "openai"
    return Plan.of_table(
        table[order],
        flags[order],
        kept[order].tolist(),
        start=start,
        method=method,
        spacing=spacing,
        strength=None if strength is None else float(strength),
        eta=float(eta),
        prediction_type=prediction_type,
        variance_type=variance_type,
        use_clipped_model_output=bool(use_clipped_model_output),
        clip_denoised=bool(clip_denoised),
    )
