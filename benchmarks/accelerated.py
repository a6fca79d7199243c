"""diffusers' DDPMPipeline with the shipped digits, as it is and after `accelerate`.

    python benchmarks/accelerated.py [--num-samples 16] [--steps 100] [--rounds 2]

Needs diffusers. The rounds alternate; a figure is their median, and a call before them is not
counted. What one call draws is compared first: the same generator, the same pictures.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from functools import partial

import numpy as np
import results
import torch
from diffusers_peer import to_diffusers

from ddpm_fast.checkpoint import load_model
from ddpm_fast.device import is_bfloat16_fast, resolve_device
from ddpm_fast.hosts.diffusers import DDPMScheduler, accelerate


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--num-samples", type=int, default=16)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--rounds", type=int, default=2)
    args = p.parse_args()
    device = resolve_device("auto")
    pipe = to_diffusers(load_model("mnist")).to(device)
    scheduler = copy.copy(pipe)
    scheduler.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipes = {
        "diffusers float32": pipe,
        "its scheduler replaced": scheduler,
        "accelerate": accelerate(copy.copy(pipe)),
        'accelerate, noise="counter"': accelerate(copy.copy(pipe), noise="counter"),
    }
    if is_bfloat16_fast(device):
        pipes["accelerate, bfloat16"] = accelerate(copy.copy(pipe), dtype=torch.bfloat16)

    def draw(pipe, steps: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        settings = {"batch_size": args.num_samples, "num_inference_steps": steps}
        return pipe(generator=generator, output_type="np", **settings).images

    def seconds(run) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began  # the pictures are on the CPU then

    figures = {"num_samples": args.num_samples, "steps": args.steps, "rounds": args.rounds}
    pictures = {name: draw(one, args.steps) for name, one in pipes.items()}
    times = {name: [] for name in pipes}
    for _ in range(args.rounds):
        for name, one in pipes.items():
            times[name].append(seconds(partial(draw, one, args.steps)))
    base = statistics.median(times["diffusers float32"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        row = {"seconds": middle, "ratio": base / middle}
        difference = np.abs(pictures[name] - pictures["diffusers float32"])
        if difference.any() and "counter" not in name:
            row["grey_levels"] = float(255 * difference.max())
            row["psnr_db"] = float(-10 * np.log10(np.square(difference).mean()))
        figures[name] = row
        print(f"{name:28}", *(f"{key} {value:.3g} " for key, value in row.items()))
    print(results.write("accelerated", figures))


if __name__ == "__main__":
    main()
