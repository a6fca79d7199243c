"""What is compared, called in rounds that alternate on the device that is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.device import resolve_device

DEVICE = resolve_device("auto")
ROUNDS, ROUND_SECONDS = 15, 0.02
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


def indices(n: int) -> Tensor:
    return torch.arange(n, device=DEVICE)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)
