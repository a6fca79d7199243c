"""What the operators of a U-Net on a GPU are given, and how far their results may be off."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import ops

LAST = torch.channels_last
# Of a norm, relative: float32 sums; one rounding to the dtype.
BOUND = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
PHASES = [((1, 1), 20), ((2, 2), 5), ((1, 2), 10)]  # and the result's channels, of x's 20


def finish_case(
    phases: tuple[int, int], channels: int, dtype: torch.dtype, has_bias: bool, has_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, int]]:
    """The arguments of `finish_conv2d`: 8 x 9 pixels of 20 channels, in a few parts if doubled."""
    generator = torch.Generator().manual_seed(channels)

    def image(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=LAST)

    x = image(2, 20, 8, 9)
    size = tuple((n - k + 1) * k for n, k in zip((8, 9), phases, strict=True))
    bias = torch.randn(channels, generator=generator) if has_bias else None
    return x, bias, image(2, channels, *size) if has_residual else None, phases


def check_finish(arguments: tuple, backend: str, device: str = "cpu") -> None:
    """Against the reference on the CPU: the same bits, and moments but for the order of sums."""
    moved = [t.to(device) if isinstance(t, Tensor) else t for t in arguments]
    got, moments = (t.cpu() for t in ops.finish_conv2d(*moved, backend=backend))
    want, want_moments = ops.finish_conv2d(*arguments, backend="reference")
    assert got.dtype == want.dtype and got.is_contiguous(memory_format=LAST)
    assert torch.equal(got, want)
    torch.testing.assert_close(moments, want_moments, rtol=1e-5, atol=1e-5)


TABLE = torch.randn(3 * 7, 2500, generator=torch.Generator().manual_seed(0))
KNOWN = torch.tensor([1.0, 5.5, 7.0, 9.0, 12.0, 100.0, 999.0])


def check_rows(backend: str, device: str = "cpu") -> None:
    """Of known timesteps the table's bits; of others NaN, and of labels that there are not."""
    labels = torch.tensor([0, 2, 1, 1], device=device)
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        first = 5.5 if dtype.is_floating_point else 12
        t = torch.tensor([first, 999, 3, 1], dtype=dtype)
        for given in (None, labels):
            tensors = [x.to(device) for x in (TABLE, KNOWN, t)]
            got = ops.table_rows(*tensors, given, backend=backend).cpu()
            place = torch.tensor([KNOWN.tolist().index(first), 6, 0, 0])
            want = TABLE[place if given is None else place + 7 * labels.cpu()]
            assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]]) and got[2].isnan().all()
    t = torch.tensor([999, 999, 1, 1], device=device)
    labels = torch.tensor([3, -1, 2, 2**40], device=device)
    got = ops.table_rows(TABLE.to(device), KNOWN.to(device), t, labels, backend=backend).cpu()
    assert torch.equal(got[2], TABLE[14]) and got[[0, 1, 3]].isnan().all()
