"""python -m ddpm_fast.train --data DIR --out RUN: train a DDPM."""

from __future__ import annotations

import argparse
import csv
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import __version__, cli
from .checkpoint import save_model
from .data import load_dataset
from .device import resolve_device, resolve_dtype
from .files import replacing
from .images import is_picture, to_uint8, write_grid
from .sampler import Sampler
from .train_options import initial_model, parser
from .training import Trainer, TrainSettings

LOG = ("step", "loss", "lr", "images_per_second", "seconds")
LOG_EVERY = 50
FILES = ("checkpoint.safetensors", "model.safetensors", "log.csv")


class Run:
    """A training run's folder: checkpoint.safetensors, model.safetensors, log.csv, samples/."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer) -> None:
        self.args, self.trainer, self.out = args, trainer, Path(args.out)
        self.stop_signal: int | None = None
        self.seconds, self.first = 0.0, 0
        self.losses: list[torch.Tensor] = []
        self.writer = None

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def start(self) -> None:
        """Open the folder; ValueError if that would lose a run, or there is none to go on with."""
        if self.args.resume:
            if not self.checkpoint.is_file():
                raise ValueError(f"--resume: there is no {self.checkpoint} to go on from")
            progress = self.trainer.load(self.checkpoint)
            self.seconds, self.first = progress.get("seconds", 0.0), self.trainer.step_count
            self.losses = [torch.tensor(loss) for loss in progress.get("losses", [])]
        elif any((self.out / name).exists() for name in FILES):
            raise ValueError(
                f"{self.out} already holds a training run: add --resume to go on with it, "
                f"or give another --out"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        self._trim_log()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.first + 1)

    def _trim_log(self) -> None:
        """Begin log.csv, or drop what lies behind the checkpoint: those steps are done again."""
        path, rows = self.out / "log.csv", []
        if self.first and path.exists():
            with path.open(newline="") as file:
                rows = [r for r in csv.reader(file) if len(r) == len(LOG) and r[0].isdigit()]
        with replacing(path) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([LOG, *(r for r in rows if int(r[0]) <= self.first)])

    def _diverged(self) -> RuntimeError:
        kept = f"; {self.checkpoint} holds the last good state" if self.checkpoint.exists() else ""
        return RuntimeError(
            f"the loss or the weights are not finite by step {self.trainer.step_count}: lower --lr,"
            f" or use --dtype float32{kept}"
        )

    def log(self, rate: float) -> float:
        """Average the losses since the last call into the log; returns that average.

        Raises RuntimeError if it is not finite.
        """
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        if not math.isfinite(loss):
            raise self._diverged()
        step, lr = self.trainer.step_count, self.trainer.optimizer.param_groups[0]["lr"]
        row = (step, f"{loss:.6f}", f"{lr:.3e}", f"{rate:.1f}", f"{self.seconds:.0f}")
        with (self.out / "log.csv").open("a", newline="") as file:
            csv.writer(file).writerow(row)
        if self.writer:
            self.writer.add_scalar("loss", loss, step)
        return loss

    def save(self) -> None:
        """The checkpoint, with the losses not logged yet, and the model to sample from.

        Raises RuntimeError, and leaves the old ones, if anything in them is not finite.
        """
        losses = [loss.item() for loss in self.losses]
        if not all(map(math.isfinite, losses)) or not self.trainer.is_finite():
            raise self._diverged()
        self.trainer.save(self.checkpoint, {"seconds": self.seconds, "losses": losses})
        model = self.trainer.averaged()
        model.provenance = self.provenance()
        save_model(self.out / "model.safetensors", model)

    def provenance(self) -> dict[str, Any]:
        """How the model was made, for its file."""
        start = self.trainer.model
        trained_before = {"from": {**start.provenance, "sha256": start.sha256}}
        return {
            "command": ["python", "-m", "ddpm_fast.train", *self.args.command],
            **(trained_before if start.sha256 else {}),
            **({"conventions": start.conventions} if start.conventions else {}),
            "data": self.trainer.data.checksums,
            "step": self.trainer.step_count,
            "seconds": round(self.seconds),
            "ddpm_fast": __version__,
            "torch": torch.__version__,
        }

    def sample(self) -> None:
        """A grid of 64 samples of the averaged weights, by at most 50 steps of DDIM.

        A grid that fails (memory, disk, an early model that overflows, a schedule that DDIM cannot
        begin with) does not end the training.
        """
        model = self.trainer.averaged()
        if not is_picture(model.config.sample_shape):
            return
        steps = min(50, model.schedule.num_timesteps)
        always = model.config.num_classes is not None and model.config.null_class == "none"
        classes = [*range(model.config.num_classes)] if always else None
        folder = self.out / "samples"
        try:
            sampler = Sampler.from_model(model, method="ddim", steps=steps)
            x = sampler.sample(64, classes=classes, batch_size=16)
            folder.mkdir(exist_ok=True)
            with replacing(folder / f"{self.trainer.step_count:07d}.png") as partial:
                write_grid(partial, to_uint8(x))
        except (ValueError, RuntimeError, OSError) as error:
            tqdm.write(f"no sample grid: {error}", file=sys.stderr)

    def train(self) -> int:
        """Until the last step or a signal; saves before it returns the exit status."""
        t, args = self.trainer, self.args
        began, before = time.perf_counter(), self.seconds
        with tqdm(
            total=t.settings.steps, initial=t.step_count, disable=args.quiet, unit="step"
        ) as bar:
            while t.step_count < t.settings.steps and self.stop_signal is None:
                self.losses.append(t.step())
                bar.update()
                self.seconds = before + time.perf_counter() - began
                if t.step_count % LOG_EVERY == 0 or t.step_count == t.settings.steps:
                    images = (t.step_count - self.first) * t.settings.batch_size
                    rate = images / (self.seconds - before)
                    bar.set_postfix_str(f"loss {self.log(rate):.4f}, {rate:.0f} images/s")
                if args.save_every and t.step_count % args.save_every == 0:
                    self.save()
                if args.sample_every and t.step_count % args.sample_every == 0:
                    self.sample()
        self.save()
        if self.writer:
            self.writer.close()
        return 0 if self.stop_signal is None else 128 + self.stop_signal


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    if min(args.save_every, args.sample_every) < 0:
        raise ValueError("--save-every and --sample-every must be 0 or more")
    settings = TrainSettings(**{f.name: getattr(args, f.name) for f in fields(TrainSettings)})
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    data = load_dataset(args.data, args.size)
    model = initial_model(args, data, device)
    print(*model.conventions, sep="\n", end="\n" if model.conventions else "")
    run = Run(args, Trainer(model, data, settings, dtype))
    run.start()
    labels_are_lost = data.labels is not None and model.config.num_classes is None
    if args.model and labels_are_lost and not args.unconditional:
        print(f"{args.model} has no classes: the labels are not used")
    parameters = sum(p.numel() for p in model.unet.parameters())
    print(
        f"{len(data)} samples of {tuple(data.samples.shape[1:])}, {parameters:,} parameters, "
        f"{device}, {str(dtype).removeprefix('torch.')}"
    )
    with _stopped_by_signals(run):
        status = run.train()
    word, place = "stopped" if status else "done", run.out / "model.safetensors"
    print(f"{word} at step {run.trainer.step_count} of {settings.steps}: {place}")
    return status


@contextmanager
def _stopped_by_signals(run: Run) -> Iterator[None]:
    """Let the interrupt and the end of a job (SIGTERM) end the step in progress, and no sooner."""

    def stop(number: int, frame: object) -> None:
        run.stop_signal = number

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(cli.run(main, "ddpm_fast.train"))
