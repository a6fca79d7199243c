"""The reverse process: a network, a plan and the fused step, eager or captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from .arguments import count, real
from .checkpoint import Model
from .conditions import check_conditions, check_examples, class_labels
from .device import with_index
from .executor import WHOLE
from .graphs import make_executor, resolve_backend
from .inference import FusedUNet, prepare
from .loop import FirstState, check_first_state, rows
from .loops import Loops
from .noise import MAX_STEP
from .plan import Plan, make_plan
from .schedule import NoiseSchedule

Network = Callable[..., Tensor]
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 256}
MAX_BATCH_SIZE = (1 << 31) - 1
LAST_INDEX = (1 << 63) - 1  # of the samples of a seed
STEPS_PER_GRAPH = 1  # until a GPU has shown what is faster


class Sampler:
    """Samples a trained DDPM.

    Args:
        network: any callable (x_t, t, **conditions) -> prediction, x_t (N, C, *size) of `dtype`
            and t (N,) int64 on `device`; ours or a host project's. x_t is a buffer that the next
            step writes: a network that keeps it must clone it.
        schedule: the noise schedule that it was trained with; or a whole plan, in the place of
            what `plan.make_plan` takes.
        sample_shape: (C, *size) of one sample.
        method, steps, spacing, eta, prediction_type, variance_type, clip_denoised, steps_offset,
            use_clipped_model_output, strength: see `plan.make_plan`.
        dtype: of the network's input, but for a prepared network, which says itself (see
            `inference.FusedUNet`); the state stays float32.
        backend: of the fused step: auto, cpu, cuda, triton or reference.
        guidance_scale: W of eps = uncond + W * (cond - uncond) (Ho and Salimans 2022,
            arXiv:2207.12598, with W = 1 + w); 1 is off. Needs the next two.
        num_classes: of a conditional network, which is called with `class_labels` (N,) int64.
        null_class: the label that means "no class".
        conditions: what else the network is given of each sample, by the argument's name: one
            sample's tensor, whose shape and dtype count; the values come with each run.
        graphs: capture the step in a CUDA graph, with a backend that can be captured (cuda or
            triton), and replay that. With True, what cannot be captured raises; with "auto" it is
            sampled step by step, with one warning. On a CPU there is nothing to capture.
            `sampler.graphs` says whether it is captured, `graphs_obstacle` why not.
        steps_per_graph: how many steps a launch takes; "all" makes the loop one launch where the
            driver can do that, else one step.
    Raises ValueError in one sentence for settings that are none, and BackendError for a backend
    that is not available.
    """

    def __init__(
        self,
        network: Network,
        schedule: NoiseSchedule | Plan,
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
        conditions: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        graphs: bool | str = False,
        steps_per_graph: int | str = STEPS_PER_GRAPH,
    ) -> None:
        self.device, self.dtype = with_index(torch.device(device)), dtype
        self.network, self.sample_shape = network, tuple(sample_shape)
        plan = schedule
        if not isinstance(plan, Plan):
            plan = make_plan(
                *(schedule, method, steps, spacing, eta),
                *(prediction_type, variance_type, clip_denoised),
                steps_offset=steps_offset,
                use_clipped_model_output=use_clipped_model_output,
                strength=strength,
            )
        self.plan: Plan = plan.to(self.device)
        self.timesteps = self.plan.index[:, 0].long()
        self.backend, self.backend_reason = resolve_backend(self.device, backend, graphs)
        executor, self.graphs_obstacle = make_executor(self.device, self.backend, graphs, network)
        if steps_per_graph != WHOLE:
            steps_per_graph = count("steps_per_graph", steps_per_graph, 1, MAX_STEP)
        self.loops = Loops(executor, steps_per_graph, automatic=graphs == "auto")
        self._sizes: list[int] = []  # that `capture` was asked for, ascending
        self.guidance_scale = real("guidance", guidance_scale)
        self.num_classes, self.null_class = num_classes, null_class
        self.conditions = check_examples(conditions, num_classes is not None)
        self.guided = self.guidance_scale != 1.0
        if self.guided and (num_classes is None or null_class is None):
            raise ValueError(
                f"guidance {guidance_scale} needs a class-conditional model with a null class, "
                f"and this one has none: leave guidance at 1"
            )

    @classmethod
    def from_model(
        cls,
        model: Model,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        variance_type: str | None = None,
        clip_denoised: bool | None = None,
        fused: bool = True,
        **settings: object,
    ) -> Sampler:
        """A sampler of a loaded model, its network prepared for `dtype` on `device`.

        variance_type, clip_denoised: override the checkpoint's. fused: see `inference.prepare`; the
        rest as for `Sampler`.
        """
        config = model.config
        device = torch.device(device or next(model.unet.parameters()).device)
        null = config.num_classes if config.null_class != "none" else None
        wanted = settings.get("backend", "auto"), settings.get("graphs", False)
        backend = resolve_backend(device, *wanted)[0]
        sampler = cls(
            prepare(model.unet, device, dtype, fused, backend),
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
        conditions: Mapping[str, FirstState] | None = None,
    ) -> None:
        """Raise ValueError, before any work, for a run that `batches` would refuse."""
        count("the batch size", batch_size, 1, MAX_BATCH_SIZE)
        count("the seed", seed, 0, (1 << 64) - 1)
        self.labels(torch.zeros(1, dtype=torch.int64), classes)
        num_samples = len(indices) if isinstance(indices, Sized) else None
        check_first_state(self.plan, (num_samples, *self.sample_shape), x_T, x_start)
        check_conditions(self.conditions, conditions, num_samples)

    @property
    def graphs(self) -> bool:
        """Whether steps are captured."""
        return self.loops.executor.captures

    @property
    def capture_seconds(self) -> float:
        """What captures have taken so far, their warm-up included."""
        return self.loops.capture_seconds

    @property
    def memory_held(self) -> int:
        """Bytes on the device of the buffers and captures that are kept for further runs."""
        return self.loops.memory_held()

    def release(self) -> None:
        """Give them back; a later run makes them anew."""
        self.loops.release()

    @torch.no_grad()
    def capture(self, batch_sizes: Iterable[int]) -> None:
        """Make the buffers and captures of these batch sizes before they are needed.

        The largest is first, so that the others find room in its memory. From then on a run that
        names no batch size takes the smallest of these that holds all its samples.
        """
        sizes = {count("the batch size", size, 1, MAX_BATCH_SIZE) for size in batch_sizes}
        for size in sorted(sizes, reverse=True):
            with self.loops.borrowed(self, size):
                pass
        self._sizes = sorted(sizes)

    def default_batch_size(self, indices: Iterable[int]) -> int:
        """All of `indices` at once, up to what the device is busy with, or was captured for."""
        wanted = len(indices) if isinstance(indices, Sized) else None
        if self._sizes:
            fitting = (size for size in self._sizes if wanted is not None and size >= wanted)
            return next(fitting, self._sizes[-1])
        most = DEFAULT_BATCH_SIZE[self.device.type]
        return most if wanted is None else max(1, min(wanted, most))

    def labels(self, index: Tensor, classes: Sequence[int] | None) -> Tensor | None:
        """The label of every sample: the class list repeated over the sample indices."""
        return class_labels(index, classes, self.num_classes, self.null_class, self.guided)

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
        conditions: Mapping[str, FirstState] | None = None,
        x_T: FirstState | None = None,
        x_start: FirstState | None = None,
        noise: Callable[[Tensor, int], Tensor | None] | None = None,
        callback: Callable[[Tensor, int, Tensor], None] | None = None,
        callback_every: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (sample indices (B,), x_0 (B, C, *size) float32) batch by batch.

        x_0 lies in [-1, 1] if clip_denoised is on. Method ddim_inverse yields x_T in its place.

        Args:
            indices: which samples of the seed, in any order; sample i has the same noise whatever
                the others are. They may have no end, and are asked for a batch at a time.
            batch_size: how many are computed at once; a last, partial batch is padded.
            classes: sample i is of class classes[i % len(classes)]; None is no class.
            conditions: the values of the sampler's, by name: (N, *shape), or functions, as for x_T.
                Guidance gives them to both halves.
            x_T: in the place of the drawn x_T, floating point: (N, C, *size) in the order of the N
                indices, or a function from some of them (B,) to theirs (B, C, *size).
            x_start: likewise, for a sampler with a strength (img2img: each is noised, and denoised
                from there) or method ddim_inverse (each is turned into its x_T).
            noise: in the place of the steps' drawn noise, a function of (sample indices (B,), step)
                to (B, C, *size), called before each step, 1 .. S; None where that uses none.
            callback: called as (sample indices, steps done, x_t) before the first step, after each
                `callback_every` and after the last, without the padding. x_t is on the CPU; clone
                what you keep. A GPU's steps go on meanwhile: the host waits for the copy alone.
        """
        count("callback_every", callback_every, 1, MAX_STEP)
        if batch_size is None:
            batch_size = self.default_batch_size(indices)
        self.check(indices, seed, batch_size, classes, x_T, x_start, conditions)
        wanted, first = iter(indices), 0
        with self.loops.borrowed(self, batch_size, noise is not None) as lent:
            while some := [*islice(wanted, batch_size)]:
                for i in some:
                    count("a sample's index", i, 0, LAST_INDEX)
                kept = len(some)
                # Padding repeats the last wanted sample, so nothing unwanted can fail the run.
                place = torch.arange(batch_size).clamp(max=kept - 1)
                index = torch.tensor(some, dtype=torch.int64)[place]
                given = [rows(x, index, first + place) for x in (x_T, x_start)]
                check_first_state(self.plan, (batch_size, *self.sample_shape), *given)
                named = {k: rows(v, index, first + place) for k, v in (conditions or {}).items()}
                check_conditions(self.conditions, named, batch_size)
                lent.start(seed, index, self.labels(index, classes), *given, named)
                x, see = lent.loop.x[:kept], callback and partial(callback, index[:kept])
                lent.run(x, see, callback_every, noise and partial(noise, index))
                first += kept
                yield index[:kept], x.clone()

    def sample(self, num_samples: int, *, start: int = 0, **settings: object) -> Tensor:
        """x_0 of the samples start .. start + num_samples - 1, (N, C, *size) float32 on the CPU.

        Further arguments as for `batches`.
        """
        indices = sample_range(start, num_samples)
        return torch.cat([x.cpu() for _, x in self.batches(indices, **settings)])


def sample_range(start: int, num_samples: int) -> range:
    """The indices start .. start + num_samples - 1; ValueError if there are no such samples."""
    count("the number of samples", num_samples, 1, LAST_INDEX)
    count("the first sample", start, 0, LAST_INDEX + 1 - num_samples)
    return range(start, start + num_samples)
