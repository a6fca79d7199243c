"""Whole runs of the shipped model, the same noise: how far pixels are from the float32 network's.

    python benchmarks/precision.py [--num-samples 16] [--steps 1000]

PSNR of the images in [-1, 1] (a range of 2), over all of them and of the worst. Goes to
results/precision.json.
"""

from __future__ import annotations

import argparse
import math

import results
import torch
from torch import Tensor

from ddpm_fast.checkpoint import load_model
from ddpm_fast.sampler import Sampler

RUNS = {
    "float32, fused": (torch.float32, True),
    "bfloat16, fused": (torch.bfloat16, True),
    "bfloat16, layer by layer": (torch.bfloat16, False),
}


def psnr(error: Tensor) -> float:
    return 10 * math.log10(4 / float(error.square().mean()))


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--num-samples", type=int, default=16)
    p.add_argument("--steps", type=int, default=1000)
    args = p.parse_args()
    model = load_model("mnist")

    def draw(dtype: torch.dtype, fused: bool) -> Tensor:
        sampler = Sampler.from_model(model, dtype=dtype, fused=fused, steps=args.steps)
        return sampler.sample(args.num_samples, classes=list(range(10)))

    want = draw(torch.float32, False)
    figures: dict = {"num_samples": args.num_samples, "steps": args.steps, "psnr": {}}
    for name, settings in RUNS.items():
        errors = draw(*settings) - want
        row = {"all": psnr(errors), "worst image": min(psnr(e) for e in errors)}
        figures["psnr"][name] = row
        print(f"{name:26} {row['all']:6.1f} dB, worst {row['worst image']:6.1f} dB", flush=True)
    print(results.write("precision", figures))


if __name__ == "__main__":
    main()
