"""What OpenAI's diffusion object is made of, and what the network says; the object: `diffusion`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import reference
from ...arguments import one_of
from ...reference_process import timesteps_on_cpu
from ...schedule import NoiseSchedule

# Their enums' members, by name.
PREDICTION_TYPES = {"EPSILON": "epsilon", "START_X": "sample", "PREVIOUS_X": "previous_x"}
VARIANCE_TYPES = {
    name.upper(): name for name in ("fixed_small", "fixed_large", "learned", "learned_range")
}
LOSS_TYPES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")

Network = Callable[..., Tensor]
Hook = Callable[..., Tensor] | None
Kwargs = Mapping[str, Any] | None
Terms = dict[str, Tensor]


def _member(argument: str, value: Any, names: Collection[str]) -> str:
    """The name of an enum's member, or that name itself in any case."""
    name = getattr(value, "name", value)
    return one_of(argument, name.upper() if isinstance(name, str) else name, names)


class OriginalTimesteps(nn.Module):
    """A network, or a cond_fn, that is called with a spaced process's t, and given the original's.

    timesteps: what it is given for each t, on any device; kept on each one that was used.
    """

    def __init__(self, model: Network, timesteps: dict[torch.device, Tensor]) -> None:
        super().__init__()
        self.model, self._timesteps = model, timesteps

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        table = self._timesteps.get(t.device)
        if table is None:
            some = next(iter(self._timesteps.values()))
            table = self._timesteps[t.device] = some.to(t.device)
        if t.device.type == "cpu":  # on a GPU the look would wait for it, also in a capture
            timesteps_on_cpu(t, x, len(table))
        return self.model(x, table[t], **kwargs)


class Process:
    """The process: its tables and types, q, p of a network's output, and guidance.

    Args:
        betas: of the process that the model was trained with.
        model_mean_type, model_var_type, loss_type: members of their enums, or the members' names.
        rescale_timesteps: give the network 1000 / T times the timestep, as float32.
        use_timesteps: the timesteps that are kept; None is all.
    The schedule's tables (`betas`, `alphas_cumprod`, ...) are attributes, as float64 arrays;
    writing into them changes nothing.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: Any,
        model_var_type: Any,
        loss_type: Any = "MSE",
        rescale_timesteps: bool = False,
        use_timesteps: Collection[int] | None = None,
    ) -> None:
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.loss_type, self.rescale_timesteps = loss_type, rescale_timesteps
        mean = _member("model_mean_type", model_mean_type, PREDICTION_TYPES)
        variance = _member("model_var_type", model_var_type, VARIANCE_TYPES)
        self._types = PREDICTION_TYPES[mean], VARIANCE_TYPES[variance]
        self._loss = _member("loss_type", loss_type, LOSS_TYPES)
        trained = NoiseSchedule(betas)
        kept = range(trained.num_timesteps) if use_timesteps is None else sorted(set(use_timesteps))
        self.schedule = trained.respace(list(kept))
        self.num_timesteps = self.schedule.num_timesteps
        tables = {k: v for k, v in vars(self.schedule).items() if isinstance(v, np.ndarray)}
        # Copies: torch.from_numpy warns of arrays that cannot be written.
        vars(self).update({name: table.copy() for name, table in tables.items()})
        self._set_timesteps(kept, trained.num_timesteps)

    def _set_timesteps(self, kept: Collection[int], original_num_steps: int) -> None:
        """What the network is given for each t."""
        self.timestep_map, self.use_timesteps = list(kept), set(kept)
        self.original_num_steps = original_num_steps
        timesteps = torch.tensor(self.timestep_map)
        if self.rescale_timesteps:
            timesteps = timesteps.float() * (1000.0 / original_num_steps)
        self._timesteps = {timesteps.device: timesteps}

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0)."""
        return reference.q_mean_variance(self.schedule, x_start, t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw from q(x_t | x_0), with `noise` if it is given."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return reference.q_sample(self.schedule, x_start, t, noise)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""
        return reference.q_posterior_mean_variance(self.schedule, x_start, x_t, t)

    def _wrap_model(self, model: Network) -> Network:
        """`model`, or a cond_fn, given the original process's timesteps in the place of t."""
        if isinstance(model, OriginalTimesteps):
            return model
        return OriginalTimesteps(model, self._timesteps)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return reference.predict_xstart(self.schedule, eps, x_t, t, "epsilon")

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return reference.predict_xstart(self.schedule, xprev, x_t, t, "previous_x")

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return reference.predict_eps(self.schedule, pred_xstart, x_t, t)

    def p_mean_variance(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        """p(x_{t-1} | x_t): mean, variance, log_variance and pred_xstart, each of x's shape."""
        output = self._wrap_model(model)(x, t, **(model_kwargs or {}))
        types = (*self._types, clip_denoised, denoised_fn)
        return reference.p_mean_variance(self.schedule, output, x, t, *types)._asdict()

    def condition_mean(
        self, cond_fn: Network, p_mean_var: Terms, x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """The mean of x_{t-1}, guided by cond_fn."""
        gradient = self._wrap_model(cond_fn)(x, t, **(model_kwargs or {}))
        return reference.condition_mean(p_mean_var["mean"], p_mean_var["variance"], gradient)

    def condition_score(
        self, cond_fn: Network, p_mean_var: Terms, x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Terms:
        """`p_mean_var` with the pred_xstart, and its mean, that DDIM takes, guided by cond_fn."""
        gradient = self._wrap_model(cond_fn)(x, t, **(model_kwargs or {}))
        guided = reference.condition_score(self.schedule, p_mean_var["pred_xstart"], x, t, gradient)
        mean, _, _ = self.q_posterior_mean_variance(guided, x, t)
        return p_mean_var | {"pred_xstart": guided, "mean": mean}
