"""python -m ddpm_fast.sample: draw samples from a trained model."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cli
from .arguments import count
from .checkpoint import load_model
from .data import Dataset, load_dataset
from .device import resolve_device
from .distributed import OthersGoneError, World
from .output import Output, frame_stride
from .progress import Progress
from .record import make_record
from .sample_options import GRAPHS, make_sampler, parse_classes, parser
from .sampler import Sampler, sample_range


def first_images(data: Dataset, index: Tensor) -> Tensor:
    """x_start of the samples `index` (B,): image i modulo their number for sample i."""
    return data.batch(index % len(data))[0]


def set_threads(threads: int | None, world: World) -> None:
    """Share the cores among the processes of this machine.

    torchrun would have each use one, and says so in the variable that can also be the user's.
    """
    alone = world.local_size == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1"
    if threads is None and not alone:
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        threads = max(1, cores // world.local_size)
    if threads is not None:
        torch.set_num_threads(count("--threads", threads, 1, 1 << 16))


@contextmanager
def one_voice(world: World) -> Iterator[None]:
    """Of a signal, which all processes get, the leader alone tells."""
    try:
        yield
    except cli.Stopped as stop:
        raise cli.Stopped(stop.number, str(stop) if world.leads else "") from None


@contextmanager
def telling(output: Output) -> Iterator[None]:
    """Let what ends the run say how much of it is there."""
    try:
        yield
    except cli.Stopped as stop:
        output.stop()
        raise cli.Stopped(stop.number, f"stopped: {output.standing()}") from None
    except OSError as error:
        output.stop()
        raise OSError(f"{error.strerror or error}: {output.standing()}") from error
    except OthersGoneError as error:
        raise OthersGoneError(f"{error}: {output.standing()}") from None


def missing_samples(
    output: Output, world: World, run: dict[str, Any], overwrite: bool, say: Callable[[str], None]
) -> np.ndarray:
    """The indices that are still to be drawn, which the leader finds out for all."""
    if world.leads:
        missing, notes = output.prepare(run, overwrite)
        world.publish(np.packbits(missing).tobytes())
        for note in notes:
            say(note)
    else:
        bits = np.frombuffer(world.receive(), np.uint8)
        missing = np.unpackbits(bits, count=len(output.indices))
        output.folder.share_lock()
    return output.indices.start + np.flatnonzero(missing)


def draw(
    sampler: Sampler,
    output: Output,
    world: World,
    missing: np.ndarray,
    settings: dict[str, Any],
    quiet: bool,
) -> None:
    """This process's share of the missing samples; the leader returns when all are written.

    settings: of `Sampler.batches`.
    """
    num_steps = sampler.plan.num_steps

    def callback(index: Tensor, done: int, x: Tensor) -> None:
        progress.callback(index, done, x)
        output.frame(index, done, x, num_steps)

    with Progress(world, len(output.indices), len(missing), num_steps, quiet) as progress:
        claims = world.claims(missing, settings["batch_size"])
        every = 1 if sampler.device.type == "cpu" else frame_stride(num_steps)
        seen = {"callback": callback, "callback_every": every}
        for index, x in sampler.batches(claims, **settings, **seen):
            output.add(index, x)
        output.drain()
        progress.look()
        if world.leads:
            progress.wait_for_others()
        else:
            world.leave()


def run_samples(
    args: argparse.Namespace,
    world: World,
    sampler: Sampler,
    output: Output,
    run: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Draw what is missing, and finish the folder."""
    say = (lambda text: None) if args.quiet or not world.leads else print
    if GRAPHS[args.graphs] and sampler.device.type == "cpu":  # on a GPU a warning has said it
        say(f"--graphs: {sampler.graphs_obstacle}; sampling step by step")
    missing = missing_samples(output, world, run, args.overwrite, say)
    n, classes = len(missing), settings["classes"]
    if 0 < n <= settings["batch_size"] * (world.size - 1):
        say("there are fewer batches than processes: a smaller --batch-size would occupy all")
    with telling(output):
        began = time.perf_counter()
        draw(sampler, output, world, missing, settings, args.quiet)
        if not world.leads:
            return
        seconds = time.perf_counter() - began
        if n:
            run["environment"]["graphs"] = sampler.graphs  # a capture may have failed
            run["speed"] = {
                "samples": n,
                "processes": world.size,
                "seconds": round(seconds, 3),
                "of_which_capturing": round(sampler.capture_seconds, 3),
                "images_per_second": round(n / seconds, 3),
            }
        labels = None
        if classes is not None:
            index = output.indices.start + torch.arange(len(output.indices))
            labels = sampler.labels(index, classes).numpy()
        shown = output.finish(labels, run)
    if sampler.graphs and n:
        held = sampler.memory_held / 2**20
        say(f"captured, {', '.join(sampler.loops.forms)}: {held:.0f} MiB held on {sampler.device}")
    done = f"{n} samples in {seconds:.1f} s ({n / seconds:.2f} images/s)"
    say(f"{done if n else 'all samples were there'}: {shown}")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if (args.init is None) != (args.strength is None):
        raise ValueError("--init and --strength belong together: give both, or neither")
    indices = sample_range(args.start, args.num_samples)
    world = World()
    with one_voice(world), world, world.telling_failure():
        draw_all(args, indices, world)
    return 0


def draw_all(args: argparse.Namespace, indices: range, world: World) -> None:
    """This process's part of the run."""
    set_threads(args.threads, world)
    device = resolve_device(args.device, world.local_rank if world.size > 1 else None)
    if device.index is not None:
        torch.cuda.set_device(device)
    model = load_model(args.model, device)
    if world.leads and not args.quiet:
        print(*model.conventions, sep="\n", end="\n" if model.conventions else "")
    sampler = make_sampler(args, model, device)
    init = None if args.init is None else load_dataset(args.init)
    batch_size = args.batch_size
    settings = {
        "seed": args.seed,
        "batch_size": sampler.default_batch_size(indices) if batch_size is None else batch_size,
        "classes": parse_classes(args.classes, sampler.num_classes),
        "x_start": None if init is None else partial(first_images, init),
    }
    sampler.check(indices, **settings)
    run = make_record(model, sampler, indices, settings, None if init is None else init.checksums)
    del model  # its weights, of which the sampler has its own
    with Output(
        args.out,
        sampler.sample_shape,
        indices,
        settings["batch_size"],
        npz=args.npz,
        gif=args.gif,
    ) as output:
        run_samples(args, world, sampler, output, run, settings)


if __name__ == "__main__":
    sys.exit(cli.run(main, "ddpm_fast.sample"))
