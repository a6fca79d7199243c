"""Sampling loops on a GPU: diffusers eager and compiled, ours eager and captured, in one run.

    python benchmarks/bench_captured.py [--budget 480] [--smoke]

The digit model and Ho et al.'s CIFAR-10 U-Net, at several batches; all draw DDPM steps with the
same weights, each engine has its turn in each round, and the device is synchronised. diffusers'
engines need the extra `peers` and are named where they are left out. What the budget (seconds) does
not reach is named too: compiling comes last. Figures, with the seconds of compiling or capturing
apart, go to results/captured.json. --smoke takes three steps of a tiny network, also on a CPU, and
prints them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import results
import torch
from networks import MODELS, flop_of, with_random_weights

from ddpm_fast.backend import BackendError, resolve_backend
from ddpm_fast.checkpoint import Model
from ddpm_fast.device import resolve_device
from ddpm_fast.executor import ONE_LAUNCH, WHOLE
from ddpm_fast.graphs import while_loop_obstacle
from ddpm_fast.sampler import Sampler
from ddpm_fast.unet_config import UNetConfig

Run = Callable[[], object]  # of all steps of a batch
STEPS = 50
BATCHES = {"cifar10": [1, 64, 8, 256], "mnist": [64, 1, 8, 256]}  # the most telling first
COMPILED = ("reduce-overhead", "max-autotune")
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
LARGEST_BATCH, WORTH_DOUBLING = 4096, 1.05
CAPTURED = "ddpm_fast captured"
F32, BF16 = torch.float32, torch.bfloat16


@dataclass
class Bench:
    """What every measurement shares, and what it finds."""

    device: torch.device
    steps: int
    deadline: float
    rounds: int = 5
    peak_flops: float = 0.0  # of a bfloat16 matrix product
    left_out: dict[str, str] = field(default_factory=dict)  # engine or cell: why
    figures: dict[str, dict] = field(default_factory=dict)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Run) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began


def diffusers(bench: Bench, model: Model, n: int, dtype: torch.dtype, mode: str = "") -> Run:
    """DDPMPipeline's loop, without its pictures; `mode` of torch.compile, or none."""
    from diffusers_peer import to_diffusers

    pipeline = to_diffusers(model)
    unet, scheduler = pipeline.unet.to(bench.device, dtype), pipeline.scheduler
    if bench.device.type == "cuda":
        unet = unet.to(memory_format=torch.channels_last)
    if mode:
        unet = torch.compile(unet, mode=mode, dynamic=False)
    scheduler.set_timesteps(bench.steps)
    # The network's timesteps lie on its device, which spares a copy; the scheduler reads its own.
    timesteps = list(zip(scheduler.timesteps, scheduler.timesteps.to(bench.device), strict=True))

    def run() -> torch.Tensor:
        x = torch.randn(n, *model.config.sample_shape, device=bench.device, dtype=dtype)
        for t, given in timesteps:
            if mode:
                torch.compiler.cudagraph_mark_step_begin()
            x = scheduler.step(unet(x, given).sample, t, x).prev_sample
        return x

    return run


def ours(bench: Bench, model: Model, n: int, **settings: object) -> Run:
    if bench.device.type == "cuda":
        settings["backend"] = _backend(bench)
    elif settings.get("graphs"):
        raise BackendError("there is nothing to capture on a CPU")
    settings |= {"device": bench.device, "dtype": BF16, "steps": bench.steps}
    sampler = Sampler.from_model(model, **settings)
    if settings.get("graphs"):
        sampler.capture([n])
    if settings.get("steps_per_graph") == WHOLE and sampler.loops.forms != [ONE_LAUNCH]:
        raise BackendError(f"not here: {while_loop_obstacle() or 'a node that no loop may hold'}")
    return lambda: [None for _ in sampler.batches(range(n), batch_size=n)]


def _backend(bench: Bench) -> str:
    try:
        return resolve_backend(bench.device, "cuda")[0]
    except BackendError:
        return resolve_backend(bench.device, "triton")[0]


Engine = Callable[[Bench, Model, int], Run]
ENGINES: dict[str, Engine] = {
    "diffusers float32": partial(diffusers, dtype=F32),
    "diffusers bfloat16": partial(diffusers, dtype=BF16),
    "ddpm_fast eager": ours,
    CAPTURED: partial(ours, graphs=True),
    f"{CAPTURED}, 10 steps a launch": partial(ours, graphs=True, steps_per_graph=10),
    f"{CAPTURED}, one launch": partial(ours, graphs=True, steps_per_graph=WHOLE),
}
SLOW_TO_MAKE: dict[str, Engine] = {
    f"diffusers bfloat16, compiled {mode}": partial(diffusers, dtype=BF16, mode=mode)
    for mode in COMPILED
}


def launches(bench: Bench, run: Run) -> dict[str, float]:
    """Calls that give the GPU work, kernels, and milliseconds that it is busy, each a step."""
    if bench.device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        bench.wait()
    events = profile.events()
    calls = sum(e.name.startswith(LAUNCHES) for e in events)
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e3
    return {
        "launches": calls / bench.steps,
        "kernels": len(kernels) / bench.steps,
        "busy_ms": busy / bench.steps,
    }


def free(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)


def prepared(bench: Bench, engine: Engine, model: Model, n: int) -> tuple[Run, dict]:
    """A run that has had its compiling or capturing, and the figures of that."""
    free(bench)
    began = time.perf_counter()
    run = engine(bench, model, n)
    run()
    bench.wait()
    row = {"prepared_seconds": time.perf_counter() - began}
    bench.seconds(run)
    if bench.device.type == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_reserved(bench.device) / 2**20
    return run, row | launches(bench, run)


def measure(bench: Bench, name: str, model: Model, n: int, engines: dict[str, Engine]) -> None:
    """One cell: these engines, in rounds in which each has its turn."""
    cell = bench.figures.setdefault(name, {}).setdefault(str(n), {})
    runs: dict[str, Run] = {}
    for label, engine in engines.items():
        if label in bench.left_out:
            continue
        try:
            runs[label], cell[label] = prepared(bench, engine, model, n)
        except (ImportError, BackendError) as error:
            bench.left_out[label] = str(error)
        except RuntimeError as error:  # out of memory, or a compiler's failure
            bench.left_out[f"{name}, batch {n}: {label}"] = str(error).split("\n")[0]
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for done in range(bench.rounds):
        if done and bench.left() < 0:
            break
        for label, run in runs.items():
            taken[label].append(bench.seconds(run))
    work = flop_of(model) * n
    for label, times in taken.items():
        row, run_seconds = cell[label], statistics.median(times)
        step = run_seconds / bench.steps
        row |= {
            "rounds": len(times),
            "ms_per_step": 1e3 * step,
            f"images_per_second_{bench.steps}": n / run_seconds,
            "images_per_second_1000": n / (1000 * step),  # by the same milliseconds a step
        }
        if bench.peak_flops:
            row["share_of_peak"] = work / step / bench.peak_flops
        if "busy_ms" in row:
            row["idle"] = max(0.0, 1 - row["busy_ms"] / row["ms_per_step"])
        print(f"{name} {n:4} {label:40} {row['ms_per_step']:9.3f} ms a step", flush=True)


def matmul_peak(bench: Bench) -> float:
    """FLOP/s of a bfloat16 product of 8192 x 8192 matrices."""
    if bench.device.type != "cuda":
        return 0.0
    a, b = (torch.randn(8192, 8192, device=bench.device, dtype=BF16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / min(bench.seconds(lambda: a @ b) for _ in range(10))


def grow(bench: Bench, name: str, model: Model, n: int) -> None:
    """Further batches, doubled as long as ours captured gains by it; all engines at the last."""
    label, best = CAPTURED, 0.0
    cell = bench.figures[name].get(str(n), {})
    while label in cell and cell[label]["images_per_second_1000"] > WORTH_DOUBLING * best:
        best = cell[label]["images_per_second_1000"]
        if n == LARGEST_BATCH or bench.left() < 60:
            return
        n *= 2
        measure(bench, name, model, n, {label: ENGINES[label]})
        cell = bench.figures[name][str(n)]
    pays = n // 2
    if len(bench.figures[name][str(pays)]) == 1:
        measure(bench, name, model, pays, ENGINES)


def compiled(bench: Bench, models: dict[str, Model], cells: Iterable[tuple[str, int]]) -> None:
    """diffusers with torch.compile, as far as the time goes, judged by the slowest so far."""
    cells, longest = list(cells), dict.fromkeys(SLOW_TO_MAKE, 60.0)
    for label, engine in SLOW_TO_MAKE.items():
        for name, n in cells:
            if bench.left() < longest[label]:
                bench.left_out[f"{name}, batch {n}: {label}"] = "no time was left"
                continue
            torch.compiler.reset()
            began = time.monotonic()
            measure(bench, name, models[name], n, {label: engine})
            longest[label] = max(longest[label], time.monotonic() - began)


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


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--budget", type=float, default=480.0, help="seconds")
    p.add_argument("--smoke", action="store_true", help="tiny networks, three steps, any device")
    args = p.parse_args(argv)
    device = resolve_device("auto")
    if device.type != "cuda" and not args.smoke:
        print("bench_captured: torch sees no CUDA device, so there is nothing to measure here")
        return 0
    bench = Bench(device, 3 if args.smoke else STEPS, time.monotonic() + args.budget)
    bench.peak_flops = matmul_peak(bench)
    if args.smoke:
        bench.rounds, models, batches = 1, {"tiny": tiny()}, {"tiny": [1, 2]}
    else:
        models, batches = {name: make() for name, make in MODELS.items()}, BATCHES
    turns = zip(*(batches[name] for name in models), strict=True)  # each model's first, and so on
    cells = [cell for turn in turns for cell in zip(models, turn, strict=True)]
    for name, n in cells:
        measure(bench, name, models[name], n, ENGINES)
    if not args.smoke:
        for name, model in models.items():
            grow(bench, name, model, max(batches[name]))
        compiled(bench, models, cells)
    figures = {
        "steps": bench.steps,
        "peak_tflops": bench.peak_flops / 1e12,
        "left_out": bench.left_out,
        "models": bench.figures,
    }
    for what, why in bench.left_out.items():
        print(f"left out: {what}: {why}")
    print(json.dumps(figures) if args.smoke else results.write("captured", figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
