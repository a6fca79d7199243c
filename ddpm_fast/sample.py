"""python -m ddpm_fast.sample: draw samples from a trained model."""

from __future__ import annotations

import argparse
import platform
import sys
import time

import numpy as np
import torch
from torch import Tensor

from . import __version__, cli, noise
from .backend import NAMES
from .checkpoint import Model, load_model
from .data import Dataset, load_dataset
from .device import DTYPES, device_name, resolve_device, resolve_dtype
from .methods import METHODS
from .output import Output
from .sampler import Sampler
from .spacing import SPACINGS


def _steps(text: str) -> int | str:
    """A number, or OpenAI's sections ("10,15,20") or stride ("ddim50")."""
    try:
        return int(text)
    except ValueError:
        return text


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ddpm_fast.sample",
        description="Draw samples from a trained DDPM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--model", default="mnist", help="a shipped model's name, a file, or a run")
    p.add_argument("--num-samples", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--start", type=int, default=0, help="index of the first sample of the seed")
    p.add_argument("--batch-size", type=int, help="samples computed at once")
    methods = [name for name, method in METHODS.items() if not method.inverse]
    p.add_argument("--method", choices=methods, default="ddpm")
    p.add_argument("--steps", type=_steps, help='a number, "10,15,20" or "ddim50"; default: all')
    p.add_argument("--spacing", choices=SPACINGS, help="of a number of steps")
    p.add_argument("--steps-offset", type=int, default=0, help="of spacing leading")
    p.add_argument("--eta", type=float, default=0.0, help="ddim's noise, 0 to 1")
    p.add_argument(
        "--use-clipped-model-output",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ddim: derive eps again from the clipped pred_xstart",
    )
    p.add_argument("--init", help="img2img: images to start from, as --data of training")
    p.add_argument("--strength", type=float, help="of --init, 0 to 1: how much is drawn anew")
    p.add_argument("--class", dest="classes", help='"3", "0,1,2" or "all"; default: none asked')
    p.add_argument("--guidance", type=float, default=1.0, help="classifier-free; 1 is off")
    p.add_argument(
        "--variance", choices=("fixed_small", "fixed_large"), help="default: the model's"
    )
    p.add_argument("--no-clip", action="store_true", help="let pred_xstart leave [-1, 1]")
    p.add_argument("--graphs", action="store_true", help="capture the step in a CUDA graph")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    p.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the network")
    p.add_argument("--backend", choices=NAMES, default="auto", help="of the fused step")
    p.add_argument("--out", default="samples", help="folder for the results")
    p.add_argument("--overwrite", action="store_true", help="replace another run in --out")
    p.add_argument("--npz", action="store_true", help="also one samples_NxHxWxC.npz")
    p.add_argument("--gif", action="store_true", help="also the denoising as a moving picture")
    p.add_argument("--quiet", action="store_true", help="print errors only")
    return p


def parse_classes(text: str | None, num_classes: int | None) -> list[int] | None:
    """The class list of "--class": one number, several, or all."""
    if text is None:
        return None
    if num_classes is None:
        raise ValueError("--class was given, but this model was trained without classes")
    if text == "all":
        return list(range(num_classes))
    try:
        return [int(v) for v in text.split(",")]
    except ValueError:
        raise ValueError(
            f'--class wants a number, several ("0,1,2") or "all", got {text!r}'
        ) from None


def first_images(data: Dataset, start: int, num_samples: int) -> Tensor:
    """x_start of the samples from start on: image i modulo their number for sample i."""
    indices = torch.tensor([(start + i) % len(data) for i in range(num_samples)], dtype=torch.int64)
    return data.batch(indices)[0]


def record(
    args: argparse.Namespace,
    model: Model,
    sampler: Sampler,
    classes: list[int] | None,
    init: Dataset | None,
) -> dict:
    """run.json: what decides the pictures, and what can change a last bit of them."""
    decides = {
        "model_sha256": model.sha256,
        "conventions": model.conventions,
        "schedule": model.schedule.config(),
        **sampler.plan.describe(),
        "init": None if init is None else init.checksums,
        "classes": classes,
        "guidance": args.guidance,
        "seed": args.seed,
        "noise_contract": noise.VERSION,
        "dtype": str(sampler.dtype).removeprefix("torch."),
    }
    environment = {
        "batch_size": args.batch_size,
        "backend": sampler.backend,
        "backend_reason": sampler.backend_reason,
        "graphs": sampler.graphs,
        "device": str(sampler.device),
        "device_name": device_name(sampler.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "ddpm_fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    samples = {"model": model.name, "start": args.start, "num_samples": args.num_samples}
    return {"decides": decides, "samples": samples, "environment": environment}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if (args.init is None) != (args.strength is None):
        raise ValueError("--init and --strength belong together: give both, or neither")
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    say = (lambda text: None) if args.quiet else print
    model = load_model(args.model, device)
    for sentence in model.conventions:
        say(sentence)
    sampler = Sampler.from_model(
        model,
        dtype=dtype,
        method=args.method,
        steps=args.steps,
        spacing=args.spacing,
        steps_offset=args.steps_offset,
        strength=args.strength,
        eta=args.eta,
        use_clipped_model_output=args.use_clipped_model_output,
        variance_type=args.variance,
        clip_denoised=False if args.no_clip else None,
        guidance_scale=args.guidance,
        backend=args.backend,
        graphs=args.graphs,
    )
    classes = parse_classes(args.classes, sampler.num_classes)
    if args.batch_size is None:
        args.batch_size = sampler.default_batch_size(args.num_samples)
    init = None if args.init is None else load_dataset(args.init)
    x_start = None if init is None else first_images(init, args.start, args.num_samples)
    wanted = (args.num_samples, args.seed, args.start, args.batch_size, classes)
    sampler.check(*wanted, x_start=x_start)
    run = record(args, model, sampler, classes, init)
    output = Output(args, sampler.sample_shape)
    output.prepare(run)
    if args.graphs and not sampler.graphs:
        why = "nothing to capture on a CPU" if device.type == "cpu" else sampler.backend_reason
        say(f"--graphs: {why}; sampling step by step")

    def frame(index: Tensor, done: int, x: Tensor) -> None:
        output.frame(index, done, x, sampler.plan.num_steps)

    began = time.perf_counter()
    for index, x in sampler.stream(
        args.num_samples,
        seed=args.seed,
        start=args.start,
        batch_size=args.batch_size,
        classes=classes,
        x_start=x_start,
        progress=not args.quiet,
        callback=frame if args.gif else None,
    ):
        output.add(index, x)
    seconds = time.perf_counter() - began
    indices = torch.arange(args.start, args.start + args.num_samples)
    labels = None if classes is None else sampler.labels(indices, classes).numpy()
    rate = args.num_samples / seconds
    run["speed"] = {
        "seconds": round(seconds, 3),
        "of_which_capturing": round(sampler.capture_seconds, 3),
        "of_which_writing": round(output.seconds, 3),
        "images_per_second": round(rate, 3),
    }
    shown = output.finish(labels, run)
    say(f"{args.num_samples} samples in {seconds:.1f} s ({rate:.2f} images/s): {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, "ddpm_fast.sample"))
