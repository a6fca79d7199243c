"""A U-Net's own Triton kernels in the interpreter, against the formulas; see test_triton.py."""

from __future__ import annotations

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_the_interpreter
from layer_cases import BOUND, LAST, PHASES, check_finish, check_rows, finish_case
from test_group_norm import case, error, formula
from unet_cases import inputs, randomized, run

from ddpm_fast import ops
from ddpm_fast.unet_config import UNetConfig

pytest.importorskip("triton", reason="triton is not installed")

F32, F16 = torch.float32, torch.float16  # the interpreter's bfloat16 is rounded otherwise


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


# (channels of x, of skip, groups), size: groups of any width, across tiles and the two inputs; many
# parts of pixels, the last of them shorter, each in one go or several.
NORMS = [
    ((24, 0, 8), (7, 7)),
    ((24, 24, 8), (2, 3)),
    ((3, 2, 5), (7, 7)),
    ((20, 12, 4), (9, 9)),
    ((1, 5, 2), (1, 40)),
    ((160, 32, 16), (2, 3)),
    ((136, 0, 1), (2, 3)),
]
# The last one's groups are too wide for the kernel.
LARGE = [((4, 0, 2), (50, 61)), ((2, 0, 1), (96, 97)), ((1100, 0, 1), (3, 3))]


@interpreted
@pytest.mark.parametrize(("channels", "size"), NORMS, ids=str)
def test_group_norm_is_the_formula(channels, size):
    for n, rows, shifted, silu, dtype in ((3, 3, True, True, F32), (2, 1, False, False, F16)):
        arguments = case(channels, size, n, dtype, rows, shifted)
        settings = (channels[2], 1e-2, silu)
        got = ops.group_norm(*arguments, *settings, backend="triton")
        assert got.dtype == dtype and got.is_contiguous(memory_format=LAST)
        assert error(got, formula(*arguments, *settings)) < BOUND[dtype]


@interpreted
@pytest.mark.parametrize(("channels", "size"), LARGE, ids=str)
def test_group_norm_of_many_pixels(channels, size, monkeypatch):
    monkeypatch.setattr("ddpm_fast.triton_layers.NORM_PIXELS", 256)  # which is sooner done here
    arguments, settings = case(channels, size, 1), (channels[2], 1e-2, True)
    got = ops.group_norm(*arguments, *settings, backend="triton")
    assert error(got, formula(*arguments, *settings)) < BOUND[F32]


@interpreted
def test_a_mean_far_from_0_costs_little():
    x, _, shift, weight, bias = case((16, 0, 4), (20, 20))
    arguments = x + 3000, None, shift - 1000, weight, bias
    got = ops.group_norm(*arguments, 4, 1e-5, True, backend="triton")
    assert error(got, formula(*arguments, 4, 1e-5, True)) < 3e-4  # x itself is off by 1e-4


@interpreted
def test_a_sample_is_the_same_in_any_batch(monkeypatch):
    """Whatever a program's share of it is."""
    arguments = case((24, 24, 8), (20, 13), rows=3)
    whole = ops.group_norm(*arguments, 8, 1e-5, True, backend="triton")
    monkeypatch.setattr("ddpm_fast.triton_layers.MANY", 1)
    for i in range(3):
        one = [t[i : i + 1] for t in arguments]
        got = ops.group_norm(*one, 8, 1e-5, True, backend="triton")
        assert torch.equal(got, whole[i : i + 1])


@interpreted
def test_moments_that_are_there_are_not_made_again():
    x, skip, shift, weight, bias = case((24, 24, 8), (13, 10), rows=3)
    (x, of_x), (skip, of_skip) = (
        ops.finish_conv2d(t, None, None, backend="triton") for t in (x, skip)
    )
    settings = (shift, weight, bias, 8, 1e-5, True)
    want = ops.group_norm(x, skip, *settings, backend="triton")
    for moments in ((of_x, of_skip), (None, of_skip), (of_x, None)):
        got = ops.group_norm(x, skip, *settings, moments=moments, backend="triton")
        assert torch.equal(got, want)
    got = ops.group_norm(x, skip, *settings, moments=(of_x, 2 * of_skip), backend="triton")
    assert not torch.equal(got, want)


@interpreted
@pytest.mark.parametrize(("phases", "channels"), PHASES, ids=str)
def test_finish_conv2d_equals_the_reference(phases, channels):
    for dtype in (F32, F16):
        for has in ((True, True), (True, False), (False, True), (False, False)):
            check_finish(finish_case(phases, channels, dtype, *has), "triton")


@interpreted
def test_table_rows_are_the_tables():
    check_rows("triton")


CONFIGS = [
    {"resblock_updown": True, "scale_shift_norm": True, "num_heads": 2, "num_classes": 3},
    {"sample_size": (16,)},
]


@interpreted
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_whole_network(change, tiny_config):
    from ddpm_fast.fused_cuda import GpuLayers
    from ddpm_fast.inference import FusedUNet

    config: UNetConfig = tiny_config(**change)
    unet, arguments = randomized(config), inputs(config, 2)
    want = run(unet, F32, *arguments)
    network = FusedUNet(unet, GpuLayers(torch.device("cpu"), F32, "triton"))
    for _ in range(2):
        assert error(run(network, F32, *arguments), want) < 1e-5
        network.expect([*arguments[1].tolist(), 50])
