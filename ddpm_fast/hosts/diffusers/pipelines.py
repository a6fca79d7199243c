"""diffusers' DDPMPipeline and DDIMPipeline on the prepared U-Net, the fused step and its loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ...arguments import one_of, shown
from ...device import DTYPES, with_index
from ...families import diffusers as family
from ...families.reading import Choices
from ...graphs import resolve_backend
from ...inference import FusedUNet, prepare
from ...plan import Plan
from ...sampler import Sampler
from .plans import draws, plan_of, settings_of

NOISES = ("pipeline", "counter")


class _AsItIs(nn.Module):
    """A network of diffusers, called as ours are."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t).sample


def converted(unet: nn.Module) -> nn.Module:
    """Our U-Net with the weights of a UNet2DModel; itself, with one warning, where ours has no
    such layers."""
    try:
        if type(unet) is not diffusers.UNet2DModel:
            raise ValueError(f"it is a {type(unet).__name__}, not a UNet2DModel")
        reading = family.read(unet.state_dict(), dict(unet.config), None, Choices({}))
        weights = {key: value.float() for key, value in reading.tensors.items()}
        reading.network.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        warnings.warn(f"ddpm_fast takes the pipeline's U-Net as it is: {reason}", stacklevel=5)
        return _AsItIs(unet)
    return reading.network.eval()


class Accelerated:
    """What runs under a pipeline: its prepared network, and the last run's sampler for the next.

    Arguments as for `accelerate`.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        noise: str,
        dtype: torch.dtype | None,
        graphs: bool | str,
        backend: str,
    ) -> None:
        self.noise = one_of("noise", noise, NOISES)
        self._dtype = dtype
        self._settings = {"graphs": graphs, "backend": backend}
        self._take(pipe)

    def _place(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Where the network is to run."""
        device, dtype = with_index(pipe._execution_device), self._dtype or pipe.unet.dtype
        if dtype not in DTYPES.values():
            raise ValueError(
                f"the network must run in float32, bfloat16 or float16, but {shown(dtype)} was"
                f" asked for: give accelerate one of torch's dtypes of these names."
            )
        return {"device": device, "dtype": dtype}

    def _take(self, pipe: DiffusionPipeline) -> None:
        """The pipeline's network as it is now, where it is now."""
        self._unet, self._taken = pipe.unet, self._place(pipe)
        backend, _ = resolve_backend(self._taken["device"], **self._settings)
        self._network = prepare(converted(pipe.unet), **self._taken, backend=backend)
        self._kept: tuple[Plan, Sampler] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy's pipeline has another network, which is taken at its first call."""
        return self.__dict__ | {"_unet": None, "_network": None, "_kept": None}

    def _sampler(self, pipe: DiffusionPipeline, plan: Plan) -> Sampler:
        """That of the run before, with its buffers and captures, if it took the same steps."""
        if pipe.unet is not self._unet or self._place(pipe) != self._taken:
            self._take(pipe)
        if self._kept is not None:
            known, sampler = self._kept
            same = torch.equal(known.coefficients, plan.coefficients)
            if same and torch.equal(known.index, plan.index):
                return sampler
            sampler.release()
        if isinstance(self._network, FusedUNet):
            self._network.expect(plan.timesteps)
        size = pipe.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        shape = pipe.unet.config.in_channels, *size
        sampler = Sampler(self._network, plan, shape, **self._taken, **self._settings)
        self._kept = plan, sampler
        return sampler

    def _noise(
        self, plan: Plan, draw: Callable[[], Tensor], batch_size: int, generator: Any
    ) -> dict[str, Any]:
        """What a run is to be told of its noise; draw: one draw of the generator, as diffusers'."""
        if self.noise == "counter":
            if isinstance(generator, list):
                raise ValueError(
                    'noise="counter" takes one generator, which gives the seed of all samples, but'
                    f" a list of {len(generator)} was given."
                )
            where = "cpu" if generator is None else generator.device
            seed = torch.empty((), dtype=torch.int64, device=where).random_(generator=generator)
            return {"seed": int(seed)}
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"a list of generators must have one for each of the {batch_size} samples, but it"
                f" has {len(generator)}."
            )
        x_T = draw()
        if not any(draws(plan, row) for row in range(plan.num_steps)):
            return {"x_T": x_T}
        return {"x_T": x_T, "noise": lambda _, step: draw() if draws(plan, step - 1) else None}

    def __call__(
        self,
        pipe: DiffusionPipeline,
        batch_size: int,
        generator: Any,
        num_inference_steps: int,
        output_type: str | None,
        return_dict: bool,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """What the pipeline's own call does."""
        pipe.scheduler.set_timesteps(num_inference_steps)
        plan = plan_of(pipe.scheduler, eta, bool(use_clipped_model_output))
        sampler = self._sampler(pipe, plan)
        shape = batch_size, *sampler.sample_shape
        draw = partial(randn_tensor, shape, generator, sampler.device, pipe.unet.dtype)
        settings = self._noise(plan, draw, batch_size, generator)
        with pipe.progress_bar(total=plan.num_steps) as bar:
            if not bar.disable:
                settings["callback"] = lambda index, done, x: bar.update(done - bar.n)
                settings["callback_every"] = max(1, plan.num_steps // 100)
            [(_, x)] = sampler.batches(range(batch_size), batch_size=batch_size, **settings)
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = pipe.numpy_to_pil(images)
        pipe.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _accelerated(pipe: DiffusionPipeline) -> Accelerated:
    """Made now, if it was diffusers that made the pipeline, from a folder or from another one."""
    if pipe._accelerated is None:
        accelerate(pipe)
    return pipe._accelerated


class DDPMPipeline(diffusers.DDPMPipeline):
    """diffusers' DDPMPipeline, accelerated: by `accelerate`, else as by its defaults."""

    _accelerated: Accelerated | None = None

    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As of diffusers' DDPMPipeline."""
        how = batch_size, generator, num_inference_steps, output_type, return_dict
        return _accelerated(self)(self, *how)


class DDIMPipeline(diffusers.DDIMPipeline):
    """diffusers' DDIMPipeline, accelerated: by `accelerate`, else as by its defaults."""

    _accelerated: Accelerated | None = None

    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As of diffusers' DDIMPipeline; eta is 0 .. 1."""
        how = batch_size, generator, num_inference_steps, output_type, return_dict
        return _accelerated(self)(self, *how, eta, use_clipped_model_output)


KINDS = {
    diffusers.DDPMPipeline: DDPMPipeline,
    diffusers.DDIMPipeline: DDIMPipeline,
    DDPMPipeline: DDPMPipeline,
    DDIMPipeline: DDIMPipeline,
}


def accelerate(
    pipe: DiffusionPipeline,
    *,
    noise: str = "pipeline",
    dtype: torch.dtype | None = None,
    graphs: bool | str = "auto",
    backend: str = "auto",
) -> DiffusionPipeline:
    """Make `pipe`, a DDPMPipeline or DDIMPipeline of diffusers, sample fast; returns it.

    Its interface, its components and what it saves stay as they are. pipe.unet's weights are copied
    now, so after a change of them call `accelerate` again; another network, device, dtype or
    scheduler of the pipeline is seen at the next call.

    Args:
        noise: "pipeline", the draws of the call's generator, so that seeds keep their pictures; or
            "counter", ours: the call's generator gives one number, the seed, and sample i of it is
            the same in a batch of any size.
        dtype: of the network; None is the pipeline's. The state is float32, and so are the arrays
            and tensors that it returns.
        graphs, backend: as for `Sampler`.
    A U-Net with layers that ours has not runs as it is, with one warning. Raises ValueError in one
    sentence for another pipeline or scheduler, for thresholding and for variance_type "learned",
    and BackendError for a backend that is not available.
    """
    if type(pipe) not in KINDS:
        raise ValueError(
            f"pipe must be a DDPMPipeline or a DDIMPipeline of diffusers, but {shown(type(pipe))}"
            f" was given; another can be given the DDPMScheduler or the DDIMScheduler of"
            f" ddpm_fast.hosts.diffusers."
        )
    settings_of(pipe.scheduler)
    pipe._accelerated = Accelerated(pipe, noise, dtype, graphs, backend)
    pipe.__class__ = KINDS[type(pipe)]
    return pipe
