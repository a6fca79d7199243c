"""`ops.group_norm` against the formula in float64, at every instruction-set level."""

import pytest
import torch
import torch.nn.functional as F
from step_cases import LEVELS

from ddpm_fast import ops

LAST = torch.channels_last
# (channels of x, of skip, groups): groups of any width, also across the two inputs, and more
# channels than a row of the kernel has.
CHANNELS = [(24, 0, 8), (24, 24, 8), (48, 24, 8), (256, 128, 32), (3, 2, 5), (20, 12, 4)]
CHANNELS += [(1, 0, 1), (1, 5, 2), (1100, 0, 1), (2048, 512, 4)]
SIZES = [(28, 28), (7, 7), (2, 3)]
# (dtype of x, whether the result is float16, bound)
KINDS = [(torch.float32, False, 5e-7), (torch.bfloat16, False, 4e-3)]
KINDS += [(torch.bfloat16, True, 5e-4), (torch.float16, False, 5e-4)]


def case(channels, size, n=3, dtype=torch.float32, rows=1, shifted=True):
    """The arguments up to bias; the inputs' mean and spread are those of an activation."""
    generator = torch.Generator().manual_seed(sum(channels) + n)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    first, second, _ = channels
    x = (2 * draw(n, first, *size) + 3).to(dtype).contiguous(memory_format=LAST)
    skip = None
    if second:
        skip = (draw(n, second, *size) - 1).to(dtype).contiguous(memory_format=LAST)
    # Columns of a wider table, as the network's are.
    shift, weight, bias = draw(rows, 3 * (first + second) + 2)[:, 2:].chunk(3, 1)
    return x, skip, shift if shifted else None, weight, bias


def formula(x, skip, shift, weight, bias, groups, eps, silu):
    h = x.double() if skip is None else torch.cat((x, skip), 1).double()
    if shift is not None:
        h = h + shift.double()[:, :, None, None]
    parts = h.reshape(len(h), groups, -1)
    mean, var = parts.mean(-1, keepdim=True), parts.var(-1, keepdim=True, unbiased=False)
    h = ((parts - mean) / (var + eps).sqrt()).reshape(h.shape)
    h = h * weight.double()[:, :, None, None] + bias.double()[:, :, None, None]
    return h / (1 + (-h).exp()) if silu else h


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_it_is_the_formula(extension, channels):
    for size in SIZES:
        for n, rows, shifted, silu in (
            (1, 1, True, True),
            (3, 3, True, True),
            (3, 1, False, False),
        ):
            for dtype, half, bound in KINDS if n == 1 else KINDS[:2]:
                arguments = case(channels, size, n, dtype, rows, shifted)
                settings = (channels[2], 1e-2, silu)
                kept = torch.float16 if half else dtype
                want = formula(*arguments, *settings)
                for level in LEVELS:
                    extension._set_cpu_level(level)
                    got = ops.group_norm(*arguments, *settings, half, backend="cpu")
                    assert got.dtype == kept and got.is_contiguous(memory_format=LAST)
                    assert error(got, want) < bound, level
                plain = ops.group_norm(*arguments, *settings, half, backend="reference")
                # PyTorch's own sums are plainer.
                assert plain.dtype == kept and error(plain, want) < max(bound, 5e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 4e-6), (torch.bfloat16, 2**-8 + 2**-11)])
def test_silu_is_right_everywhere(extension, level, dtype, bound):
    """The norm of 1 and -1 is that again, so that the weight v makes v and -v of them."""
    extension._set_cpu_level(level)
    values = torch.cat((torch.linspace(0.01, 100, 4001), torch.tensor([300.0, 1e4])))
    signs = torch.tensor([1.0, -1.0]).expand(len(values), 2)
    x = signs.to(dtype)[:, :, None, None].contiguous(memory_format=LAST)
    weight, bias = values[:, None].repeat(1, 2), torch.zeros(len(values), 2)
    got = ops.group_norm(x, None, None, weight, bias, 1, 0.0, True).double()[:, :, 0, 0]
    inputs = (signs * weight).double()
    want = F.silu(inputs)
    apart = (got - want).abs() / want.abs()
    assert apart[inputs > -80].max() < bound and got[inputs <= -80].abs().max() < 1e-30


def test_a_large_mean_costs_no_accuracy(extension):
    x, _, _, weight, bias = case((32, 0, 8), (32, 32))
    settings = (8, 1e-6, False)
    x = x + 1000
    want = formula(x, None, None, weight, bias, *settings)
    assert error(ops.group_norm(x, None, None, weight, bias, *settings), want) < 1e-4


def test_what_is_not_finite_stays_so(extension):
    x, _, _, weight, bias = case((16, 0, 2), (4, 4))
    for bad in (float("nan"), float("inf")):
        broken = x.clone(memory_format=LAST)
        broken[1, 3] = bad
        got = ops.group_norm(broken, None, None, weight, bias, 2, 1e-6, True)
        assert got[1, :8].isnan().all() and got[1, 8:].isfinite().all()
        assert torch.equal(got[0], ops.group_norm(x, None, None, weight, bias, 2, 1e-6, True)[0])


@pytest.mark.parametrize("channels", [(48, 24, 8), (128, 64, 32), (200, 56, 8)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_number_of_threads_and_the_place_change_no_bit(extension, channels, n):
    for dtype in (torch.float32, torch.bfloat16):
        x, skip, *rest = case(channels, (28, 28), n, dtype)
        settings = (*rest, channels[2], 1e-6, True)
        torch.set_num_threads(1)
        want = ops.group_norm(x, skip, *settings)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.group_norm(x, skip, *settings), want)
        turned = (v.flip(0).contiguous(memory_format=LAST) for v in (x, skip))
        assert torch.equal(ops.group_norm(*turned, *settings).flip(0), want)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 4, 3, 5)}, "x must be channels_last without gaps"),
        (
            {"x": torch.zeros(2, 4, 3, 5, dtype=torch.float64)},
            "float32, bfloat16 or float16, but it is float64",
        ),
        ({"half": True}, "half is for an x of bfloat16 or float16, but it is float32"),
        (
            {"skip": torch.zeros(2, 4, 3, 6).contiguous(memory_format=LAST)},
            r"have the samples and the sizes of x, \(2, 4, 3, 5\)",
        ),
        ({"skip": torch.zeros(2, 4, 3, 5, dtype=torch.bfloat16)}, "skip must be float32"),
        ({"groups": 3}, "groups must divide the 4 channels, but it is 3"),
        ({"groups": 0}, "groups must divide"),
        ({"weight": torch.zeros(1, 3)}, r"weight must have the shape \(4,\), \(1, 4\) or \(2, 4\)"),
        ({"shift": torch.zeros(3, 4)}, "shift must have the shape"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, "bias must be float32"),
        ({"bias": torch.zeros(2, 4)}, "weight and bias must have the same rows"),
    ],
)
def test_what_does_not_fit_is_refused(extension, change, message):
    arguments = {
        "x": torch.zeros(2, 4, 3, 5).contiguous(memory_format=LAST),
        "skip": None,
        "shift": None,
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "groups": 2,
    } | change
    with pytest.raises(RuntimeError, match=message):
        ops.group_norm(**arguments, eps=1e-6, silu=True, backend="cpu")
