"""What the convolutions refuse, in a sentence: what was wanted and what came."""

import pytest
import torch
from conv_cases import BF16, F32, LAST, needs_bfloat16

from ddpm_fast import backend, ops


@needs_bfloat16
@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 4, 3, 5, dtype=BF16)}, "x must be channels_last without gaps"),
        ({"x": torch.zeros(2, 4, 3, 5).half()}, "float32 and bfloat16, but the dtype is float16"),
        ({"x": torch.zeros(2, 4, 5, dtype=BF16)}, r"the shape \(N, C, H, W\), but it is \(2, 4, 5"),
        ({"x": torch.zeros(2, 0, 3, 5, dtype=BF16)}, "must have channels, but they have 0 and 6"),
        ({"x": torch.zeros(2, 6, 3, 5, dtype=BF16).contiguous(memory_format=LAST)},
         r"pack_conv2d makes of a weight \(6, 6, 3, 3\)"),
        ({"padding": [0, -1]}, "padding must be two integers from 0 to 1024"),
        ({"padding": [0, 0, 1]}, "or four, for top, left, bottom and right"),
        ({"padding": [0, 0, 0, -1]}, "or four, for top, left, bottom and right"),
        ({"padding": [0, 0], "kernel_size": [5, 1]}, "as large as the kernel, with its padding"),
        ({"stride": [0, 1]}, "stride must be two integers from 1"),
        ({"kernel_size": [3]}, "kernel_size must be two integers"),
        ({"winograd": True}, "weight must be float16, but it is bfloat16"),
        ({"winograd": True, "stride": [1, 2]}, "winograd is for stride 1, but it is 1 and 2"),
        ({"winograd": True, "kernel_size": [3, 2]}, "kernels of 3 x 3, but this is 3 x 2"),
        ({"half": True}, "half is for an x of float16, but it is bfloat16"),
        ({"weight": torch.zeros(6, 4, 3, 3, dtype=BF16)}, "weight must be what pack_conv2d makes"),
        ({"weight": torch.zeros(6)}, "weight must be bfloat16, but it is float32"),
        ({"bias": torch.zeros(4)}, r"bias must have the shape \(6,\), but it is \(4\)"),
        ({"bias": torch.zeros(6, dtype=BF16)}, "bias must be float32, but it is bfloat16"),
        ({"residual": torch.zeros(2, 6, 3, 4, dtype=BF16).contiguous(memory_format=LAST)},
         r"residual must have the shape of the result, \(2, 6, 3, 5\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(no_amx, change, message):
    arguments = {
        "x": torch.zeros(2, 4, 3, 5, dtype=BF16).contiguous(memory_format=LAST),
        "weight": ops.pack_conv2d(torch.zeros(6, 4, 3, 3), BF16),
        "bias": None,
        "residual": None,
        "out_channels": 6,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
    } | change
    with pytest.raises(RuntimeError, match=message):
        ops.conv2d(**arguments)


@needs_bfloat16
@pytest.mark.parametrize(
    "weight,message",
    [
        (torch.zeros(3, 512, dtype=BF16), r"shape \(4, packed\), or \(2, packed\) .* \(3, 512\)"),
        (torch.zeros(4, 7, dtype=BF16), r"pack_conv2d makes of 4 weights \(6, 4, 2, 2\)"),
        (torch.zeros(4, 7), "weight must be bfloat16, but it is float32"),
    ],
)
def test_an_upsamplings_weights_that_do_not_fit_are_refused(weight, message):
    x = torch.zeros(2, 4, 3, 5, dtype=BF16).contiguous(memory_format=LAST)
    with pytest.raises(RuntimeError, match=message):
        ops.upsample_conv2d(x, weight, None, 6)


@needs_bfloat16
@pytest.mark.parametrize(
    "weight,dtype,winograd,message",
    [
        (torch.zeros(2, 3, 1, 1).half(), BF16, False, "weight must be float32"),
        (torch.zeros(2, 0, 1, 1), BF16, False, "not empty, but it is"),
        (torch.zeros(2, 3, 1, 1), torch.float16, False, "but the dtype is float16"),
        (torch.zeros(2, 3, 1, 1), BF16, True, "kernels of 3 x 3, but this is 1 x 1"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(no_amx, weight, dtype, winograd, message):
    with pytest.raises(RuntimeError, match=message):
        ops.pack_conv2d(weight, dtype, winograd)


def test_a_lower_level_has_none(extension):
    extension._set_cpu_level("baseline")
    for dtype, wanted in ((F32, "AVX2"), (BF16, "AVX512-BF16")):
        assert backend.conv_kernels(dtype) is None and not ops.is_conv2d_fastest(dtype)
        with pytest.raises(RuntimeError, match=f"conv2d needs a CPU with {wanted}"):
            ops.pack_conv2d(torch.zeros(2, 2, 1, 1), dtype)
