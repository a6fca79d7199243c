"""diffusers' DDPM and DDIM schedulers, their step one pass of the fused operator.

Their configurations, timesteps, add_noise and files are diffusers' own. What the fused step has not
(thresholding, variance_type "learned", float64, gradients, shapes that are broadcast, a timestep
that was not set) runs as diffusers has it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ... import ops
from ...device import DTYPES, dense
from ...plan import Plan
from .plans import draws, plan_of

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class _Prepared:
    """A plan on a device, and the row of each of its timesteps."""

    plan: Plan
    rows: dict[int, int]


# By its name in this module diffusers knows how to load a pipeline that was saved with one of ours.
class _FusedStep(SchedulerMixin):
    """`_fused`, and the plans that it has made of the scheduler as it is."""

    # What they were made of, with the number of writes to its tensors; and the plans.
    _kept: tuple[tuple[Any, ...], tuple[int, ...], dict[Any, _Prepared | None]] = ((), (), {})

    def _prepared(self, device: torch.device, *settings: Any) -> _Prepared | None:
        """None where the fused step cannot do what diffusers does."""
        made_of = self.timesteps, self.alphas_cumprod, self.config
        versions = tuple(0 if t.is_inference() else t._version for t in made_of[:2])
        kept = self._kept
        if versions != kept[1] or not all(map(operator.is_, made_of, kept[0])):
            kept = self._kept = made_of, versions, {}
        plans = kept[2]
        key = device, *settings
        if key not in plans:
            try:
                plan = plan_of(self, *settings).to(device)
                plans[key] = _Prepared(plan, {t: row for row, t in enumerate(plan.timesteps)})
            except ValueError:
                plans[key] = None
        return plans[key]

    def _fused(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators,
        noise: Tensor | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """(x_prev, pred_xstart), or None for what is left to diffusers."""
        differentiated = model_output.requires_grad or sample.requires_grad
        if (
            model_output.ndim != sample.ndim
            or sample.ndim < 2
            or model_output[:, : sample.shape[1]].shape != sample.shape
            or {sample.dtype, model_output.dtype} - set(DTYPES.values())
            or sample.device.type not in ("cpu", "cuda")
            or (torch.is_grad_enabled() and differentiated)
        ):
            return None
        prepared = self._prepared(sample.device, float(eta), bool(use_clipped_model_output))
        row = None if prepared is None else prepared.rows.get(int(timestep))
        if row is None:
            return None
        if noise is None and draws(prepared.plan, row):
            like = {"device": model_output.device, "dtype": model_output.dtype}
            noise = randn_tensor(sample.shape, generator=generator, **like)
        x_t = dense(sample.float())
        pred_xstart = torch.empty_like(x_t)
        rows = torch.full((len(x_t),), row, device=x_t.device)
        x_prev = ops.p_sample_step(
            x_t,
            model_output,
            prepared.plan.coefficients,
            prepared.plan.index,
            rows,
            rows,  # seed and sample index of a noise that is never drawn
            rows,
            noise=None if noise is None else noise.float(),
            previous_pred_xstart=pred_xstart,
        )
        return x_prev.to(sample.dtype), pred_xstart.to(sample.dtype)


class DDPMScheduler(_FusedStep, diffusers.DDPMScheduler):
    """diffusers' DDPMScheduler: the same numbers from the same generator, to float32's rounding."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_prev and pred_xstart of diffusers' step, in sample's dtype, computed in float32."""
        found = self._fused(model_output, timestep, sample, generator)
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        return DDPMSchedulerOutput(*found) if return_dict else found


class DDIMScheduler(_FusedStep, diffusers.DDIMScheduler):
    """diffusers' DDIMScheduler: the same numbers from the same generator, to float32's rounding."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_prev and pred_xstart of diffusers' step, in sample's dtype, computed in float32.

        variance_noise, of sample's shape: in the place of the generator's, where eta is above 0.
        """
        arguments = model_output, timestep, sample
        noise = variance_noise if eta > 0 else None
        found = None
        if self.num_inference_steps is not None and (noise is None or generator is None):
            found = self._fused(*arguments, generator, noise, eta, use_clipped_model_output)
        if found is None:
            theirs = eta, use_clipped_model_output, generator, variance_noise, return_dict
            return super().step(*arguments, *theirs)
        return DDIMSchedulerOutput(*found) if return_dict else found
