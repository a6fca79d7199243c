"""The reverse process: a network, a plan and the fused step, eager or captured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ops
from .arguments import real
from .checkpoint import Model
from .device import memory_format
from .graphs import CapturedStep
from .loop import Loop, check_first_state
from .plan import Plan, make_plan
from .schedule import NoiseSchedule

Network = Callable[..., Tensor]
Step = Callable[[], None]
CAPTURABLE = ("cuda", "triton")
BAD_ROW = 1  # of the status word; csrc/kernels.h
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 256}


class Sampler:
    """Samples a trained DDPM.

    Args:
        network: any callable (x_t, t, **conditions) -> prediction, x_t (N, C, *size) of `dtype`
            and t (N,) int64 on `device`; ours or a host project's. x_t is a buffer that the next
            step writes: a network that keeps it must clone it.
        schedule: the noise schedule that it was trained with.
        sample_shape: (C, *size) of one sample.
        method, steps, spacing, eta, prediction_type, variance_type, clip_denoised, steps_offset,
            use_clipped_model_output, strength: see `plan.make_plan`.
        dtype: of the network's input; the state stays float32.
        backend: of the fused step: auto, cpu, cuda, triton or reference.
        guidance_scale: W of eps = uncond + W * (cond - uncond) (Ho and Salimans 2022,
            arXiv:2207.12598, with W = 1 + w); 1 is off. Needs the next two.
        num_classes: of a conditional network, which is called with `class_labels` (N,) int64.
        null_class: the label that means "no class".
        graphs: capture the step in a CUDA graph, where the backend is cuda or triton;
            `sampler.graphs` says whether that is so. On a CPU there is nothing to capture.
    Raises ValueError in one sentence for settings that are none.
    """

    def __init__(
        self,
        network: Network,
        schedule: NoiseSchedule,
        sample_shape: Sequence[int],
        *,
        method: str = "ddpm",
        steps: int | str | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_denoised: bool = True,
        steps_offset: int = 0,
        use_clipped_model_output: bool = True,
        strength: float | None = None,
        guidance_scale: float = 1.0,
        num_classes: int | None = None,
        null_class: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        graphs: bool = False,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.network, self.sample_shape = network, tuple(sample_shape)
        plan = make_plan(
            *(schedule, method, steps, spacing, eta),
            *(prediction_type, variance_type, clip_denoised),
            steps_offset=steps_offset,
            use_clipped_model_output=use_clipped_model_output,
            strength=strength,
        )
        self.plan: Plan = plan.to(self.device)
        self.timesteps = self.plan.index[:, 0].long()
        self.backend, self.backend_reason = _resolve(self.device, backend, graphs)
        # The reference draws its noise on the host, so it cannot be captured.
        self.graphs = graphs and self.backend in CAPTURABLE
        self.guidance_scale = real("guidance", guidance_scale)
        self.num_classes, self.null_class = num_classes, null_class
        self.guided = self.guidance_scale != 1.0
        if self.guided and (num_classes is None or null_class is None):
            raise ValueError(
                f"guidance {guidance_scale} needs a class-conditional model with a null class, "
                f"and this one has none: leave guidance at 1"
            )
        self.capture_seconds = 0.0
        self._free_loops: dict[tuple[int, bool], list[tuple[Loop, Step]]] = {}

    @classmethod
    def from_model(
        cls,
        model: Model,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        variance_type: str | None = None,
        clip_denoised: bool | None = None,
        **settings: object,
    ) -> Sampler:
        """A sampler of a loaded model, its network prepared for `dtype` on `device`.

        variance_type, clip_denoised: override the checkpoint's; the rest as for `Sampler`.
        """
        config = model.config
        device = torch.device(device or next(model.unet.parameters()).device)
        null = config.num_classes if config.null_class != "none" else None
        return cls(
            prepare(model.unet, device, dtype),
            model.schedule,
            config.sample_shape,
            prediction_type=model.prediction_type,
            variance_type=variance_type or model.variance_type,
            clip_denoised=model.clip_denoised if clip_denoised is None else clip_denoised,
            num_classes=config.num_classes,
            null_class=null,
            device=device,
            dtype=dtype,
            **settings,
        )

    def check(
        self,
        num_samples: int,
        seed: int,
        start: int,
        batch_size: int,
        classes: Sequence[int] | None,
        x_T: Tensor | None = None,
        x_start: Tensor | None = None,
    ) -> None:
        """Raise ValueError, before any work, for a run that `stream` would refuse."""
        for name, value, low, high in (
            ("the number of samples", num_samples, 1, 1 << 63),
            ("the batch size", batch_size, 1, 1 << 31),
            ("the seed", seed, 0, 1 << 64),
            ("the first sample", start, 0, (1 << 63) - num_samples),
        ):
            if not low <= value < high:
                raise ValueError(f"{name} must be at least {low} and below {high}, got {value}")
        self.labels(torch.zeros(1, dtype=torch.int64), classes)
        check_first_state(self.plan, (num_samples, *self.sample_shape), x_T, x_start)

    def default_batch_size(self, num_samples: int) -> int:
        return min(num_samples, DEFAULT_BATCH_SIZE[self.device.type])

    def labels(self, index: Tensor, classes: Sequence[int] | None) -> Tensor | None:
        """The label of every sample: the class list repeated over the sample indices."""
        if self.num_classes is None:
            if classes is not None:
                raise ValueError("classes were asked for, but this model was trained without them")
            return None
        if classes is None:
            if self.guided:
                raise ValueError("guidance is towards a class: give classes, or leave it at 1")
            if self.null_class is None:
                raise ValueError(
                    f"this model always needs a class: give some of 0 to {self.num_classes - 1}"
                )
            return torch.full_like(index, self.null_class)
        for label in classes:
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"there is no class {label}: this model has 0 to {self.num_classes - 1}"
                )
        return torch.tensor(classes, dtype=torch.int64)[index % len(classes)]

    @contextmanager
    def _borrowed_loop(self, size: int, conditional: bool) -> Iterator[tuple[Loop, Step]]:
        """Buffers and step for a batch size, kept for the next run but never shared by two."""
        free = self._free_loops.setdefault((size, conditional), [])
        try:
            loop, step = free.pop()
        except IndexError:
            # Buffers made in inference mode could not be written outside it by a later run.
            with torch.inference_mode(False):
                loop = Loop(self, size, conditional)
            # Each step before the capture uses up a row, and none may leave the table.
            warm_up = min(3, self.plan.num_steps)
            began = time.perf_counter()
            step = CapturedStep(loop.step, self.device, warm_up) if self.graphs else loop.step
            self.capture_seconds += time.perf_counter() - began
        try:
            yield loop, step
        finally:
            free.append((loop, step))

    @torch.no_grad()
    def stream(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        start: int = 0,
        batch_size: int | None = None,
        classes: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        x_start: Tensor | None = None,
        progress: bool = False,
        callback: Callable[[Tensor, int, Tensor], None] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (sample indices (B,), x_0 (B, C, *size) float32) batch by batch.

        x_0 lies in [-1, 1] if clip_denoised is on. Method ddim_inverse yields x_T in its place.

        Args:
            num_samples, start: the samples start .. start + num_samples - 1 of the seed. Sample i
                has the same noise whatever the others are.
            batch_size: how many are computed at once; a last, partial batch is padded.
            classes: sample i is of class classes[i % len(classes)]; None is no class.
            x_T: (num_samples, C, *size) floating point, in the place of the drawn x_T.
            x_start: likewise, for a sampler with a strength (img2img: each is noised, and denoised
                from there) or method ddim_inverse (each is turned into its x_T).
            callback: called as (sample indices, steps done, x_t) before the first step and after
                each; the samples past the end of the run are cut off.
        """
        if batch_size is None:
            batch_size = self.default_batch_size(num_samples)
        self.check(num_samples, seed, start, batch_size, classes, x_T, x_start)
        bar = tqdm(
            total=-(-num_samples // batch_size) * self.plan.num_steps,
            disable=not progress,
            unit="step",
        )
        conditional = self.labels(torch.zeros(1, dtype=torch.int64), classes) is not None
        with bar, self._borrowed_loop(batch_size, conditional) as (loop, step):
            for first in range(start, start + num_samples, batch_size):
                kept = min(batch_size, start + num_samples - first)
                # Padding repeats the last wanted sample, so nothing unwanted can fail the run.
                place = first - start + torch.arange(batch_size).clamp(max=kept - 1)
                index = start + place
                loop.start(
                    *(seed, index, self.labels(index, classes)),
                    *(None if x is None else x[place.to(x.device)] for x in (x_T, x_start)),
                )
                for done in range(self.plan.num_steps):
                    if callback:
                        callback(index[:kept], done, loop.x[:kept])
                    step()
                    bar.update()
                if callback:
                    callback(index[:kept], self.plan.num_steps, loop.x[:kept])
                self._check_result(loop)
                yield index[:kept], loop.x[:kept].clone()

    def sample(self, num_samples: int, **settings: object) -> Tensor:
        """x_0 of `num_samples` samples, (N, C, *size) float32 on the CPU; see `stream`."""
        return torch.cat([x.cpu() for _, x in self.stream(num_samples, **settings)])

    def _check_result(self, loop: Loop) -> None:
        """One look at the status word, after the run: the host does not wait during it."""
        code, row, position, _ = loop.status.tolist()
        if code == BAD_ROW:
            raise RuntimeError(f"the step was given row {row} of {self.plan.num_steps}: a defect")
        if code:
            raise RuntimeError(
                f"sample {int(loop.index[position])} has a value that is not finite after step "
                f"{row + 1} of {self.plan.num_steps}: the network's weights are broken, or it "
                f"overflows in {str(self.dtype).removeprefix('torch.')} (try float32)"
            )


def prepare(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of the network for sampling: on `device`, in `dtype`, in eval mode."""
    network = copy.deepcopy(unet).to(device, dtype).eval().requires_grad_(False)
    if any(p.ndim == 4 for p in network.parameters()):
        network.to(memory_format=memory_format(device, dtype, 4))
    return network


def _resolve(device: torch.device, backend: str, graphs: bool) -> tuple[str, str]:
    """The step's backend. Asking for graphs on a GPU asks for the kernels that can be captured."""
    if graphs and device.type == "cuda" and backend == "auto" and not ops.is_overridden():
        errors = []
        for name in CAPTURABLE:
            try:
                return ops.resolve_backend(device, name)
            except ops.BackendError as error:
                errors.append(str(error))
        return ops.resolve_backend(device)[0], f"not captured, because {' '.join(errors)}"
    return ops.resolve_backend(device, backend)
