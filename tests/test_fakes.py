"""The layers' operators refuse shapes and dtypes without data as their kernels do."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_fast import backend

F16, F32 = torch.float16, torch.float32
RANK = r"of the shape \(N, C, H, W\), but it is \(2, 4, 3"
# Where torch.compile and torch.export run an operator, and what they must not differ from.
PLACES = {"kernel": nullcontext, "meta": lambda: torch.device("meta"), "fake": FakeTensorMode}


def only_text(value):
    return value if isinstance(value, str) else ""


def image(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def group_norm(x, skip=None):
    affine = torch.ones(4 if skip is None else 8)
    return torch.ops.ddpm_fast.group_norm(x, skip, None, affine, affine, 2, 1e-5, True)


NORMS = [
    (lambda: group_norm(torch.zeros(2, 4, 3)), RANK),
    (
        lambda: group_norm(image(2, 4, 3, 3, dtype=torch.float64)),
        "x must be float32, bfloat16 or float16, but it is float64",
    ),
    (lambda: group_norm(image(2, 4, 3, 3), torch.zeros(2, 4, 3)), RANK),
    (lambda: group_norm(image(2, 4, 3, 3), image(2, 4, 3, 5)), "skip must have the samples and"),
    (lambda: group_norm(image(2, 4, 3, 3), image(1, 4, 3, 3)), "skip must have the samples and"),
    (
        lambda: group_norm(image(2, 4, 3, 3), image(2, 4, 3, 3, dtype=F16)),
        "skip must be float32, but",
    ),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("call", "message"), NORMS, ids=only_text)
def test_group_norm(extension, place, call, message):
    with PLACES[place](), pytest.raises(RuntimeError, match=f"^ddpm_fast: .*{message}"):
        call()


def conv2d(packed, x, residual=None, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)):
    settings = (6, kernel_size, stride, padding)
    return torch.ops.ddpm_fast.conv2d(x, torch.zeros(packed), None, residual, *settings)


def upsample(x, *weight):
    return torch.ops.ddpm_fast.upsample_conv2d(x, torch.zeros(weight), None, 6)


CONVOLUTIONS = [
    (lambda n: conv2d(n, torch.zeros(2, 4, 3)), RANK),
    (lambda n: conv2d(n, image(2, 4, 3, 3, dtype=F16)), "float32 (or|and) bfloat16, .* float16"),
    (lambda n: conv2d(n, image(2, 4, 3, 3), kernel_size=[3]), "kernel_size must be two integers"),
    (lambda n: conv2d(n, image(2, 4, 3, 3), stride=[0, 1]), "stride must be two integers from 1"),
    (lambda n: conv2d(n, image(2, 4, 3, 3), padding=[0, -1]), "padding must be two integers from"),
    (lambda n: conv2d(n, image(2, 4, 3, 1), padding=[0, 0]), "as large as the kernel, with its"),
    (lambda n: conv2d(n, image(2, 4, 3, 3), image(2, 6, 3, 4)), "residual must have the shape of"),
    (lambda n: conv2d(n, image(2, 4, 3, 3), padding=[0, 0, 1]), "or four, for top, left, bottom"),
    (
        lambda n: conv2d(n, image(2, 4, 3, 3), image(2, 6, 3, 3), padding=[1, 1, 1, 0]),
        "residual must have the shape of",
    ),
    (lambda n: conv2d(n, image(2, 4, 3, 3), image(2, 6, 3, 3, dtype=F16)), "residual must be fl"),
    (lambda n: upsample(torch.zeros(2, 4, 3), 4, n), RANK),
    (lambda n: upsample(image(2, 4, 3, 3, dtype=F16), 4, n), "float32 (or|and) bfloat16, .* floa"),
    (lambda n: upsample(image(2, 4, 3, 3), 3, n), r"weight must have the shape \(4, packed\)"),
    (lambda n: upsample(image(2, 4, 3, 3), n), r"weight must have the shape \(4, packed\)"),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("call", "message"), CONVOLUTIONS, ids=only_text)
def test_convolutions(no_amx, place, call, message):
    if backend.conv_kernels(F32) is None:
        pytest.skip("this CPU has no AVX2")
    packed = torch.ops.ddpm_fast.pack_conv2d(torch.zeros(6, 4, 3, 3), F32).numel()
    with PLACES[place](), pytest.raises(RuntimeError, match=f"^ddpm_fast: .*{message}"):
        call(packed)


def attention(*inputs):
    return torch.ops.ddpm_fast.attention(*inputs, 1)


ATTENTION = [
    (lambda: attention(*[torch.zeros(2, 4, 3)] * 3), RANK),
    (lambda: attention(*[image(2, 4, 3, 3, dtype=F16)] * 3), "query must be float32 or bfloat16"),
    (
        lambda: attention(image(2, 4, 3, 3), image(2, 4, 3, 5), image(2, 4, 3, 3)),
        r"key must have the shape of query, \(2, 4, 3, 3\), but it is \(2, 4, 3, 5\)",
    ),
    (
        lambda: attention(image(2, 4, 3, 3), image(2, 4, 3, 3), image(2, 4, 3, 3, dtype=F16)),
        "value must be float32, but it is float16",
    ),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("call", "message"), ATTENTION, ids=only_text)
def test_attention(extension, place, call, message):
    if not backend.has_attention(F32):
        pytest.skip("this CPU has no AVX-512")
    with PLACES[place](), pytest.raises(RuntimeError, match=f"^ddpm_fast: .*{message}"):
        call()
