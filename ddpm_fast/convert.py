"""python -m ddpm_fast.convert IN OUT: read any checkpoint, write ours or a diffusers folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import cli
from .checkpoint import Model, load_model, save_model
from .device import DTYPES
from .families import diffusers_writer
from .families.reading import COUNTS, HINTS, OPTIONS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ddpm_fast.convert",
        description="Read a checkpoint of any known family and write it as ours, or for diffusers.",
    )
    p.add_argument("input", metavar="IN", help="as --model of ddpm_fast.sample")
    p.add_argument("output", metavar="OUT", help="a .safetensors file, or a folder for diffusers")
    p.add_argument("--to", choices=("ddpm_fast", "diffusers"), default="ddpm_fast")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights")
    p.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    p.add_argument("--quiet", action="store_true", help="print errors only")
    group = p.add_argument_group(
        "what the checkpoint does not tell", "default: what its code base publishes"
    )
    for name, text in HINTS.items():
        option = "--" + name.replace("_", "-")
        if name == "image_size":
            group.add_argument(option, type=cli.size, metavar="HxW", help=text)
        elif name in COUNTS:
            group.add_argument(option, type=int, help=text)
        elif name == "rescale_timesteps":
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(option, choices=OPTIONS.get(name), help=text)
    return p


def check_output(path: Path, to: str, overwrite: bool) -> None:
    """ValueError if writing to `path` would lose something, or leave what is not asked for."""
    if to == "ddpm_fast":
        if path.is_dir() or path.suffix != ".safetensors":
            raise ValueError(f"OUT must be the path of a .safetensors file, got {str(path)!r}")
        taken = path.exists()
    else:
        if path.exists() and not path.is_dir():
            raise ValueError(f"OUT must be a folder for diffusers, and {path} is a file")
        taken = path.is_dir() and any(path.iterdir())
    if taken and not overwrite:
        raise ValueError(f"{path} is there already: give another OUT, or --overwrite")


def write(path: Path, model: Model, to: str, dtype: str) -> list[str]:
    """Write the model; returns sentences about it."""
    if to == "ddpm_fast":
        save_model(path, model, DTYPES[dtype])
        return []
    return diffusers_writer.write(
        path,
        model.unet,
        model.schedule,
        model.prediction_type,
        model.variance_type,
        model.clip_denoised,
        DTYPES[dtype],
    )


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    output = Path(args.output)
    check_output(output, args.to, args.overwrite)
    model = load_model(args.input, **{name: getattr(args, name) for name in HINTS})
    notes = model.conventions + write(output, model, args.to, args.dtype)
    if not args.quiet:
        for sentence in notes:
            print(sentence)
        number = sum(p.numel() for p in model.unet.parameters())
        print(f"{output}: {number:,} parameters in {args.dtype}, for {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, "ddpm_fast.convert"))
