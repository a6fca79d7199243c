"""What the sample command costs beside the sampler's bare loop.

    python benchmarks/bulk_speed.py startup memory throughput processes

startup: seconds from the start of the process to the first step, and what its imports take.
memory: the largest resident memory of a run of 500 and of 20,000 tiny samples, with npz.
throughput: images/s of the command against the bare loop, batch 64, in turns.
processes: images/s of one process with all cores against as many processes as cores, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bulk_kills
import results
import torch

from ddpm_fast import sample
from ddpm_fast.checkpoint import load_model
from ddpm_fast.device import resolve_device, resolve_dtype
from ddpm_fast.sampler import Sampler

PEAK_MEMORY = Path(__file__).with_name("peak_memory.py")
ROUNDS = 5
BATCH_SIZE = 64
PACKAGES = ("torch", "numpy", "PIL", "safetensors", "tqdm", "ddpm_fast")
FIRST_STEP = """
import sys, time
from ddpm_fast import sample
from ddpm_fast.loop import Loop
def step(self):
    print(time.time())
    sys.stdout.flush()
    import os
    os._exit(0)
Loop.step = step
sample.main(sys.argv[1:])
"""


def speed(out: Path) -> float:
    return json.loads((out / "run.json").read_text())["speed"]["images_per_second"]


def startup(folder: Path) -> dict:
    """Seconds of the whole, and of the imports, each package without those that it shares."""
    seconds = []
    for i in range(ROUNDS):
        command = [sys.executable, "-c", FIRST_STEP, "--quiet", "--out", str(folder / str(i))]
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout) - began)
    command = [sys.executable, "-X", "importtime", "-c", "import ddpm_fast.sample"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    own = dict.fromkeys((*PACKAGES, "others"), 0.0)
    for line in lines:
        time_, _, name = line.removeprefix("import time:").split("|")
        if time_.strip().isdecimal():
            package = name.strip().partition(".")[0]
            own[package if package in own else "others"] += int(time_) / 1e6
    total = sum(own.values())
    return {
        "seconds_to_first_step": statistics.median(seconds),
        "seconds_of_imports_when_traced": total,
        "share_of_imports": {name: value / total for name, value in own.items()},
    }


def memory(folder: Path) -> dict:
    model = folder / "tiny.safetensors"
    bulk_kills.tiny_model(model)
    figures = {}
    for n in (500, 20_000):
        command = [sys.executable, str(PEAK_MEMORY), "--model", str(model), "--npz", "--quiet"]
        command += ["--num-samples", str(n), "--batch-size", str(BATCH_SIZE), "--steps", "2"]
        command += ["--out", str(folder / str(n))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[f"{n} samples, MiB"] = float(done.stdout.splitlines()[-1])
    few, many = figures.values()
    return figures | {"ratio": many / few}


def throughput(folder: Path) -> dict:
    """In turns, with new samplers, whose first steps are slower, in both."""
    device = resolve_device("auto")
    steps, n = 50, 2 * BATCH_SIZE
    model = load_model("mnist", device)

    def bare() -> float:
        sampler = Sampler.from_model(model, steps=steps, dtype=resolve_dtype("auto", device))
        began = time.perf_counter()
        for _, x in sampler.batches(range(n), batch_size=BATCH_SIZE):
            x.cpu()
        return n / (time.perf_counter() - began)

    def command(i: int) -> float:
        out = folder / str(i)
        arguments = ["--num-samples", n, "--steps", steps, "--batch-size", BATCH_SIZE]
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            sample.main([str(a) for a in (*arguments, "--out", out)])
        return speed(out)

    rates: dict[str, list[float]] = {"bare": [], "command": []}
    for i in range(ROUNDS + 1):
        for name in sorted(rates, reverse=bool(i % 2)):
            rates[name].append(bare() if name == "bare" else command(i))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "steps": steps,
        "images/s": rates,
        "medians": medians,
        "command / bare": medians["command"] / medians["bare"],
    }


def processes(folder: Path) -> dict:
    cores = torch.get_num_threads()
    steps, n = 100, 4 * BATCH_SIZE

    def run(size: int, i: int) -> float:
        out = folder / f"{size}-{i}"
        arguments = ["--model", "mnist", "--dtype", "auto", "--num-samples", n, "--steps", steps]
        arguments += ["--batch-size", BATCH_SIZE, "--out", out, "--threads", cores // size]
        if any(process.wait() for process in bulk_kills.start(size, *arguments)):
            raise RuntimeError(f"the run of {size} processes failed")
        return speed(out)

    rows = [(run(1, i), run(cores, i)) for i in range(3)]
    return {
        f"1 process with {cores} threads, images/s": statistics.median(a for a, _ in rows),
        f"{cores} processes with 1 thread, images/s": statistics.median(b for _, b in rows),
        "processes / threads": statistics.median(b / a for a, b in rows),
    }


MEASUREMENTS = {f.__name__: f for f in (startup, memory, throughput, processes)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="+", choices=MEASUREMENTS)
    for name in p.parse_args().what:
        with tempfile.TemporaryDirectory() as folder:
            figures = MEASUREMENTS[name](Path(folder))
        print(f"{name}: {json.dumps(figures, indent=1)}")
        print(results.write(f"bulk_{name}", figures), flush=True)


if __name__ == "__main__":
    main()
