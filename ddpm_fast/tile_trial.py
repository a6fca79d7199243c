"""Whether bfloat16 networks multiply by AMX's tiles, which is tried on the CPU itself.

Our own kernels for tiles ran on an emulator of the instructions alone. So on a CPU that has them,
before a process packs its first bfloat16 convolution, some convolutions and attention are computed
by tiles and by PyTorch, and one is timed against oneDNN's, which a network has otherwise.
DDPM_FAST_CPU decides without it.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVEL = "amx"
# How much slower than oneDNN's they may be. Only what went wrong is so slow: a choice near the
# speeds to be expected would differ from process to process, and with it last bits; and our errors
# are smaller.
SLOWEST = 1.5
ROUNDS, CALLS = 8, 3
_BF16, _F16 = torch.bfloat16, torch.float16
_own, _onednn = torch.ops.ddpm_fast, torch.ops.mkldnn


class Layer(NamedTuple):
    """A convolution without bias; padding keeps the size."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: tuple[int, int]
    dtype: torch.dtype  # of x

    @property
    def place(self) -> tuple[list[int], list[int]]:
        """(stride, padding)."""
        return [self.stride] * 2, [self.kernel // 2] * 2


TIMED = Layer(256, 256, 3, 1, (16, 16), _F16)
# x that is copied and rounded, also with stride; x that is read where it is, and a last tile of it
# that is not full.
CHECKED = (TIMED, Layer(40, 24, 3, 2, (9, 8), _F16), Layer(64, 48, 1, 1, (5, 7), _BF16))
SAMPLES = 3

_lock = threading.Lock()
_is_settled = False
_verdict = ""


def verdict() -> str:
    """What this process's trial said; empty where there was none."""
    return _verdict


def settle(extension: ModuleType) -> None:
    """Choose the extension's level, once a process."""
    global _is_settled, _verdict
    if _is_settled:
        return
    warning = ""
    with _lock:
        if _is_settled:
            return
        levels = extension.cpu_levels_available()
        if LEVEL in levels and not os.environ.get("DDPM_FAST_CPU"):
            is_fit = False
            extension._set_cpu_level(LEVEL)
            try:
                is_fit, _verdict, warning = _in_a_thread(_attempt)
            except Exception as error:
                _verdict, warning = "its trial failed", f"had no trial ({error})"
            finally:
                if not is_fit:
                    extension._set_cpu_level(levels[levels.index(LEVEL) - 1])
        _is_settled = True
    if warning:
        warnings.warn(
            f"the kernels for AMX {warning}, so oneDNN's are used: please report it", stacklevel=3
        )


def _in_a_thread(function: Callable[[], tuple[bool, str, str]]) -> tuple[bool, str, str]:
    """Its result, away from this thread's modes: autocast, inference, fake tensors, a device."""
    results: list[tuple[bool, str, str] | BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _attempt() -> tuple[bool, str, str]:
    """Whether to use tiles; why; and what to warn of. The level in use has them."""
    generator = torch.Generator().manual_seed(0)
    for check in (*(partial(_convolution_error, layer) for layer in CHECKED), _attention_error):
        if not (error := check(generator)) <= 1.0:
            warning = f"give wrong sums ({error:.3g} times their bound)"
            return False, "wrong sums in a trial", warning
    if not torch.backends.mkldnn.is_available():
        return True, "right sums in a trial", ""
    weight, x = _case(TIMED, generator)
    # A sample for each core; tiles take float16 in a network, oneDNN's bfloat16.
    x = x[:1].repeat(torch.get_num_threads(), 1, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    ours = partial(_by_tiles(TIMED, weight), x)
    theirs = partial(_by_onednn(TIMED, weight, x), x.to(_BF16))
    seconds, others = _fastest([ours, theirs])
    said = f"{others / seconds:.2f} times oneDNN's speed in a trial"
    return seconds <= SLOWEST * others, said, ""


def _case(layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight and x; results are about 1."""
    shape = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
    normal = partial(torch.randn, generator=generator, dtype=torch.float32)
    weight = normal(shape) / math.sqrt(math.prod(shape[1:]))
    x = normal((SAMPLES, layer.in_channels, *layer.size)).to(layer.dtype)
    return weight, x.contiguous(memory_format=torch.channels_last)


def _by_tiles(layer: Layer, weight: Tensor) -> Callable[[Tensor], Tensor]:
    packed = _own.pack_conv2d.default(weight, _BF16, False)
    rest = layer.out_channels, [layer.kernel] * 2, *layer.place, False, False
    return lambda x: _own.conv2d.default(x, packed, None, None, *rest)


def _by_onednn(layer: Layer, weight: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    stride, padding = layer.place
    place = padding, stride, [1, 1], 1
    packed = _onednn._reorder_convolution_weight(weight.to(_BF16), *place, list(x.shape))
    return lambda x: _onednn._convolution_pointwise(x, packed, None, *place, "none", [], "")


def _convolution_error(layer: Layer, generator: torch.Generator) -> float:
    weight, x = _case(layer, generator)
    return _error(_by_tiles(layer, weight)(x), _formula(layer, weight, x))


def _attention_error(generator: torch.Generator) -> float:
    """Two heads; neither channels nor positions fill tiles. Weights are rounded, too."""
    heads, channels, size = 2, 40, (7, 7)
    shape = (SAMPLES, 3 * heads * channels, *size)
    values = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.5).to(_BF16)
    values = values.contiguous(memory_format=torch.channels_last)
    got = _own.attention.default(*values.chunk(3, 1), heads)
    q, k, v = (x.flatten(2).unflatten(1, (heads, -1)).mT for x in values.float().chunk(3, 1))
    want, terms = (_attention(q, k, x).mT.reshape(got.shape) for x in (v, v.abs()))
    return _error(got, want, terms)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1) @ value


def _formula(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x.to(_BF16).float(), weight.to(_BF16).float(), None, *layer.place)


def _error(got: Tensor, want: Tensor, rounded: Tensor | float = 0.0) -> float:
    """By its bound, that of a rounding to bfloat16 and of float32 sums; a NaN if there is one.

    rounded: what was rounded before.
    """
    bound = 2**-8 * (want.abs() + rounded) + 1e-4
    return float(((got.float() - want).abs() / bound).max())


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


def _forget_lock() -> None:
    """In a child of a process whose trial was under way: its thread is not here."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
