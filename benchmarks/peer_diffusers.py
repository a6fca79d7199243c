"""The shipped model's digits: diffusers' DDPMPipeline in float32 against ours, in one run.

    python benchmarks/peer_diffusers.py [--num-samples 64] [--steps 1000]

Needs the extra `peers`. Both compute the same function, which is checked first.
"""

from __future__ import annotations

import argparse
import time

import results
import torch
from diffusers_peer import to_diffusers

from ddpm_fast.checkpoint import load_model
from ddpm_fast.device import DTYPES, resolve_device, resolve_dtype
from ddpm_fast.sampler import Sampler


@torch.no_grad()
def difference(model, pipeline) -> float:
    """The relative L2 difference of the two networks' outputs, float32, over timesteps."""
    t = torch.tensor([0, 1, 10, 100, 500, model.schedule.num_timesteps - 1])
    x = torch.randn(len(t), *model.config.sample_shape)
    ours, theirs = model.unet(x, t), pipeline.unet(x, t).sample
    return float((ours - theirs).norm() / ours.norm())


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--num-samples", type=int, default=64)
    p.add_argument("--steps", type=int, default=1000)
    args = p.parse_args()
    device = resolve_device("auto")
    model = load_model("mnist")
    pipeline = to_diffusers(model)
    error = difference(model, pipeline)
    assert error < 1e-5, f"the two networks differ by {error}"
    pipeline.to(device)
    n = args.num_samples

    def theirs(steps: int) -> None:
        pipeline(batch_size=n, num_inference_steps=steps, output_type="np")

    figures = {"num_samples": n, "steps": args.steps, "network_difference": error}
    theirs(3)  # warm-up
    figures["diffusers float32"] = {"seconds": seconds(lambda: theirs(args.steps))}
    for dtype in dict.fromkeys(resolve_dtype(name, device) for name in ("float32", "auto")):
        label = f"ddpm_fast {next(k for k, v in DTYPES.items() if v == dtype)}"
        settings = {"device": device, "dtype": dtype, "graphs": device.type == "cuda"}
        Sampler.from_model(model, steps=3, **settings).sample(n, batch_size=n)
        sampler = Sampler.from_model(model, steps=args.steps, **settings)
        if sampler.graphs:
            label += ", captured"
        figures[label] = {"seconds": seconds(lambda s=sampler: s.sample(n, batch_size=n))}
    base = figures["diffusers float32"]["seconds"]
    for name, row in figures.items():
        if isinstance(row, dict):
            row["images_per_second"] = n / row["seconds"]
            row["ratio"] = base / row["seconds"]
            print(f"{name:22} {row['seconds']:8.1f} s {row['ratio']:6.2f}x")
    print(results.write("peer_diffusers", figures))


if __name__ == "__main__":
    main()
