"""Samples 40 to 47 of the shipped model: the same pictures at any --start and batch size?

    python benchmarks/batch_sizes.py [--steps 100]

The noise is equal by contract, and at one batch size the bytes are too. At other batch sizes the
network's library may choose other algorithms, whose sums differ in the last bits: this reports the
largest difference in grey levels (of 255), per dtype of the network.
"""

from __future__ import annotations

import argparse

import numpy as np
import results

from ddpm_fast.checkpoint import load_model
from ddpm_fast.device import resolve_device, resolve_dtype
from ddpm_fast.images import to_uint8
from ddpm_fast.sampler import Sampler

FIRST, COUNT, BATCH_SIZES = 40, 8, (1, 7, 16, 64)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=100)
    args = p.parse_args()
    device = resolve_device("auto")
    figures: dict = {"steps": args.steps}
    for name in ("float32", "auto"):
        dtype = resolve_dtype(name, device)
        sampler = Sampler.from_model(load_model("mnist", device), steps=args.steps, dtype=dtype)

        def pictures(start: int, batch_size: int, sampler: Sampler = sampler) -> np.ndarray:
            x = sampler.sample(FIRST + COUNT - start, start=start, batch_size=batch_size)
            return to_uint8(x[-COUNT:]).astype(int)

        base = pictures(FIRST, BATCH_SIZES[-1])
        runs = {f"start 0 and {FIRST}, batch {BATCH_SIZES[-1]}": pictures(0, BATCH_SIZES[-1])}
        for batch_size in BATCH_SIZES[:-1]:
            name = f"batch {batch_size} and {BATCH_SIZES[-1]}"
            runs[name] = pictures(FIRST, batch_size)
        figures[str(dtype).removeprefix("torch.")] = {
            name: int(np.abs(got - base).max()) for name, got in runs.items()
        }
    for name, value in figures.items():
        print(f"{name:10} {value}")
    print(results.write("batch_sizes", figures))


if __name__ == "__main__":
    main()
