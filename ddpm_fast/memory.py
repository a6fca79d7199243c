"""Where tensors' elements lie, and what a backend in Python asks of it: as csrc/torch_checks.h."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from torch import Tensor


class Layout(NamedTuple):
    """How far apart samples, channels and pixels lie, in elements."""

    sample: int
    channel: int
    pixel: int


def fail(message: str) -> NoReturn:
    raise RuntimeError(f"ddpm_fast: {message}")


def require(condition: bool, message: str) -> None:
    if not condition:
        fail(message)


def channels_and_pixels(t: Tensor) -> tuple[int, int]:
    return t.shape[1] if t.ndim > 1 else 1, t.shape[2:].numel()


def layout_of(t: Tensor) -> Layout | None:
    """The tensor's memory order, if its pixels lie at one stride."""
    channels, pixels = channels_and_pixels(t)
    inner, step = 0, 1  # pixels of the dimensions seen so far, 0 before the first; their stride
    for size, stride in zip(t.shape[:1:-1], t.stride()[:1:-1], strict=True):
        if size == 1:
            continue
        if inner == 0:
            inner, step = 1, stride
        if stride != step * inner:
            return None
        inner *= size
    return Layout(t.stride(0), t.stride(1) if channels > 1 else pixels, step)


def walkable(t: Tensor | None) -> Tensor | None:
    """`t`, or a contiguous copy if the kernels cannot walk it; never for a tensor written to."""
    return t if t is None or layout_of(t) else t.contiguous()


def writable(name: str, t: Tensor) -> None:
    """Every element has its own address, in an order that the kernels can walk."""
    layout = layout_of(t)
    require(
        layout is not None and _is_distinct(t, layout),
        f"{name} is written, so it must be contiguous, channels_last or a slice of such a tensor;"
        " pass one that is.",
    )


def _is_distinct(t: Tensor, layout: Layout) -> bool:
    """Whether no two elements share an address: from the narrowest stride on, each dimension
    clears what the ones before it span.
    """
    span = 1
    for stride, size in sorted(zip(layout, (len(t), *channels_and_pixels(t)), strict=True)):
        if size > 1:
            if stride < span:
                return False
            span += stride * (size - 1)
    return True


def _extent(t: Tensor) -> tuple[int, int]:
    """[first, last) of the bytes that a tensor reaches."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def separate(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """What is written shares memory with nothing else."""
    everything = [
        (name, *_extent(t)) for name, t in (written | read).items() if t is not None and t.numel()
    ]
    for i, (name, first, last) in enumerate(everything):
        for other, other_first, other_last in everything[i + 1 :] if name in written else ():
            require(
                last <= other_first or other_last <= first,
                f"{name} is written while {other} is read, so they must not share memory; pass a"
                " clone.",
            )
