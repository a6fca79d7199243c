"""The training step: everything random in it is a function of (seed, step), so a run resumes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .checkpoint import CheckpointError, Model, read_tensors, write_tensors
from .data import Dataset

FORMAT = "ddpm_fast.training.1"


@dataclass(frozen=True)
class TrainSettings:
    """What decides a run's losses, beside the model and the data."""

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

    The loss is Ho et al. 2020, equation 14, on the model's prediction type.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        settings: TrainSettings,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        self.model, self.data, self.settings, self.dtype = model, data, settings, dtype
        self.device = next(model.unet.parameters()).device
        self.unet = model.unet.train().requires_grad_(True)
        if model.config.dims == 2:
            self.unet.to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.unet) if compile else self.unet
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
        )
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
        rng = np.random.Generator(np.random.Philox(key=[s.seed, self.step_count]))
        t = torch.from_numpy(rng.integers(0, self.model.schedule.num_timesteps, n))
        if labels is not None and self.model.config.null_class != "none":
            dropped = torch.from_numpy(rng.random(n) < s.null_probability)
            labels = labels.masked_fill(dropped, self.model.config.num_classes)
        if s.flip:
            flipped = torch.from_numpy(rng.random(n) < 0.5).view(n, *[1] * (x_start.ndim - 1))
            x_start = torch.where(flipped, x_start.flip(-1), x_start)
        if self.model.config.num_classes is None:
            labels = None
        index = torch.arange(first, first + n)
        move = [None if v is None else v.to(self.device) for v in (x_start, t, labels, index)]
        return tuple(move)

    def loss(self) -> Tensor:
        x_start, t, labels, index = self.batch()
        seed = torch.full_like(index, self.settings.seed)
        x_t, noise = ops.q_sample(x_start, self.table, t, seed, index)
        if x_t.ndim == 4:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=low):
            output = self.forward(x_t, t) if labels is None else self.forward(x_t, t, labels)
        target = {"epsilon": noise, "sample": x_start}.get(self.model.prediction_type)
        if target is None:  # v, Salimans and Ho 2022 (arXiv:2202.00512), appendix D
            alpha, sigma = self.table[t].view(-1, 2, *[1] * (noise.ndim - 1)).unbind(1)
            target = alpha * noise - sigma * x_start
        return (output.float() - target).square().mean()

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
        unet = type(self.unet)(self.model.config).to(self.device)
        unet.load_state_dict(self.ema)
        unet.eval().requires_grad_(False)
        m = self.model
        return Model(unet, m.schedule, m.prediction_type, m.variance_type, m.provenance)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on from a checkpoint."""
        return {
            "settings": asdict(self.settings),
            "unet": self.model.config.to_dict(),
            "schedule": self.model.schedule.config(),
            "prediction_type": self.model.prediction_type,
            "data": self.data.checksums,
        }

    def save(self, path: Path, progress: dict[str, Any]) -> None:
        """Everything needed to go on, in one file, written whole or not at all."""
        tensors = {f"model.{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, parameter in self.unet.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{k}.{name}": v for k, v in state.items() if k != "step"}
        metadata = {
            "format": FORMAT,
            "step": str(self.step_count),
            "identity": json.dumps(self.identity()),
            "progress": json.dumps(progress),
        }
        write_tensors(path, tensors, metadata)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint of the same run; returns the progress saved with it."""
        tensors, metadata = read_tensors(path, "training checkpoint")
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a training checkpoint of ddpm_fast")
        saved, mine = json.loads(metadata["identity"]), json.loads(json.dumps(self.identity()))
        for part in mine:
            if saved.get(part) != mine[part]:
                raise CheckpointError(
                    f"{path} was made with other {part} ({_difference(saved.get(part), mine[part])}"
                    f"): resume with the same, or start a new run elsewhere"
                )
        self.step_count = int(metadata["step"])
        self.unet.load_state_dict({k: tensors[f"model.{k}"] for k in self.ema})
        for key, value in self.ema.items():
            value.copy_(tensors[f"ema.{key}"])
        for name, parameter in self.unet.named_parameters():
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step_count)),
                    "exp_avg": torch.empty_like(parameter).copy_(tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"exp_avg_sq.{name}"]),
                }
        return json.loads(metadata.get("progress", "{}"))


def _difference(saved: Any, mine: Any) -> str:
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = [k for k in sorted(saved.keys() | mine.keys()) if saved.get(k) != mine.get(k)]
        return ", ".join(f"{k}: {saved.get(k)!r} there, {mine.get(k)!r} now" for k in keys)
    return f"{saved!r} there, {mine!r} now"
