"""The reverse process: a network, a plan and the fused step, eager or captured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from . import ops
from .arguments import count, real
from .checkpoint import Model
from .graphs import CapturedStep
from .inference import FusedUNet, prepare
from .loop import FirstState, Loop, check_first_state, rows
from .plan import Plan, make_plan
from .schedule import NoiseSchedule

Network = Callable[..., Tensor]
Step = Callable[[], None]
CAPTURABLE = ("cuda", "triton")
BAD_ROW = 1  # of the status word; csrc/kernels.h
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 256}
LAST_INDEX = (1 << 63) - 1  # of the samples of a seed


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
        fused: bool = True,
        **settings: object,
    ) -> Sampler:
        """A sampler of a loaded model, its network prepared for `dtype` on `device`.

        variance_type: overrides the checkpoint's. fused: see `inference.prepare`; the rest as for
        `Sampler`.
        """
        config = model.config
        device = torch.device(device or next(model.unet.parameters()).device)
        null = config.num_classes if config.null_class != "none" else None
        sampler = cls(
            prepare(model.unet, device, dtype, fused),
            model.schedule,
            config.sample_shape,
            prediction_type=model.prediction_type,
            variance_type=variance_type or model.variance_type,
            num_classes=config.num_classes,
            null_class=null,
            device=device,
            dtype=dtype,
            **settings,
        )
        if isinstance(sampler.network, FusedUNet):
            sampler.network.expect(sampler.timesteps.tolist())
        return sampler

    def check(
        self,
        indices: Iterable[int],
        seed: int,
        batch_size: int,
        classes: Sequence[int] | None,
        x_T: FirstState | None = None,
        x_start: FirstState | None = None,
    ) -> None:
        """Raise ValueError, before any work, for a run that `batches` would refuse."""
        count("the batch size", batch_size, 1, (1 << 31) - 1)
        count("the seed", seed, 0, (1 << 64) - 1)
        self.labels(torch.zeros(1, dtype=torch.int64), classes)
        num_samples = len(indices) if isinstance(indices, Sized) else None
        check_first_state(self.plan, (num_samples, *self.sample_shape), x_T, x_start)

    def default_batch_size(self, indices: Iterable[int]) -> int:
        """All of `indices` at once, up to what the device is busy with."""
        most = DEFAULT_BATCH_SIZE[self.device.type]
        return max(1, min(len(indices), most)) if isinstance(indices, Sized) else most

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

    def stream(self, indices: Iterable[int], **settings: object) -> Iterator[tuple[int, Tensor]]:
        """Yield (sample index, x_0 (C, *size) float32), each once, as their batches end.

        Arguments as for `batches`.
        """
        for index, x in self.batches(indices, **settings):
            yield from zip(index.tolist(), x, strict=True)

    @torch.no_grad()
    def batches(
        self,
        indices: Iterable[int],
        *,
        seed: int = 0,
        batch_size: int | None = None,
        classes: Sequence[int] | None = None,
        x_T: FirstState | None = None,
        x_start: FirstState | None = None,
        callback: Callable[[Tensor, int, Tensor], None] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (sample indices (B,), x_0 (B, C, *size) float32) batch by batch.

        x_0 lies in [-1, 1] if clip_denoised is on. Method ddim_inverse yields x_T in its place.

        Args:
            indices: which samples of the seed, in any order; sample i has the same noise whatever
                the others are. They may have no end, and are asked for a batch at a time.
            batch_size: how many are computed at once; a last, partial batch is padded.
            classes: sample i is of class classes[i % len(classes)]; None is no class.
            x_T: in the place of the drawn x_T, floating point: (N, C, *size) in the order of the N
                indices, or a function from some of them (B,) to theirs (B, C, *size).
            x_start: likewise, for a sampler with a strength (img2img: each is noised, and denoised
                from there) or method ddim_inverse (each is turned into its x_T).
            callback: called as (sample indices, steps done, x_t) before the first step and after
                each, without the padding.
        """
        if batch_size is None:
            batch_size = self.default_batch_size(indices)
        self.check(indices, seed, batch_size, classes, x_T, x_start)
        conditional = self.labels(torch.zeros(1, dtype=torch.int64), classes) is not None
        wanted, first = iter(indices), 0
        with self._borrowed_loop(batch_size, conditional) as (loop, step):
            while some := [*islice(wanted, batch_size)]:
                for i in some:
                    count("a sample's index", i, 0, LAST_INDEX)
                kept = len(some)
                # Padding repeats the last wanted sample, so nothing unwanted can fail the run.
                place = torch.arange(batch_size).clamp(max=kept - 1)
                index = torch.tensor(some, dtype=torch.int64)[place]
                given = [rows(x, index, first + place) for x in (x_T, x_start)]
                check_first_state(self.plan, (batch_size, *self.sample_shape), *given)
                loop.start(seed, index, self.labels(index, classes), *given)
                for done in range(self.plan.num_steps):
                    if callback:
                        callback(index[:kept], done, loop.x[:kept])
                    step()
                if callback:
                    callback(index[:kept], self.plan.num_steps, loop.x[:kept])
                self._check_result(loop)
                first += kept
                yield index[:kept], loop.x[:kept].clone()

    def sample(self, num_samples: int, *, start: int = 0, **settings: object) -> Tensor:
        """x_0 of the samples start .. start + num_samples - 1, (N, C, *size) float32 on the CPU.

        Further arguments as for `batches`.
        """
        indices = sample_range(start, num_samples)
        return torch.cat([x.cpu() for _, x in self.batches(indices, **settings)])

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


def sample_range(start: int, num_samples: int) -> range:
    """The indices start .. start + num_samples - 1; ValueError if there are no such samples."""
    count("the number of samples", num_samples, 1, LAST_INDEX)
    count("the first sample", start, 0, LAST_INDEX + 1 - num_samples)
    return range(start, start + num_samples)


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
