"""A U-Net prepared for a GPU, and its own operators, on a GPU; only with one."""

import pytest
import torch
from layer_cases import BOUND as OPERATOR_BOUND
from layer_cases import LAST, PHASES, check_finish, check_rows, finish_case
from test_cuda import needs
from test_group_norm import CHANNELS, SIZES, case, formula
from test_inference import CONFIGS
from unet_cases import BF16, BOUND, F32, T, error, inputs, randomized, run

from ddpm_fast import ops
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import FusedUNet, prepare, unfused
from ddpm_fast.sampler import Sampler
from ddpm_fast.unet_config import UNetConfig

pytestmark = needs("triton")
F16 = torch.float16
BOUNDS = {**BOUND, F16: 2e-3}
CUDA = torch.device("cuda")


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_group_norm_is_the_formula(channels):
    for size in [*SIZES, (33, 50), (96, 97)]:
        many = 70 if size in SIZES else 2  # of large ones the formula would take 80 GB
        for dtype, bound in OPERATOR_BOUND.items():
            for n, rows, shifted, silu in ((1, 1, True, True), (many, many, False, False)):
                arguments = case(channels, size, n, dtype, rows, shifted)
                settings = (channels[2], 1e-2, silu)
                want = formula(*arguments, *settings)
                on_gpu = [None if t is None else t.to(CUDA) for t in arguments]
                got = ops.group_norm(*on_gpu, *settings, backend="triton")
                assert got.dtype == dtype and got.is_contiguous(memory_format=LAST)
                assert error(got.cpu().double(), want) < 1.05 * bound


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("phases", "channels"), PHASES, ids=str)
def test_finish_conv2d_equals_the_reference(phases, channels, dtype):
    for has in ((True, True), (True, False), (False, True), (False, False)):
        check_finish(finish_case(phases, channels, dtype, *has), "triton", "cuda")


def test_table_rows_are_the_tables():
    check_rows("triton", "cuda")


def test_a_sample_is_the_same_in_any_batch():
    """Also where a program's share of it is another."""
    arguments = case((256, 128, 32), (32, 32), 64, BF16, rows=64)
    x, skip, *columns = (t.to(CUDA) for t in arguments)
    (x, of_x), (skip, of_skip) = (
        ops.finish_conv2d(t, None, None, backend="triton") for t in (x, skip)
    )

    def normalised(n):
        moments = of_x[:n].contiguous(), of_skip[:n].contiguous()
        first = [t[:n].contiguous(memory_format=LAST) for t in (x, skip)]
        settings = [t[:n] for t in columns]
        return ops.group_norm(*first, *settings, 32, 1e-6, True, moments=moments, backend="triton")

    whole = normalised(64)
    for n in (1, 3, 17):
        assert torch.equal(normalised(n), whole[:n])
        for t, moments in ((x, of_x), (skip, of_skip)):
            one = t[:n].contiguous(memory_format=LAST)
            assert torch.equal(ops.finish_conv2d(one, None, None, backend="triton")[1], moments[:n])


def test_what_nobody_expected_is_nan(class_model):
    network = prepare(class_model.unet, CUDA, F32, backend="triton")
    network.expect([5, 7])
    x = torch.randn(4, *class_model.config.sample_shape, device=CUDA)
    t, labels = torch.tensor([5, 6, 7, 7]), torch.tensor([0, 1, 2, 1000])
    out = network(x, t.to(CUDA), labels.to(CUDA))
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False, True]


def test_a_graph_keeps_the_table_that_it_reads(class_model):
    """Whatever is expected afterwards."""
    settings = {"device": "cuda", "backend": "triton", "steps": 5, "graphs": True}
    sampler = Sampler.from_model(class_model, **settings)
    want = sampler.sample(3, batch_size=3)
    for first in range(100, 130):
        sampler.network.expect(range(first, first + 5))
    torch.cuda.empty_cache()
    taken = [torch.full((1 << 20,), torch.nan, device=CUDA) for _ in range(64)]
    assert torch.equal(sampler.sample(3, batch_size=3), want) and taken


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_another_gpu_than_the_current_one(class_model):
    settings = {"backend": "triton", "steps": 5}
    runs = [
        Sampler.from_model(class_model, device=f"cuda:{i}", **settings).sample(3, batch_size=3)
        for i in range(2)
    ]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


def check_network(unet, dtype, n=6, bound=None):
    arguments = inputs(unet.config, n)
    want = run(unet, F32, *arguments)
    network = prepare(unet, CUDA, dtype, backend="triton")
    assert isinstance(network, FusedUNet)
    on_gpu = [None if t is None else t.to(CUDA) for t in arguments]
    for _ in range(2):
        got = run(network, dtype, *on_gpu).cpu()
        assert error(got, want) < (bound or BOUNDS[dtype])
        network.expect(T.tolist())
    return network


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_every_configuration_computes_the_same(change, dtype, tiny_config):
    """A thin network rounds more than a wide one."""
    check_network(randomized(tiny_config(**change)), dtype, bound=2 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_published_cifar10_model_and_the_shipped_one(dtype):
    for unet in (randomized(UNetConfig()), load_model("mnist").unet):
        assert unfused(check_network(unet, dtype)) == []


def test_a_hosts_settings_change_nothing():
    """Of TF32 in convolutions, whose default is on, and of autocast."""
    unet = load_model("mnist").unet
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            with torch.autocast("cuda", torch.bfloat16, enabled=allowed):
                check_network(unet, F32)
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_captured_equals_eager(dtype, name, class_model):
    """With the prepared network, whose kernels both have chosen by then."""
    if name == "cuda" and needs("cuda").args[0]:
        pytest.skip("this build has no CUDA kernels")
    settings = {"device": "cuda", "backend": name, "dtype": dtype, "steps": 20}
    runs = []
    for graphs in (True, False):
        sampler = Sampler.from_model(class_model, graphs=graphs, **settings)
        assert isinstance(sampler.network, FusedUNet) and sampler.graphs == graphs
        runs.append(sampler.sample(7, batch_size=4, classes=[2, 0, 1]))
    assert runs[0].isfinite().all() and torch.equal(*runs)
    fused = Sampler.from_model(class_model, fused=False, **settings)
    assert not isinstance(fused.network, FusedUNet)


def test_what_was_prepared_for_a_gpu_stays_there(tiny_config):
    network = prepare(randomized(tiny_config()), CUDA, BF16, backend="triton")
    assert torch.nn.Sequential(network).to("cuda", BF16)[0] is network
    with pytest.raises(ValueError, match=r"prepared for bfloat16 on cuda:0, .*bfloat16 on cpu"):
        network.cpu()
