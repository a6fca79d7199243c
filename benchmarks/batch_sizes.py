"""Sample 42 of the shipped model: is it one picture at any --start and any batch size?

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

SAMPLE, BATCH_SIZES = 42, (1, 16, 64)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=100)
    args = p.parse_args()
    device = resolve_device("auto")
    figures: dict = {"steps": args.steps}
    for name in ("float32", "auto"):
        dtype = resolve_dtype(name, device)
        sampler = Sampler.from_model(load_model("mnist", device), steps=args.steps, dtype=dtype)

        def picture(start: int, batch_size: int, sampler: Sampler = sampler) -> np.ndarray:
            count = SAMPLE + 1 - start
            return to_uint8(sampler.sample(count, start=start, batch_size=batch_size))[-1].astype(
                int
            )

        base = picture(40, 64)
        figures[str(dtype).removeprefix("torch.")] = {
            "start 0 and 40, batch 64": int(np.abs(picture(0, 64) - base).max()),
            **{f"batch {b} and 64": int(np.abs(picture(42, b) - base).max()) for b in BATCH_SIZES},
        }
    for name, value in figures.items():
        print(f"{name:10} {value}")
    print(results.write("batch_sizes", figures))


if __name__ == "__main__":
    main()
