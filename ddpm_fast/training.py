"""The training step: everything random in it is a function of (seed, step), so a run resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .arguments import count, one_of, real, shown
from .checkpoint import CheckpointError, Model, read_tensors, write_tensors
from .data import Dataset
from .device import memory_format

FORMAT = "ddpm_fast.training.1"
LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class TrainSettings:
    """What decides a run's losses, beside the model and the data.

    steps, warmup: updates. lr: the peak of AdamW's. lr_schedule: "constant" or "cosine". ema: decay
    of the averaged weights, in [0, 1]. clip_grad: largest gradient norm. null_probability: share
    of the labels replaced by the null class. flip: mirror half of the samples. seed: 0..2^63 - 1.
    Raises ValueError, in one sentence, for values outside their range.
    """

    steps: int = 100_000
    batch_size: int = 128
    lr: float = 2e-4
    lr_schedule: str = "constant"
    warmup: int = 5000
    weight_decay: float = 0.0
    ema: float = 0.9999
    clip_grad: float = 1.0
    null_probability: float = 0.1
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 2**40),
            ("batch_size", 1, 2**20),
            ("warmup", 0, 2**40),
            ("seed", 0, 2**63 - 1),
        ):
            count(name, getattr(self, name), low, high)
        for name, high in (("weight_decay", math.inf), ("ema", 1.0), ("null_probability", 1.0)):
            real(name, getattr(self, name), 0.0, high)
        for name in ("lr", "clip_grad"):
            if real(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        one_of("lr_schedule", self.lr_schedule, LR_SCHEDULES)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up; then constant, or down to zero along half a cosine."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def ema_decay(self, step: int) -> float:
        """Short memory at first, so that the average forgets the initial weights."""
        return min(self.ema, (1 + step) / (10 + step))


class Trainer:
    """Optimises `model.unet` on `data`; `step()` is one update and returns the loss (a tensor).

    The loss is Ho et al. 2020, equation 14, on the model's prediction type. dtype: of the network's
    autocast. Raises ValueError if model and data do not fit each other.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        settings: TrainSettings,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_fit(model, data)
        self.model, self.data, self.settings, self.dtype = model, data, settings, dtype
        self.device = next(model.unet.parameters()).device
        self.unet = model.unet.train().requires_grad_(True)
        self.order = memory_format(self.device, dtype, 1 + len(model.config.sample_shape))
        self.unet.to(memory_format=self.order)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        for parameter in self.unet.parameters():  # as AdamW would at its first step
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.ema = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}
        self.step_count = 0
        schedule = model.schedule
        table = np.stack((schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod), 1)
        self.table = torch.from_numpy(table).float().to(self.device)
        self._order: tuple[int, Tensor] | None = None

    def _indices(self, first: int, count: int) -> Tensor:
        """Entries first..first+count of the endless sequence of shuffled epochs."""
        parts, size = [], len(self.data)
        while count:
            epoch, position = divmod(first, size)
            if self._order is None or self._order[0] != epoch:
                bits = np.random.Philox(key=[self.settings.seed, epoch], counter=[0, 0, 0, 1])
                order = np.random.Generator(bits).permutation(size)
                self._order = epoch, torch.from_numpy(order)
            parts.append(self._order[1][position : position + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x_start, timesteps, class labels and sample indices of the current step."""
        s, n = self.settings, self.settings.batch_size
        first = self.step_count * n
        x_start, labels = self.data.batch(self._indices(first, n))
        if self.model.config.num_classes is None:
            labels = None
        rng = np.random.Generator(np.random.Philox(key=[s.seed, self.step_count]))
        t = torch.from_numpy(rng.integers(0, self.model.schedule.num_timesteps, n))
        if labels is not None and self.model.config.null_class != "none":
            dropped = torch.from_numpy(rng.random(n) < s.null_probability)
            labels = labels.masked_fill(dropped, self.model.config.num_classes)
        if s.flip:
            flipped = torch.from_numpy(rng.random(n) < 0.5).view(n, *[1] * (x_start.ndim - 1))
            x_start = torch.where(flipped, x_start.flip(-1), x_start)
        index = torch.arange(first, first + n)
        move = [None if v is None else v.to(self.device) for v in (x_start, t, labels, index)]
        return tuple(move)

    def loss(self) -> Tensor:
        """The current step's loss, a scalar with its graph."""
        x_start, t, labels, index = self.batch()
        seed = torch.full_like(index, self.settings.seed)
        x_t, noise = ops.q_sample(x_start, self.table, t, seed, index)
        x_t = x_t.contiguous(memory_format=self.order)
        low = self.dtype != torch.float32
        with self._dropout_seed(), torch.autocast(self.device.type, self.dtype, enabled=low):
            output = self.unet(x_t, t) if labels is None else self.unet(x_t, t, labels)
        target = {"epsilon": noise, "sample": x_start}.get(self.model.prediction_type)
        if target is None:  # v, Salimans and Ho 2022 (arXiv:2202.00512), appendix D
            alpha, sigma = self.table[t].view(-1, 2, *[1] * (noise.ndim - 1)).unbind(1)
            target = alpha * noise - sigma * x_start
        return (output.float() - target).square().mean()

    @contextmanager
    def _dropout_seed(self) -> Iterator[None]:
        """Dropout is drawn by torch's generator: seeded by the step here, and given back after."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.model.config.dropout > 0):
            if self.model.config.dropout > 0:
                words = np.random.SeedSequence((self.settings.seed, self.step_count))
                torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))
            yield

    def step(self) -> Tensor:
        """One update of the weights and of their average."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate(self.step_count)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), s.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        weights = self.unet.state_dict()
        decay = s.ema_decay(self.step_count)
        torch._foreach_lerp_(list(self.ema.values()), [weights[k] for k in self.ema], 1 - decay)
        self.step_count += 1
        return loss.detach()

    def averaged(self) -> Model:
        """The model with the averaged weights, which are the ones to sample from."""
        with torch.device("meta"):
            unet = type(self.unet)(self.model.config)
        unet.load_state_dict({k: v.clone() for k, v in self.ema.items()}, assign=True)
        unet.eval().requires_grad_(False)
        return replace(self.model, unet=unet, name="", sha256="")

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on from a checkpoint."""
        settings = asdict(self.settings)
        if self.settings.lr_schedule == "constant":  # then a run may be prolonged
            del settings["steps"]
        return {
            "settings": settings,
            "model": self.model.sha256 or None,
            "unet": self.model.config.to_dict(),
            "schedule": self.model.schedule.config(),
            "prediction_type": self.model.prediction_type,
            "data": self.data.checksums,
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes with a step, under the names that it is saved by."""
        tensors = {f"model.{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, parameter in self.unet.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {f"{k}.{name}": state[k] for k in ("exp_avg", "exp_avg_sq")}
        return tensors

    def is_finite(self) -> bool:
        """Whether no weight, average or moment is NaN or infinite; waits for the device."""
        return all(bool(v.isfinite().all()) for v in self._tensors().values())

    def save(self, path: Path, progress: dict[str, Any]) -> None:
        """Everything needed to go on, and `progress` (JSON-able), in one file, whole or not at all.

        Raises OSError if it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "step": str(self.step_count),
            "identity": json.dumps(self.identity()),
            "progress": json.dumps(progress),
        }
        write_tensors(path, self._tensors(), metadata)

    @torch.no_grad()
    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint of the same run; returns the progress saved with it.

        Raises CheckpointError, in one sentence, if the file is damaged or of another run; the
        trainer is then as it was.
        """
        tensors, metadata = read_tensors(path, "training checkpoint")
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a training checkpoint of ddpm_fast")
        try:
            step = count("step", int(metadata["step"]), 0, 2**40)
            saved, progress = (json.loads(metadata[k]) for k in ("identity", "progress"))
            if not isinstance(saved, dict) or not isinstance(progress, dict):
                raise ValueError("identity and progress must be dicts")
        except (KeyError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has damaged metadata: {shown(error)}") from None
        mine = json.loads(json.dumps(self.identity()))
        for part in mine:
            if saved.get(part) != mine[part]:
                raise CheckpointError(
                    f"{path} was made with other {part} ({_difference(saved.get(part), mine[part])}"
                    f"): resume with the same, or start a new run elsewhere"
                )
        wanted = self._tensors()
        for name, value in wanted.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise CheckpointError(f"{path} is damaged: {name} is missing or of another shape")
        for name, value in wanted.items():
            value.copy_(tensors[name])
        for parameter in self.unet.parameters():
            self.optimizer.state[parameter]["step"].fill_(step)
        self.step_count = step
        return progress


def _check_fit(model: Model, data: Dataset) -> None:
    config = model.config
    if tuple(data.samples.shape[1:]) != config.sample_shape:
        raise ValueError(
            f"the model is for samples of {config.sample_shape}, and the data's are "
            f"{tuple(data.samples.shape[1:])}"
        )
    if config.num_classes is not None and (data.num_classes or 0) > config.num_classes:
        raise ValueError(
            f"the model has {config.num_classes} classes, and the data {data.num_classes}"
        )
    if config.num_classes is not None and data.labels is None:
        raise ValueError(f"the model has {config.num_classes} classes, and the data no labels")
    if config.learn_sigma:
        raise ValueError("a model with learned variance can be sampled, but not trained")


def _difference(saved: Any, mine: Any) -> str:
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = [k for k in sorted(saved.keys() | mine.keys()) if saved.get(k) != mine.get(k)]
        pairs = [(f"{k}: ", saved.get(k), mine.get(k)) for k in keys]
    else:
        pairs = [("", saved, mine)]
    return ", ".join(f"{k}{shown(there)} there, {shown(now)} now" for k, there, now in pairs)
