"""One sampling step of the shipped model: reference loop, fused loop, captured loop.

    python -m pytest benchmarks/bench_sampling.py --benchmark-only

Each round is STEPS steps of one batch; `ms_per_step` and `images_per_second_1000` (for 1000 steps)
are in the extra info.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.checkpoint import load_model
from ddpm_fast.device import resolve_device, resolve_dtype
from ddpm_fast.sampler import Sampler

STEPS = 10
DEVICE = resolve_device("auto")
CUDA = DEVICE.type == "cuda"
LOOPS = {
    "reference": {"backend": "reference"},
    "fused": {"backend": DEVICE.type},
    "captured": {"graphs": True},
}


@pytest.mark.parametrize("batch_size", [1, 16, 64])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_sampling(benchmark, loop, batch_size, dtype):
    if loop == "captured" and not CUDA:
        pytest.skip("there is no CUDA device to capture on")
    sampler = Sampler.from_model(
        load_model("mnist", DEVICE), steps=STEPS, dtype=resolve_dtype(dtype, DEVICE), **LOOPS[loop]
    )

    def run() -> None:
        sampler.sample(batch_size, batch_size=batch_size)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    step = benchmark.stats.stats.median / STEPS
    benchmark.extra_info["dtype"] = str(sampler.dtype).removeprefix("torch.")
    benchmark.extra_info["ms_per_step"] = 1e3 * step
    benchmark.extra_info["images_per_second_1000"] = batch_size / (1000 * step)
