"""Which device, and which number formats it is fast in."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

LARGEST_LEARNT = 7 << 22  # bytes; with what allocators add still below 32 MiB
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """The device called `name`: "auto", "cpu", "cuda" or "cuda:i"; ValueError if it is absent.

    local_rank: of one process of several on this machine, which share out its GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:i, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:i, got {name!r}")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(
                f"device {name!r} was asked for, but this torch ({torch.__version__}) sees "
                f"{found} CUDA devices: use --device cpu, or install a CUDA build of torch"
            )
    return device if device.type == "cuda" else torch.device("cpu")


def with_index(device: torch.device) -> torch.device:
    """A GPU by its number: "cuda" is the current one, which may change."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether the machine multiplies bfloat16 faster than float32 (AMX, AVX512-BF16, Ampere on)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The network's dtype: "auto" is bfloat16 where that is fast, float32 elsewhere.

    ValueError for a name that is neither "auto" nor in DTYPES.
    """
    if name == "auto":
        return torch.bfloat16 if is_bfloat16_fast(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


def memory_format(device: torch.device, dtype: torch.dtype, ndim: int) -> torch.memory_format:
    """The order of a network's tensors of `ndim` dimensions that its layers are fastest in.

    channels_last for images, but for bfloat16 on a CPU: oneDNN reorders for its convolutions
    either way, and PyTorch's GroupNorm is much slower on channels_last there.
    """
    slow = device.type == "cpu" and dtype == torch.bfloat16
    return torch.channels_last if ndim == 4 and not slow else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x, contiguous if it is in neither of a network's two orders: what is made like it, too."""
    orders = [torch.contiguous_format] + [torch.channels_last] * (x.ndim == 4)
    return x if any(x.is_contiguous(memory_format=order) for order in orders) else x.contiguous()


def keep_freed_memory() -> None:
    """Have glibc keep what one layer frees for the next; in the whole process.

    Else it gives megabytes back to the kernel, which clears every page again, thousands of them in
    each evaluation of a network. It learns from what is freed: once that was a block of 28 MiB,
    which came from the kernel, only larger ones do, and only what lies free beyond 56 MiB goes back
    (mallopt(3), M_MMAP_THRESHOLD). So it does by itself in programs that free such a block; where
    their settings forbid it to learn, they hold. No other allocator is touched.
    """
    torch.empty(LARGEST_LEARNT, dtype=torch.uint8, device="cpu")


def give_back_freed_memory() -> None:
    """Have glibc return to the kernel the pages that lie free between others; it changes no rule.

    Else only what is freed at an arena's end goes back, and other threads cannot use the rest.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
