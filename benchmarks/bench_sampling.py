"""One sampling step of the shipped model: reference loop, fused loop, captured loop.

    python -m pytest benchmarks/bench_sampling.py --benchmark-only

Each round is STEPS steps of one batch. Milliseconds a step go to results/sampling.json; they and
the images/s of 1000 steps are in the extra info.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import results
import torch

from ddpm_fast.backend import BackendError
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


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, dict[int, float]]]:
    """{loop and dtype: {batch size: milliseconds a step}}, written when all are measured."""
    rows: dict[str, dict[int, float]] = {}
    yield rows
    results.write("sampling", rows)


@pytest.mark.parametrize("batch_size", [1, 16, 64])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_sampling(benchmark, figures, loop, batch_size, dtype):
    model, network = load_model("mnist", DEVICE), resolve_dtype(dtype, DEVICE)
    try:
        sampler = Sampler.from_model(model, steps=STEPS, dtype=network, **LOOPS[loop])
    except BackendError as error:  # a build without CUDA kernels
        pytest.skip(str(error))
    if loop == "captured" and not sampler.graphs:
        pytest.skip("there are no CUDA kernels here to capture")

    def run() -> None:
        sampler.sample(batch_size, batch_size=batch_size)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    step = benchmark.stats.stats.median / STEPS
    name = f"{loop}, {str(sampler.dtype).removeprefix('torch.')}"
    figures.setdefault(name, {})[batch_size] = 1e3 * step
    benchmark.extra_info["ms_per_step"] = 1e3 * step
    benchmark.extra_info["images_per_second_1000"] = batch_size / (1000 * step)
