"""The reverse process: a network, a plan and the fused step, eager or captured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ops
from .arguments import real
from .checkpoint import Model
from .graphs import CapturedStep
from .plan import Plan, make_plan
from .schedule import NoiseSchedule

Network = Callable[..., Tensor]
Step = Callable[[], None]
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 256}


class Loop:
    """The buffers of one batch, and the step that advances them; nothing in it waits on the host.

    `step` is what is captured: the network and the update, with the row counter on the device.
    """

    def __init__(self, sampler: Sampler, batch_size: int, conditional: bool) -> None:
        device, self.sampler, self.batch_size = sampler.device, sampler, batch_size
        self.x = torch.empty(batch_size, *sampler.sample_shape, device=device)
        self.row = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.seed = torch.zeros_like(self.row)
        self.index = torch.zeros_like(self.row)
        self.status = torch.zeros(4, dtype=torch.int32, device=device)
        self.guidance = torch.ones(1, device=device) if sampler.guided else None
        copies = 2 if sampler.guided else 1
        self.labels = torch.zeros(copies * batch_size, dtype=torch.int64, device=device)
        self.conditions = {"class_labels": self.labels} if conditional else {}

    def start(self, seed: int, index: Tensor, labels: Tensor | None) -> None:
        """Draw x_T of the samples `index` and go back to the first row."""
        sampler = self.sampler
        self.seed.fill_(_as_int64(seed))
        self.index.copy_(index)
        self.row.zero_()
        self.status.zero_()
        if labels is not None:
            self.labels[: self.batch_size].copy_(labels)
        if self.guidance is not None:
            self.guidance.fill_(sampler.guidance_scale)
            self.labels[self.batch_size :].fill_(sampler.null_class)
        shape = list(sampler.sample_shape)
        self.x.copy_(ops.randn(self.seed, self.index, shape, backend=sampler.backend))

    def step(self) -> None:
        """One row of the plan for the whole batch."""
        sampler = self.sampler
        x = self.x if self.guidance is None else torch.cat((self.x, self.x))
        t = sampler.timesteps.index_select(0, self.row)
        t = t if self.guidance is None else torch.cat((t, t))
        memory = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        output = sampler.network(x.to(sampler.dtype, memory_format=memory), t, **self.conditions)
        ops.p_sample_step_(
            self.x,
            output,
            sampler.plan.coefficients,
            sampler.plan.index,
            self.row,
            self.seed,
            self.index,
            guidance_scale=self.guidance,
            status=self.status,
            backend=sampler.backend,
        )
        self.row.add_(1)


class Sampler:
    """Samples a trained DDPM.

    Args:
        network: any callable (x_t, t, **conditions) -> prediction, x_t (N, C, *size) of `dtype`
            and t (N,) int64 on `device`; ours or a host project's.
        schedule: the noise schedule that it was trained with.
        sample_shape: (C, *size) of one sample.
        method, steps, spacing, eta, prediction_type, variance_type, clip_denoised: see
            `plan.make_plan`.
        dtype: of the network's input; the state stays float32.
        backend: of the fused step: auto, cpu, cuda, triton or reference.
        guidance_scale: W of eps = uncond + W * (cond - uncond) (Ho and Salimans 2022,
            arXiv:2207.12598, with W = 1 + w); 1 is off. Needs `null_class`.
        null_class: the label that means "no class".
        graphs: capture the step in a CUDA graph. On a CPU there is nothing to capture.
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
        guidance_scale: float = 1.0,
        null_class: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        graphs: bool = False,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.network, self.sample_shape = network, tuple(sample_shape)
        plan = make_plan(
            schedule, method, steps, spacing, eta, prediction_type, variance_type, clip_denoised
        )
        self.plan: Plan = plan.to(self.device)
        self.timesteps = self.plan.index[:, 0].long()
        self.graphs = graphs and self.device.type == "cuda"
        # Only compiled kernels can be captured, so asking for graphs is asking for them.
        wanted = "cuda" if self.graphs and backend == "auto" else backend
        self.backend, self.backend_reason = ops.resolve_backend(self.device, wanted)
        self.guidance_scale, self.null_class = real("guidance", guidance_scale), null_class
        self.guided = self.guidance_scale != 1.0
        if self.guided and null_class is None:
            raise ValueError(
                f"guidance {guidance_scale} needs a class-conditional model with a null class, "
                f"and this one has none: leave guidance at 1"
            )
        self.num_classes: int | None = None
        self._free_loops: dict[tuple[int, bool], list[tuple[Loop, Step]]] = {}

    @classmethod
    def from_model(
        cls,
        model: Model,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        variance_type: str | None = None,
        **settings: object,
    ) -> Sampler:
        """A sampler of a loaded model, its network prepared for `dtype` on `device`.

        variance_type: overrides the checkpoint's; the rest as for `Sampler`.
        """
        config = model.config
        device = torch.device(device or next(model.unet.parameters()).device)
        null = config.num_classes if config.null_class != "none" else None
        sampler = cls(
            prepare(model.unet, device, dtype),
            model.schedule,
            config.sample_shape,
            prediction_type=model.prediction_type,
            variance_type=variance_type or model.variance_type,
            null_class=null,
            device=device,
            dtype=dtype,
            **settings,
        )
        sampler.num_classes = config.num_classes
        return sampler

    def check(
        self,
        num_samples: int,
        seed: int,
        start: int,
        batch_size: int,
        classes: Sequence[int] | None,
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
        if free:
            loop, step = free.pop()
        else:
            loop = Loop(self, size, conditional)
            step = CapturedStep(loop.step, self.device) if self.graphs else loop.step
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
        progress: bool = False,
        callback: Callable[[Tensor, int, Tensor], None] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (sample indices (B,), x_0 (B, C, *size) float32 in [-1, 1]) batch by batch.

        Args:
            num_samples, start: the samples start .. start + num_samples - 1 of the seed. Sample i
                has the same noise whatever the others are.
            batch_size: how many are computed at once; a last, partial batch is padded.
            classes: sample i is of class classes[i % len(classes)]; None is no class.
            callback: called as (sample indices, steps done, x_t) before the first step and after
                each; the samples past the end of the run are cut off.
        """
        if batch_size is None:
            batch_size = self.default_batch_size(num_samples)
        self.check(num_samples, seed, start, batch_size, classes)
        bar = tqdm(
            total=-(-num_samples // batch_size) * self.plan.num_steps,
            disable=not progress,
            unit="step",
        )
        conditional = self.labels(torch.zeros(1, dtype=torch.int64), classes) is not None
        with bar, self._borrowed_loop(batch_size, conditional) as (loop, step):
            for first in range(start, start + num_samples, batch_size):
                kept = min(batch_size, start + num_samples - first)
                index = torch.arange(first, first + batch_size)
                loop.start(seed, index, self.labels(index, classes))
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
        if code:
            raise RuntimeError(
                f"sample {int(loop.index[position])} has a value that is not finite after step "
                f"{row + 1} of {self.plan.num_steps}: the network's weights are broken, or it "
                f"overflows in {str(self.dtype).removeprefix('torch.')} (try float32)"
            )


def prepare(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of the network for sampling: on `device`, in `dtype`, channels_last, in eval mode."""
    network = copy.deepcopy(unet).to(device, dtype).eval().requires_grad_(False)
    if any(p.ndim == 4 for p in network.parameters()):
        network.to(memory_format=torch.channels_last)
    return network


def _as_int64(seed: int) -> int:
    """The signed number of the same 64 bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
