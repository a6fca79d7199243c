"""Sampling loops on a GPU: diffusers eager and compiled, ours eager and captured, in one run.

    python benchmarks/bench_captured.py [--budget 420] [--resume] [--smoke]

The digit model and Ho et al.'s CIFAR-10 U-Net, at several batches; all draw DDPM steps with the
same weights, each engine has its turn in each round, and the device is synchronised. diffusers'
engines need the extra `peers`; without it our U-Net in plain PyTorch stands in, and is called that.
The figures, with the seconds of compiling or capturing apart, are in results/captured.json after
each batch, so also when the time is up or the process killed; --resume goes on from there. What the
budget (seconds) does not reach is named: compiling comes last. --smoke takes three steps of a tiny
network, also on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import results
import torch
from gpu_goals import goals
from gpu_measure import Bench, Run
from loop_engines import (
    CAPTURED,
    EAGER,
    ENGINES,
    ONE,
    PEER,
    PEER_MISSING,
    SLOW_TO_MAKE,
    Engine,
)
from networks import MODELS, flop_of, with_random_weights

from ddpm_fast.backend import BackendError
from ddpm_fast.checkpoint import Model
from ddpm_fast.device import device_name, resolve_device
from ddpm_fast.unet_config import UNetConfig

STEPS = 50
BATCHES = {"cifar10": [1, 64, 8, 256], "mnist": [64, 1, 8, 256]}  # the most telling first
LARGEST_BATCH, WORTH_DOUBLING = 4096, 1.05
FEWEST_ROUNDS, LONG = 3, 15.0  # rounds of a batch that takes so many seconds
NO_TIME, UNDER_WAY = "no time was left", "the process ended in it"
GRACE = 40.0  # seconds from the end of the budget to the end of what is then being measured


class TimeUp(BaseException):
    """The end of the budget, in the middle of something that takes long."""


class LostGpu(Exception):
    """An error after which this process can do nothing on the GPU."""


def measure(bench: Bench, name: str, model: Model, n: int, engines: dict[str, Engine]) -> None:
    """These engines at one batch, in rounds in which each has its turn."""
    cell = bench.figures.setdefault(name, {}).setdefault(str(n), {})
    runs: dict[str, Run] = {}
    rows: dict[str, dict] = {}
    for label, engine in engines.items():
        place = f"{name}, batch {n}: {label}"
        if label in cell or label in bench.left_out or place in bench.left_out:
            continue
        if bench.left() < 0:
            bench.left_out[place] = NO_TIME
            continue
        bench.left_out[place] = UNDER_WAY  # should the process end in it, the next leaves it out
        bench.save()
        try:
            with naming(bench, place):
                # Whether the profiler bears a loop inside a graph is not known.
                runs[label], rows[label] = bench.prepared(
                    partial(engine, bench, model, n), profiled=label != ONE
                )
                del bench.left_out[place]
        except BackendError as error:
            bench.left_out[label] = str(error)
            del bench.left_out[place]
    taken: dict[str, list[float]] = {label: [] for label in runs}
    began = time.perf_counter()
    for done in range(bench.rounds):
        long = time.perf_counter() - began > LONG or bench.left() < 0
        if long and done >= FEWEST_ROUNDS:
            break
        for label in list(taken):
            place = f"{name}, batch {n}: {label}"
            with naming(bench, place):
                taken[label].append(bench.seconds(runs[label]))
            if place in bench.left_out:
                del taken[label]
    work = flop_of(model) * n
    for label, times in taken.items():
        cell[label] = rows[label] | timing(bench, n, times, rows[label].get("busy_ms"), work)
        print(f"{name} {n:4} {label:50} {cell[label]['ms_per_step']:9.3f} ms a step", flush=True)
    bench.save()


@contextmanager
def naming(bench: Bench, place: str) -> Iterator[None]:
    """What fails here is left out, and named; LostGpu where nothing more can be done."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # out of memory, or whatever a peer or a compiler fails with
        bench.left_out[place] = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
        if bench.gpu_is_lost():
            raise LostGpu(bench.left_out[place]) from error


def timing(
    bench: Bench, n: int, times: list[float], busy_ms: float | None, work: int
) -> dict[str, float]:
    """times: seconds of whole runs. work: floating-point operations of a step."""
    run_seconds = statistics.median(times)
    step = run_seconds / bench.steps
    row = {
        "rounds": len(times),
        "ms_per_step": 1e3 * step,
        f"images_per_second_{bench.steps}": n / run_seconds,
        "images_per_second_1000": n / (1000 * step),  # by the same milliseconds a step
    }
    if bench.peak_flops:
        row["share_of_peak"] = work / step / bench.peak_flops
    if busy_ms is not None:
        row["idle"] = max(0.0, 1 - busy_ms / row["ms_per_step"])
    return row


def grow(bench: Bench, name: str, n: int, largest: int) -> Iterator[tuple[int, list[str]]]:
    """(batch, engines) beyond n, doubled as long as ours gains by it; all engines at the last."""
    cells, best, pays = bench.figures[name], 0.0, n
    label = CAPTURED if CAPTURED in cells[str(n)] else EAGER
    while label in (cell := cells[str(n)]) and cell[label]["images_per_second_1000"] > best:
        best, pays = WORTH_DOUBLING * cell[label]["images_per_second_1000"], n
        if n >= largest:
            break
        n *= 2
        yield n, [label]
    yield pays, list(ENGINES)


def compiled(turns: Iterable[Iterable[tuple[str, int]]]) -> Iterator[tuple[str, int, str]]:
    """What to measure with torch.compile, the most telling first."""
    for turn in map(list, turns):
        for label in SLOW_TO_MAKE:
            for name, n in turn:
                yield name, n, label


def measure_all(
    bench: Bench, models: dict[str, Model], batches: dict[str, list[int]], largest: int
) -> None:
    turns = zip(*(batches[name] for name in models), strict=True)  # each model's first, and so on
    turns = [list(zip(models, turn, strict=True)) for turn in turns]
    for turn in turns:
        for name, n in turn:
            measure(bench, name, models[name], n, ENGINES)
    for name, model in models.items():
        for n, labels in grow(bench, name, max(batches[name]), largest):
            if bench.left() < GRACE:
                bench.left_out[f"{name}, batch {n}"] = NO_TIME
                break
            measure(bench, name, model, n, {label: ENGINES[label] for label in labels})
    longest = dict.fromkeys(SLOW_TO_MAKE, 30.0)  # seconds
    for name, n, label in compiled(turns):
        if bench.left() < longest[label]:
            bench.left_out[f"{name}, batch {n}: {label}"] = NO_TIME
            continue
        began = time.monotonic()
        measure(bench, name, models[name], n, {label: SLOW_TO_MAKE[label]})
        longest[label] = max(longest[label], time.monotonic() - began)


def save(bench: Bench, path: Path, complete: bool = False) -> None:
    figures = {
        "complete": complete,
        "steps": bench.steps,
        "peer": PEER,
        "cuda": torch.version.cuda,
        "peak_tflops": bench.peak_flops / 1e12,
        "goals": goals(bench.figures),
        "left_out": bench.left_out,
        "models": bench.figures,
    }
    results.write(path.stem, figures, path.parent)


def resume(bench: Bench, path: Path) -> None:
    """Take over what the file has of this device, and try again what there was no time for."""
    if not path.exists():
        return
    document = json.loads(path.read_text())
    if document["device"] != device_name(bench.device):
        raise SystemExit(f"bench_captured: {path} is of another device ({document['device']})")
    figures = document["figures"]
    bench.figures = figures["models"]
    left_out = figures["left_out"].items()
    bench.left_out = {what: why for what, why in left_out if why != NO_TIME}


@contextmanager
def time_up_after(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tiny() -> Model:
    return with_random_weights(
        UNetConfig(
            in_channels=1,
            sample_size=(8, 8),
            base_channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(False, True),
            norm_groups=4,
            dropout=0.0,
        )
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser()
    p.add_argument("--budget", type=float, default=420.0, help="seconds")
    p.add_argument("--resume", action="store_true", help="keep what --json has")
    p.add_argument("--json", type=Path, default=results.FOLDER / "captured.json")
    p.add_argument("--smoke", action="store_true", help="a tiny network, three steps, any device")
    return p.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = resolve_device("auto")
    if device.type != "cuda" and not args.smoke:
        print("bench_captured: torch sees no CUDA device, so there is nothing to measure here")
        return 0
    bench = Bench(device, 3 if args.smoke else STEPS, time.time() + args.budget)
    bench.save = partial(save, bench, args.json)
    if args.resume:
        resume(bench, args.json)
    if PEER_MISSING:
        bench.left_out["diffusers"] = PEER_MISSING
    if args.smoke:
        bench.rounds, models, batches, largest = 1, {"tiny": tiny()}, {"tiny": [1, 2]}, 4
    else:
        models, batches = {name: make() for name, make in MODELS.items()}, BATCHES
        largest = LARGEST_BATCH
    complete = False
    try:
        with time_up_after(bench.left() + GRACE):
            bench.peak_flops = bench.matmul_peak()
            measure_all(bench, models, batches, largest)
        complete = NO_TIME not in bench.left_out.values()
    except TimeUp:
        print("bench_captured: the time is up, and --resume goes on")
        bench.left_out |= {p: NO_TIME for p, why in bench.left_out.items() if why == UNDER_WAY}
    except LostGpu as error:  # another process goes on
        print(f"bench_captured: {error}", flush=True)
        bench.save()
        again = [f"--budget={bench.left()}", "--resume", f"--json={args.json}"]
        os.execv(sys.executable, [sys.executable, __file__, *again, *["--smoke"] * args.smoke])
    save(bench, args.json, complete)
    for what, why in bench.left_out.items():
        print(f"left out: {what}: {why}")
    for what, reached in goals(bench.figures).items():
        print(f"goal: {what}: {reached}")
    print(args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
