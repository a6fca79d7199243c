"""Whether bfloat16 networks multiply by AMX's tiles, which the CPU itself decides in a trial.

Our own kernels for them ran on an emulator of the instructions alone: their sums are checked there,
but not on every CPU, and nobody timed them. So on a CPU that has tiles, before the first bfloat16
convolution is packed, some are computed by them and by PyTorch, and one is timed against oneDNN's,
which a network has otherwise. It takes some 20 ms, once a process. DDPM_FAST_CPU leaves it out.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

LEVEL = "amx"
# How much slower than oneDNN's they may be: their errors are smaller, calls of small layers cost
# less, and two processes had better not decide differently because of noise.
SLOWEST = 1.15
ROUNDS, CALLS = 7, 3
# (in channels, out channels, kernel, stride, padding, size, dtype of x), the timed one first: rows
# that are copied, and read where they are; tiles that are not full; x that is rounded.
LAYERS = (
    (256, 256, 3, 1, 1, (16, 16), torch.bfloat16),
    (64, 48, 1, 1, 0, (5, 7), torch.bfloat16),
    (40, 24, 3, 2, 1, (9, 8), torch.float16),
)

_lock = threading.RLock()  # the layers of a trial ask which level is in use
_verdict = ""


def verdict() -> str:
    """What this process's trial said; empty where there was none."""
    return _verdict


def settle(extension: ModuleType) -> None:
    """Choose the level, unless that was done, or it is asked for, or the CPU has no tiles."""
    global _verdict
    with _lock:
        if extension.cpu_level_is_asked_for() or LEVEL not in extension.cpu_levels_available():
            return
        chosen = before = extension.cpu_level()
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                is_fit, _verdict = attempt(extension, before)
            chosen = LEVEL if is_fit else before
        finally:
            extension._set_cpu_level(chosen)


def attempt(extension: ModuleType, other: str) -> tuple[bool, str]:
    """Whether tiles are to be used, and why; a warning where their sums are wrong.

    other: the level without them. The level in use is left changed.
    """
    generator = torch.Generator().manual_seed(0)
    timed = None
    for shape in LAYERS:
        weight, bias, x = _case(*shape, generator)
        calls = []
        for level in (other, LEVEL):
            extension._set_cpu_level(level, unchecked=True)
            calls.append(_call(shape, weight, bias, x))
        error = _error(calls[1](), _formula(shape, weight, bias, x))
        if not error <= 1.0:
            warnings.warn(
                f"the AMX kernels give wrong sums on this CPU ({error:.3g} times the bound of "
                "their error), so oneDNN's are used: please report it",
                stacklevel=2,
            )
            return False, "wrong sums in a trial"
        timed = timed or calls
    theirs, ours = _fastest(timed)
    return ours <= SLOWEST * theirs, f"{theirs / ours:.2f} times oneDNN's speed in a trial"


def _case(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's weight and bias, and an x of at least a sample for each core; results about 1."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    weight = normal(out_channels, in_channels, kernel, kernel) / math.sqrt(in_channels * kernel**2)
    x = normal(max(2, torch.get_num_threads()), in_channels, *size).to(dtype)
    return weight, normal(out_channels), x.contiguous(memory_format=torch.channels_last)


def _call(shape: tuple, weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """The layer that a network has at the level in use."""
    from .fused import Conv

    _, _, _, stride, padding, size, _ = shape
    layer = Conv(weight, bias, torch.bfloat16, size, (padding,) * 2, (stride,) * 2)
    if not layer.takes_half:
        x = x.to(torch.bfloat16)
    return lambda: layer(x)


def _formula(shape: tuple, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    _, _, _, stride, padding, _, _ = shape
    x, weight = (v.to(torch.bfloat16).float() for v in (x, weight))
    return F.conv2d(x, weight, bias, stride, padding)


def _error(got: Tensor, want: Tensor) -> float:
    """By its bound, that of a rounding to bfloat16 and of float32 sums; a NaN if there is one."""
    return float(((got.float() - want).abs() / (2**-8 * want.abs() + 1e-4)).max())


def _fastest(calls: list[Callable[[], Tensor]]) -> list[float]:
    """Seconds of each, in turns: the least of them, since other work only adds to it."""
    least = [math.inf] * len(calls)
    for _ in range(1 + ROUNDS):  # the first one is not the least
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[i] = min(least[i], time.perf_counter() - start)
    return least
