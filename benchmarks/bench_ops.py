"""The operators beside their peers: torch.randn, diffusers' scheduler, and a plain copy.

    python -m pytest benchmarks/bench_ops.py --benchmark-only

Everything that is compared is measured in rounds that alternate, and the median counts. Seconds a
call, and the ratios of the README, go to results/ops.json. A peer that is not installed is left
out, and named there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import ops
from ddpm_fast.device import resolve_device
from ddpm_fast.fused import Conv, UpsampleConv
from ddpm_fast.plan import make_plan
from ddpm_fast.schedule import NoiseSchedule

try:
    from diffusers import DDPMScheduler
except ImportError:
    DDPMScheduler = None

DEVICE = resolve_device("auto")
SHAPES = [(1, 3, 32, 32), (64, 3, 32, 32), (256, 3, 64, 64)]
BEYOND_CACHE = (1024, 3, 64, 64)
ROUNDS, ROUND_SECONDS = 15, 0.02
T = 1000
Call = Callable[[], object]


def _available(name: str) -> bool:
    try:
        ops.resolve_backend(DEVICE, name)
    except ops.BackendError:
        return False
    return True


BACKENDS = [name for name in ("cpu", "cuda", "triton") if _available(name)]


def seconds(call: Call, repeats: int) -> float:
    """Seconds a call, over `repeats` of them."""
    _synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - began) / repeats


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def alternate(benchmark, calls: dict[str, Call]) -> dict[str, float]:
    """{name: median seconds a call}; the first one is also what pytest-benchmark reports."""
    repeats = {}
    for name, call in calls.items():
        seconds(call, 3)  # warm-up
        repeats[name] = max(1, round(ROUND_SECONDS / seconds(call, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    first = next(iter(calls))
    benchmark.pedantic(seconds, (calls[first], 1), rounds=ROUNDS, iterations=repeats[first])
    return {name: statistics.median(values) for name, values in times.items()}


@pytest.fixture(scope="module")
def figures() -> Iterator[dict]:
    """{operator: {case: {who: seconds a call}}}, written when all are measured."""
    rows: dict = {"randn": {}, "q_sample": {}, "p_sample_step": {}, "group_norm": {}}
    rows |= {"conv2d": {}, "upsample_conv2d": {}, "attention": {}}
    rows |= {"finish_conv2d": {}, "table_rows": {}}
    rows["absent_peers"] = [] if DDPMScheduler else ["diffusers"]
    with torch.inference_mode():
        yield rows
    results.write("ops", rows)


@pytest.fixture(params=[1, torch.get_num_threads()], ids=lambda n: f"{n}_threads")
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def indices(n: int) -> Tensor:
    return torch.arange(n, device=DEVICE)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


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


# Of a network's own operators; on a GPU they are Triton's with either backend.
OWN = BACKENDS[-1] if BACKENDS else ""
needs_own = pytest.mark.skipif(
    OWN not in ("cpu", "triton"), reason="neither C++ nor Triton is here"
)
needs_gpu = pytest.mark.skipif(OWN != "triton", reason="only networks on a GPU have it")
IMAGES = [(16, 128, 32, 32), (64, 24, 28, 28), (1, 256, 16, 16)]


@needs_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_group_norm(benchmark, figures, shape, dtype):
    x = random(*shape).to(dtype).contiguous(memory_format=LAST)
    channels, groups = shape[1], 8
    weight, bias = random(channels), random(channels)
    own = weight.to(dtype), bias.to(dtype)
    target = torch.empty_like(x)
    settings = (None, None, weight, bias, groups, 1e-6, True)
    calls = {
        OWN: lambda: ops.group_norm(x, *settings, backend=OWN),
        "silu(group_norm(x))": lambda: F.silu(F.group_norm(x, groups, *own, 1e-6)),
        "copy": lambda: target.copy_(x),
    }
    kind = str(dtype).removeprefix("torch.")
    figures["group_norm"][f"{shape}, {kind}"] = alternate(benchmark, calls)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_finish_conv2d(benchmark, figures, shape, dtype):
    """Bias, residual and the sums of the next norm, beside the additions alone."""
    x, residual = (random(*shape).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    bias = random(shape[1])
    own, target = bias.to(dtype)[:, None, None], torch.empty_like(x)
    calls = {
        OWN: lambda: ops.finish_conv2d(x, bias, residual, backend=OWN),
        "x + bias + residual": lambda: x + own + residual,
        "copy": lambda: target.copy_(x),
    }
    kind = str(dtype).removeprefix("torch.")
    figures["finish_conv2d"][f"{shape}, {kind}"] = alternate(benchmark, calls)


@needs_gpu
@pytest.mark.parametrize("n", [1, 64])
def test_table_rows(benchmark, figures, n):
    """As Ho et al.'s U-Net has them, beside a plain lookup of places that are known."""
    table, known = random(T, 4992), torch.arange(T, device=DEVICE).float()
    t = (37 * indices(n)) % T
    calls = {
        OWN: lambda: ops.table_rows(table, known, t, backend=OWN),
        "index_select": lambda: table.index_select(0, t),
    }
    figures["table_rows"][f"{n} samples"] = alternate(benchmark, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 24, 28, 28), (1, 96, 7, 7), (16, 96, 7, 7), (1, 256, 16, 16), (16, 256, 16, 16)],
    ids=str,
)  # fmt: skip
def test_conv2d(benchmark, figures, monkeypatch, threads, shape, dtype):
    """3x3 to as many channels, with bias and residual: a layer of a prepared network."""
    if DEVICE.type != "cpu" or not ops.is_conv2d_fastest(dtype):
        pytest.skip("prepared networks use oneDNN here")
    channels, size = shape[1], shape[2:]
    weight, bias = random(channels, channels, 3, 3), random(channels)
    x, residual = (random(*shape).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    own = Conv(weight, bias, dtype, size, (1, 1))
    monkeypatch.setattr(ops, "is_conv2d_fastest", lambda dtype: False)
    onednn = Conv(weight, bias, dtype, size, (1, 1))
    calls = {"cpu": lambda: own(x, residual), "oneDNN, packed": lambda: onednn(x, residual)}
    kind = str(dtype).removeprefix("torch.")
    figures["conv2d"][f"{shape}, {kind}, threads: {threads}"] = alternate(benchmark, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 7, 7), (1, 256, 16, 16), (16, 256, 16, 16)], ids=str)
def test_upsample_conv2d(benchmark, figures, monkeypatch, threads, shape, dtype):
    """Doubling and 3x3; oneDNN's makes all phases side by side, to be put in their places."""
    if DEVICE.type != "cpu" or not ops.is_conv2d_fastest(dtype):
        pytest.skip("prepared networks use oneDNN here")
    conv, size = nn.Conv2d(shape[1], shape[1], 3, padding=1), shape[2:]
    x = random(*shape).to(dtype).contiguous(memory_format=LAST)
    own = UpsampleConv(conv, dtype, size)
    monkeypatch.setattr(ops, "is_conv2d_fastest", lambda dtype: False)
    onednn = UpsampleConv(conv, dtype, size)
    calls = {"cpu": lambda: own(x), "oneDNN, packed, and copies": lambda: onednn(x)}
    kind = str(dtype).removeprefix("torch.")
    figures["upsample_conv2d"][f"{shape}, {kind}, threads: {threads}"] = alternate(benchmark, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 96, 7, 7), (1, 256, 16, 16), (16, 256, 16, 16), (1, 128, 64, 64)], ids=str
)
def test_attention(benchmark, figures, threads, shape, dtype):
    """One head, whose keys are its values: a layer of a prepared network."""
    if DEVICE.type != "cpu" or not ops.is_attention_fastest(dtype):
        pytest.skip("prepared networks use torch's here")
    query, key = (random(*shape).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    query *= shape[1] ** -0.5
    q, k = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (query, key))
    torch_calls = {
        "softmax and bmm": lambda: torch.bmm(torch.bmm(q, k.mT).softmax(-1), k),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
            q[:, None], k[:, None], k[:, None], scale=1.0
        ),
    }
    calls = {"cpu": lambda: ops.attention(query, key, key)} | torch_calls
    kind = str(dtype).removeprefix("torch.")
    figures["attention"][f"{shape}, {kind}, threads: {threads}"] = alternate(benchmark, calls)
