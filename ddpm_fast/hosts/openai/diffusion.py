"""The diffusion object of OpenAI's improved- and guided-diffusion, on our tables and fused step.

    diffusion = from_openai(diffusion)  # or construct it as theirs: the arguments are the same
    x = diffusion.p_sample_loop(model, (16, 3, 64, 64), model_kwargs={"y": y})

Method for method its results are theirs within float32 rounding, its draws theirs, in their order:
after the same `torch.manual_seed` it makes the same pictures and leaves the same generator.
The vocabulary: t is int64 (N,), from 0 for the last denoising step, in this process's own (spaced)
numbering; the network is called as model(x, timesteps, **model_kwargs) with the original process's
timesteps, float32 and scaled to 0 .. 1000 with rescale_timesteps. cond_fn is called likewise, and
returns grad log p(y | x). Shapes and values that do not fit raise ValueError or RuntimeError, in
one sentence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops, reference
from ...arguments import shown
from ...device import dense
from ...plan import Plan, make_plan
from ...reference_process import split
from ...sampler import Sampler
from .process import Hook, Kwargs, Network, Terms
from .training import Training


class GaussianDiffusion(Training):
    """Their object of that name; arguments: see `process.Process`.

    Under `torch.no_grad()`, as in the loops, a step without denoised_fn and cond_fn is the fused
    one (`ops.p_sample_step`); the rest is `reference`.
    """

    def __init__(self, **process: Any) -> None:
        super().__init__(**process)
        self._plans: dict[tuple, Plan] = {}

    def p_sample(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        """A draw from p(x_{t-1} | x_t): `sample`, and `pred_xstart`."""
        if self._is_fused(x, denoised_fn, cond_fn):
            return self._fused_step("ddpm", 0.0, model, x, t, clip_denoised, model_kwargs)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        sample = reference.ancestral_step(out["mean"], out["log_variance"], t, noise)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Terms:
        """x_{t-1} by DDIM: `sample`, and `pred_xstart`. eta: 0 .. 1."""
        if self._is_fused(x, denoised_fn, cond_fn):
            return self._fused_step("ddim", eta, model, x, t, clip_denoised, model_kwargs)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        pred_xstart, noise = out["pred_xstart"], torch.randn_like(x)
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        sample = reference.ddim_step(self.schedule, pred_xstart, eps, t, noise, eta)
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Terms:
        """x_{t+1} by DDIM without noise, the other way: `sample`, and `pred_xstart`."""
        if eta != 0.0:
            raise ValueError(f"only DDIM without noise goes back: eta is 0, but is {shown(eta)}.")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        pred_xstart = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        sample = reference.ddim_reverse_step(self.schedule, pred_xstart, eps, t)
        return {"sample": sample, "pred_xstart": pred_xstart}

    def _is_fused(self, x: Tensor, *hooks: Hook) -> bool:
        """Whether a step is the fused one: without hooks, gradients, or a p_mean_variance that a
        subclass has made its own."""
        own = type(self).p_mean_variance is not GaussianDiffusion.p_mean_variance
        hooked = any(hook is not None for hook in hooks)
        return not (own or hooked or torch.is_grad_enabled() or x.dtype != torch.float32)

    def _fused_step(
        self,
        method: str,
        eta: float,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        model_kwargs: Kwargs,
    ) -> Terms:
        key = (method, eta, bool(clip_denoised), x.device)
        if key not in self._plans:
            types = (*self._types, bool(clip_denoised))
            plan = make_plan(self.schedule, method, None, None, eta, *types)
            self._plans[key] = plan.to(x.device)
        plan = self._plans[key]
        output = self._wrap_model(model)(x, t, **(model_kwargs or {}))
        split(output, x, self._types[1].startswith("learned"))  # refuses what has not the shape
        noise, unused, x = torch.randn_like(x), torch.zeros_like(t), dense(x)
        pred_xstart = torch.empty_like(x)
        sample = ops.p_sample_step(
            *(x, output, plan.coefficients, plan.index, self.num_timesteps - 1 - t),
            *(unused, unused),  # seed and sample index: the noise is given
            noise=noise,
            previous_pred_xstart=pred_xstart,  # no step of these methods reads it
        )
        return {"sample": sample, "pred_xstart": pred_xstart}

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """The samples at the end of `p_sample_loop_progressive`, with its arguments."""
        return _last(self.p_sample_loop_progressive(*args, **kwargs))

    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """The samples at the end of `ddim_sample_loop_progressive`, with its arguments."""
        return _last(self.ddim_sample_loop_progressive(*args, **kwargs))

    def p_sample_loop_progressive(
        self,
        model: Network,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Terms]:
        """Yield what `p_sample` returns at each t, the last first.

        shape: (N, C, ...). noise: x_T, else drawn. device: by default noise's, else the network's.
        progress: show a bar.
        """
        arguments = (clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._loop(self.p_sample, model, shape, noise, device, progress, arguments)

    def ddim_sample_loop_progressive(
        self,
        model: Network,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Terms]:
        """Yield what `ddim_sample` returns at each t, the last first; see the loop above."""
        arguments = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        return self._loop(self.ddim_sample, model, shape, noise, device, progress, arguments)

    def _loop(
        self,
        step: Callable[..., Terms],
        model: Network,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        arguments: tuple,
    ) -> Iterator[Terms]:
        if device is None:
            device = _device(model) if noise is None else noise.device
        x = torch.randn(*shape, device=device) if noise is None else noise
        model = self._wrap_model(model)
        indices = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices)
        for i in indices:
            t = torch.full((shape[0],), i, device=device)
            with torch.no_grad():
                out = step(model, x, t, *arguments)
            yield out
            x = out["sample"]

    def sampler(
        self,
        model: Network,
        sample_shape: Sequence[int],
        *,
        method: str = "ddpm",
        eta: float = 0.0,
        clip_denoised: bool = True,
        **settings: Any,
    ) -> Sampler:
        """The same process as a `Sampler` of samples (C, ...): noise that is a function of the seed
        and the sample's number, the network's conditions in buffers, the loop captured in graphs.

        settings: further arguments of `Sampler`, as conditions, device, dtype, graphs.
        """
        prediction_type, variance_type = self._types
        return Sampler(
            self._wrap_model(model),
            self.schedule,
            sample_shape,
            method=method,
            eta=eta,
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip_denoised=clip_denoised,
            **settings,
        )


class SpacedDiffusion(GaussianDiffusion):
    """Theirs of that name: `GaussianDiffusion` on some of the timesteps of the original process."""

    def __init__(self, use_timesteps: Collection[int], **process: Any) -> None:
        super().__init__(use_timesteps=use_timesteps, **process)


def from_openai(diffusion: Any) -> GaussianDiffusion:
    """Ours in the place of a GaussianDiffusion or SpacedDiffusion of theirs, by its attributes."""
    ours = GaussianDiffusion(
        betas=diffusion.betas,
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        rescale_timesteps=diffusion.rescale_timesteps,
    )
    if hasattr(diffusion, "timestep_map"):  # a spaced one, whose betas are the kept steps'
        ours._set_timesteps(diffusion.timestep_map, diffusion.original_num_steps)
    return ours


def _last(steps: Iterator[Terms]) -> Tensor:
    return deque(steps, maxlen=1).pop()["sample"]


def _device(model: Network) -> torch.device:
    """Of the network's first parameter, if it has any."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))
