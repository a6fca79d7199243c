"""The operators of a step beside their peers: torch.randn, diffusers' scheduler, and a plain copy.

    python -m pytest benchmarks/bench_ops.py --benchmark-only

Everything that is compared is measured in rounds that alternate, and the median counts. Seconds a
call, and the ratios of the README, go to results/ops.json. A peer that is not installed is left
out, and named there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import results
import torch
from alternating import BACKENDS, DEVICE, Call, alternate, indices, random

from ddpm_fast import ops
from ddpm_fast.plan import make_plan
from ddpm_fast.schedule import NoiseSchedule

try:
    from diffusers import DDPMScheduler
except ImportError:
    DDPMScheduler = None

SHAPES = [(1, 3, 32, 32), (64, 3, 32, 32), (256, 3, 64, 64)]
BEYOND_CACHE = (1024, 3, 64, 64)
T = 1000


@pytest.fixture(scope="module")
def figures() -> Iterator[dict]:
    """{operator: {case: {who: seconds a call}}}, written when all are measured."""
    rows: dict = {"randn": {}, "q_sample": {}, "p_sample_step": {}}
    rows["absent_peers"] = [] if DDPMScheduler else ["diffusers"]
    with torch.inference_mode():
        yield rows
    results.write("ops", rows)


def copy_of(elements: int) -> Call:
    """A copy of `elements` float32: reads and writes 4 bytes for each."""
    source, target = random(elements), random(elements)
    return lambda: target.copy_(source)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randn(benchmark, figures, threads, shape):
    seed, index = indices(shape[0]), indices(shape[0])
    calls = {
        name: lambda name=name: ops.randn(seed, index, shape[1:], 1, backend=name)
        for name in BACKENDS
    }
    calls["torch.randn"] = lambda: torch.randn(shape, device=DEVICE)
    figures["randn"][f"{shape}, threads: {threads}"] = alternate(benchmark, calls)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_sample(benchmark, figures, shape):
    n, x_start = indices(shape[0]), random(*shape)
    schedule = NoiseSchedule.linear(T, 1e-4, 0.02)
    alphas_cumprod = torch.tensor(schedule.alphas_cumprod, device=DEVICE)
    coefficients = torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()], 1).float()
    timesteps = (n * 37) % T
    calls = {
        name: lambda name=name: ops.q_sample(x_start, coefficients, timesteps, n, n, backend=name)
        for name in BACKENDS
    }
    if DDPMScheduler:
        scheduler = DDPMScheduler(T)
        calls["diffusers add_noise + torch.randn"] = lambda: scheduler.add_noise(
            x_start, torch.randn(shape, device=DEVICE), timesteps
        )
    figures["q_sample"][str(shape)] = alternate(benchmark, calls)


def step_call(
    backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    order: torch.memory_format = torch.contiguous_format,
    noise: bool = False,
    next_input: bool = False,
) -> Call:
    """The step that a sampling loop runs, in place, in the middle of a plan."""
    plan = make_plan(NoiseSchedule.linear(T, 1e-4, 0.02)).to(DEVICE)
    n, x = indices(shape[0]), random(*shape)
    model_output = random(*shape).to(dtype).contiguous(memory_format=order)
    row = torch.full_like(n, T // 2)
    given = random(*shape) if noise else None
    buffer = torch.empty_like(model_output) if next_input else None
    return lambda: ops.p_sample_step_(
        x, model_output, plan.coefficients, plan.index, row, n, n, given,
        next_input=buffer, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p_sample_step(benchmark, figures, shape):
    calls = {name: step_call(name, shape) for name in BACKENDS}
    if DDPMScheduler:
        scheduler = DDPMScheduler(T)
        scheduler.set_timesteps(T, device=DEVICE)
        t, x, model_output = scheduler.timesteps[T // 2], random(*shape), random(*shape)
        calls["diffusers DDPMScheduler.step"] = lambda: scheduler.step(model_output, t, x)
    n = indices(shape[0])
    calls["randn alone"] = lambda: ops.randn(n, n, shape[1:], 1, backend=BACKENDS[0])
    figures["p_sample_step"][f"{shape}, own noise"] = alternate(benchmark, calls)


def test_p_sample_step_with_a_noise_tensor(benchmark, figures):
    """16 bytes an element: x_t, the model's output and the noise are read, x_prev is written."""
    calls = {name: step_call(name, BEYOND_CACHE, noise=True) for name in BACKENDS}
    elements = torch.Size(BEYOND_CACHE).numel()
    calls["copy of as many bytes"] = copy_of(2 * elements)
    figures["p_sample_step"][f"{BEYOND_CACHE}, noise tensor"] = alternate(benchmark, calls)


LAST = torch.channels_last
VARIANTS = {
    "bfloat16 channels_last, C = 3": ((64, 3, 32, 32), {"dtype": torch.bfloat16, "order": LAST}),
    "bfloat16 channels_last, C = 1": ((64, 1, 32, 32), {"dtype": torch.bfloat16, "order": LAST}),
    "float32 channels_last, C = 3": ((64, 3, 32, 32), {"order": LAST}),
    "float32, odd H x W": ((64, 3, 31, 33), {}),
    "bfloat16 channels_last, odd H x W": (
        (64, 3, 31, 33),
        {"dtype": torch.bfloat16, "order": LAST},
    ),
    "float32 channels_last and next_input, C = 3": (
        (64, 3, 32, 32),
        {"order": LAST, "next_input": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_p_sample_step_of_other_layouts(benchmark, figures, variant):
    """Beside the contiguous float32 one of as many channels; seconds for 2^20 elements each."""
    shape, settings = VARIANTS[variant]
    even = (64, shape[1], 32, 32)
    calls = {name: step_call(name, shape, **settings) for name in BACKENDS}
    calls |= {f"{name}, contiguous float32": step_call(name, even) for name in BACKENDS}
    times = alternate(benchmark, calls)
    scale = {name: 2**20 / torch.Size(even).numel() for name in times}
    scale |= {name: 2**20 / torch.Size(shape).numel() for name in BACKENDS}
    figures["p_sample_step"][variant] = {k: v * scale[k] for k, v in times.items()}
