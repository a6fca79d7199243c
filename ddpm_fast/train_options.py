"""The training command's options, and the model that they make."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from . import cli
from .checkpoint import Model, load_model
from .data import Dataset
from .schedule import PREDICTION_TYPES, NoiseSchedule
from .training import LR_SCHEDULES, TrainSettings
from .unet import UNet
from .unet_config import UNetConfig

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(v) for v in text.split(",") if v)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted numbers like 1,2,2, got {text!r}") from None


class _OfNewNetwork(argparse.Action):
    """Stores the value and that it was given: a model to go on from has its own."""

    def __call__(self, parser: Any, args: Any, values: Any, option: str | None = None) -> None:
        setattr(args, self.dest, values)
        args.of_new_network = option


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ddpm_fast.train",
        description="Train a DDPM (Ho et al. 2020) on images or series.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", required=True, help="IDX files, a folder of images, or an npz")
    p.add_argument("--out", required=True, help="folder for checkpoints, log and sample grids")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--size", type=cli.size, help="scale and crop a folder's images to HxW")
    p.add_argument("--unconditional", action="store_true", help="ignore the data's labels")
    p.add_argument("--model", help="train this one further, not a new one; as of ddpm_fast.sample")
    p.set_defaults(of_new_network=None)

    group = p.add_argument_group("a new network, where there is no --model")
    new = partial(group.add_argument, action=_OfNewNetwork)
    new("--base-channels", type=int, default=64)
    new("--channel-mult", type=_numbers, default=(1, 2, 2), help="one per level")
    new("--num-res-blocks", type=int, default=2)
    new("--attention", type=_numbers, default=(), help="levels with attention, from 0")
    new("--num-heads", type=int, default=1)
    new("--norm-groups", type=int, default=32)
    new("--dropout", type=float, default=0.1)
    new("--schedule", choices=SCHEDULES, default="linear")
    new("--timesteps", type=int, default=1000, help="T")
    new("--prediction", choices=PREDICTION_TYPES, default="epsilon")

    run = p.add_argument_group("optimisation")
    defaults = {f.name: f.default for f in fields(TrainSettings)}
    for name, text in (
        ("steps", "updates in all"),
        ("batch_size", "samples per update"),
        ("lr", "peak learning rate of AdamW"),
        ("warmup", "updates of linear warm-up"),
        ("weight_decay", "of AdamW"),
        ("ema", "decay of the averaged weights"),
        ("clip_grad", "largest gradient norm"),
        ("null_probability", "share of labels replaced by the null class, if there is one"),
        ("seed", "of everything random"),
    ):
        option, default = f"--{name.replace('_', '-')}", defaults[name]
        run.add_argument(option, type=type(default), default=default, help=text)
    run.add_argument("--lr-schedule", choices=LR_SCHEDULES, default="constant")
    run.add_argument("--flip", action="store_true", help="mirror half of the samples")

    machine = p.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    machine.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    machine.add_argument("--save-every", type=int, default=1000, help="updates; 0 is at the end")
    machine.add_argument("--sample-every", type=int, default=5000, help="updates; 0 is never")
    machine.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def initial_model(args: argparse.Namespace, data: Dataset, device: torch.device) -> Model:
    """What the training starts from: --model, or new weights; ValueError if they make none."""
    if args.model is None:
        return _new_model(args, data, device)
    if args.of_new_network:
        raise ValueError(
            f"{args.of_new_network} is for a new network, and --model brings its own: give one of "
            f"the two"
        )
    model = load_model(args.model, device)
    if args.unconditional and model.config.num_classes is not None:
        raise ValueError(
            f"--unconditional: {args.model} has {model.config.num_classes} classes, and goes on "
            f"with them; leave it out, or train a new network"
        )
    return model


def _new_model(args: argparse.Namespace, data: Dataset, device: torch.device) -> Model:
    """An untrained model of the arguments for the data; ValueError if they make none."""
    if any(not 0 <= level < len(args.channel_mult) for level in args.attention):
        raise ValueError(
            f"--attention names levels 0 to {len(args.channel_mult) - 1}, got {args.attention}"
        )
    classes = None if args.unconditional else data.num_classes
    config = UNetConfig(
        in_channels=data.samples.shape[1],
        sample_size=tuple(data.samples.shape[2:]),
        base_channels=args.base_channels,
        channel_mult=args.channel_mult,
        num_res_blocks=args.num_res_blocks,
        attention_levels=tuple(i in args.attention for i in range(len(args.channel_mult))),
        num_heads=args.num_heads,
        norm_groups=args.norm_groups,
        dropout=args.dropout,
        num_classes=classes,
        null_class="row" if classes else "none",
    )
    torch.manual_seed(args.seed)
    schedule = getattr(NoiseSchedule, args.schedule)(args.timesteps)
    return Model(UNet(config).to(device), schedule, args.prediction)
