"""The options of python -m ddpm_fast.sample, and the sampler that they ask for."""

from __future__ import annotations

import argparse

import torch

from .backend import NAMES
from .checkpoint import Model
from .device import DTYPES, resolve_dtype
from .methods import METHODS
from .sampler import STEPS_PER_GRAPH, Sampler
from .spacing import SPACINGS

GRAPHS = {"on": True, "off": False, "auto": "auto"}


def _steps(text: str) -> int | str:
    """A number, or what has a name, as OpenAI's sections ("10,15,20") or stride ("ddim50")."""
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
    p.add_argument(
        "--graphs",
        nargs="?",
        choices=GRAPHS,
        const="on",
        default="off",
        help="capture the step in a CUDA graph; auto: where that can be done",
    )
    p.add_argument("--steps-per-graph", type=_steps, default=STEPS_PER_GRAPH, help='or "all"')
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    p.add_argument("--threads", type=int, help="of a process; default: the cores, shared out")
    p.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the network")
    p.add_argument("--backend", choices=NAMES, default="auto", help="of the fused step")
    p.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU: the network's layers packed and fused, or as they were trained",
    )
    p.add_argument("--out", default="samples", help="folder for the results, or an fsspec URL")
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


def make_sampler(args: argparse.Namespace, model: Model, device: torch.device) -> Sampler:
    return Sampler.from_model(
        model,
        dtype=resolve_dtype(args.dtype, device),
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
        graphs=GRAPHS[args.graphs],
        steps_per_graph=args.steps_per_graph,
        fused=args.fused,
    )
