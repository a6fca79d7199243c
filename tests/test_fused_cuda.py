"""A U-Net prepared for a GPU, its kernels replaced by their references: its algebra, on a CPU."""

import copy
import pickle
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from layer_cases import LAST, PHASES, check_rows, finish_case
from recording import recorded
from test_inference import CONFIGS
from torch.utils._python_dispatch import TorchDispatchMode
from unet_cases import BF16, BOUND, CPU, F32, T, error, inputs, randomized, run

from ddpm_fast import backend, fused_cuda, inference, moments, ops
from ddpm_fast.checkpoint import load_model
from ddpm_fast.fused_cuda import GpuLayers
from ddpm_fast.inference import FusedUNet, prepare, unfused
from ddpm_fast.sampler import Sampler
from ddpm_fast.time_table import DeviceTimeTable
from ddpm_fast.unet import UNet
from ddpm_fast.unet_config import UNetConfig

F16 = torch.float16
VIEWS = {
    f"aten::{name}" for name in ("view", "permute", "t", "transpose", "split", "split_with_sizes")
}
VIEWS |= {f"aten::{name}" for name in ("expand", "unsqueeze", "alias", "select", "detach")}
BOUNDS = {**BOUND, F16: 2e-3}


def prepared(unet, dtype, device=CPU):
    return FusedUNet(unet, GpuLayers(device, dtype, "reference"))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_every_configuration_computes_the_same(change, dtype, tiny_config):
    config = tiny_config(**change)
    unet, arguments = randomized(config), inputs(config)
    want = run(unet, F32, *arguments)
    network = prepared(unet, dtype)
    bound = BOUNDS[dtype]
    if dtype == BF16:  # a thin network rounds more: PyTorch's own is the measure
        plain = prepare(unet, CPU, dtype, fused=False)
        bound = max(bound, 1.25 * error(run(plain, dtype, *arguments), want))
    got = run(network, dtype, *arguments)
    assert got.shape == want.shape and error(got, want) < bound
    network.expect(T.tolist())  # and from a table
    assert error(run(network, dtype, *arguments), got) < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_shipped_model(dtype):
    unet = load_model("mnist").unet
    network, (x, _, _) = prepared(unet, dtype), inputs(unet.config)
    network.expect(T.tolist())
    for labels in (None, torch.arange(len(x))):
        want = run(unet, F32, x, T, labels)
        assert error(run(network, dtype, x, T, labels), want) < BOUNDS[dtype]
    assert unfused(network) == []


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_published_cifar10_model(dtype, cifar10):
    x, _, _ = inputs(cifar10.config, 1)
    want = run(cifar10, F32, x, T[3:4])
    network = prepared(cifar10, dtype)
    assert error(run(network, dtype, x, T[3:4]), want) < BOUNDS[dtype]
    assert unfused(network) == []


@pytest.fixture(scope="module")
def cifar10():
    return randomized(UNetConfig())


@pytest.fixture
def meta(monkeypatch):
    """A device with nothing that could be asked for."""
    monkeypatch.setattr(FusedUNet, "_no_autocast", lambda self: nullcontext())  # it has none
    return torch.device("meta")


@pytest.mark.parametrize("expected", [False, True])
def test_nothing_asks_the_host(expected, tiny_config, meta):
    """Else it could not be captured."""
    config = tiny_config(num_classes=3, num_heads=2)
    network = prepared(UNet(config).to(meta), BF16, meta)
    if expected:
        network.expect(T.tolist())
    x, t, labels = (value.to(meta) for value in inputs(config))
    out = network(x.bfloat16(), t, labels)
    assert out.is_meta and out.shape == x.shape and out.dtype == BF16


# A step of Ho et al.'s U-Net: 52 convolutions, 22 + 22 norms of blocks, of which the second of each
# needs its moments made, 6 attentions, 3 paddings of two launches each; and products.
LAUNCHES = {"cudnn_convolution": 52, "group_norm": 73, "finish_conv2d": 36, "table_rows": 1}
LAUNCHES |= {"addmm": 19, "addmm_": 12, "mm": 6, "attention": 6, "constant_pad_nd": 3}


def test_launches_of_a_step(monkeypatch, meta):
    """What one sample waits for on a GPU, some microseconds each."""
    unet, launches, inner = UNet(UNetConfig()).to(meta), Counter(), []

    def counted(room, name, label, count=lambda given: 1):
        function = getattr(room, name)

        def call(*args, **kwargs):
            launches[label] += count(kwargs)
            inner.append(label)
            try:
                return function(*args, **kwargs)
            finally:
                inner.pop()

        monkeypatch.setattr(room, name, call)

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not inner and func._schema.name not in VIEWS:
                launches[func._schema.name.removeprefix("aten::")] += 1
            return func(*args, **(kwargs or {}))

    def stages(given):
        return 1 + (given["moments"][0] is None)

    counted(ops, "group_norm", "group_norm", stages)
    for name in ("finish_conv2d", "table_rows"):
        counted(ops, name, name)
    counted(torch.nn.functional, "scaled_dot_product_attention", "attention")
    counted(fused_cuda, "_convolution", "cudnn_convolution")
    network = prepared(unet, BF16, meta)
    network.expect(T.tolist())
    x = torch.empty(1, 3, 32, 32, device=meta, dtype=BF16)
    x = x.contiguous(memory_format=LAST)
    t = torch.zeros(1, device=meta)
    with Counted():
        network(x, t)
    assert launches == LAUNCHES and launches.total() == 208


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.5, "dtype": BF16}], ids=str)
def test_its_loop_can_be_captured(settings, class_model, monkeypatch):
    """On a stand-in for CUDA graphs: replays with other seeds, indices and labels, bit for bit."""
    monkeypatch.setattr(inference, "check_inputs", lambda *_: None)  # which looks at a CPU's labels
    dtype = settings.get("dtype", F32)
    samplers = []
    for _ in range(2):
        sampler = Sampler.from_model(class_model, steps=7, backend="cpu", fused=False, **settings)
        sampler.network = prepared(class_model.unet, dtype)
        sampler.network.expect(sampler.timesteps.tolist())
        samplers.append(sampler)
    executor = recorded(samplers[1])
    for which in ({"start": 5, "seed": 3}, {"seed": 2**63 + 1, "classes": [1]}):
        eager, captured = (
            sampler.sample(6, batch_size=4, **{"classes": [2, 0, 1]} | which)
            for sampler in samplers
        )
        assert torch.equal(eager, captured) and eager.isfinite().all()
    assert executor.count("capture") == 1 and executor.count("replay") == 7 * 2 * 2


def test_a_copy_and_a_pickle_compute_the_same_bits(tiny_config):
    config = tiny_config(resblock_updown=True, scale_shift_norm=True, num_classes=4)
    network, (x, *rest) = prepared(randomized(config), F32), inputs(config)
    want = run(network, F32, x, *rest)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(run(made, F32, x, *rest), want) and unfused(made) == unfused(network)


@pytest.mark.parametrize("labels", [None, [3, 0, 1, 3]])
def test_timesteps_that_nobody_expected_are_nan(labels, tiny_config):
    """Since nobody can look; without expectations every timestep has its row."""
    unet = randomized(tiny_config(num_classes=3, null_class="row"))
    table = DeviceTimeTable(unet, "reference")
    for block in (unet.down[0].block, unet.middle[0].block):
        table.add(block.time.weight, block.time.bias)
    t = torch.tensor([3, 70, 12, 3])
    labels = None if labels is None else torch.tensor(labels)
    want = table(t, labels)
    table.expect([70, 3, 70])
    got = table(t, labels)
    torch.testing.assert_close(got[[0, 1, 3]], want[[0, 1, 3]], rtol=1e-6, atol=1e-6)
    assert got[2].isnan().all() and want.isfinite().all()
    table.expect([])
    assert torch.equal(table(t, labels), want)


def test_a_table_that_would_be_too_large_is_not_made(tiny_config, monkeypatch):
    unet = randomized(tiny_config(num_classes=3, null_class="row"))
    network, arguments = prepared(unet, F32), inputs(unet.config)
    want = run(network, F32, *arguments)
    monkeypatch.setattr("ddpm_fast.time_table.MAX_VALUES", 100)
    network.expect([5])
    assert torch.equal(run(network, F32, *arguments), want)


def test_the_backend_chooses_the_layers(monkeypatch, tiny_config):
    """On a GPU, which there need not be for this."""
    gpu, chosen = torch.device("cuda", 0), []

    def layers(dtype, name):
        monkeypatch.setattr(backend, "resolve_backend", lambda device, asked: (name, asked))
        chosen.append(inference._layers(gpu, dtype, "auto"))
        return chosen[-1]

    for name in ("cuda", "triton"):
        for dtype in (F32, BF16, F16):
            made = layers(dtype, name)
            assert isinstance(made, GpuLayers)
            assert (made.device, made.dtype, made.backend) == (gpu, dtype, name)
    assert layers(torch.float64, "triton") is None
    assert layers(F32, "reference") is None
    monkeypatch.setattr(backend, "triton_obstacle", lambda: "triton is not installed")
    assert layers(F32, "cuda") is None


def test_the_parts_of_an_image_cover_it():
    for pixels in (1, 63, 64, 65, 784, 1024, 1025, 4096, 9216, 65536, 10**6):
        each, parts = moments.part_pixels(pixels), moments.num_parts(pixels)
        assert (parts - 1) * each < pixels <= parts * each and parts <= 32
        assert parts >= min(16, pixels // 128)


def test_moments_are_the_means_and_squares():
    x = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(0)) + 5
    made = moments.of(x)
    each, parts = moments.part_pixels(1850), moments.num_parts(1850)
    assert made.shape == (2, parts, 2, 3) and parts > 3
    pixels = x.flatten(2)[:, :, each : 2 * each].double()
    torch.testing.assert_close(made[:, 1, 0].double(), pixels.mean(2), rtol=1e-6, atol=0)
    squares = pixels.var(2, unbiased=False) * each
    torch.testing.assert_close(made[:, 1, 1].double(), squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("phases", "channels"), PHASES, ids=str)
def test_finish_conv2d_is_what_the_layers_of_a_cpu_do(phases, channels):
    """Its phases are those of `ops.upsample_conv2d`: of a doubled image, every second pixel."""
    x, bias, residual, _ = finish_case(phases, channels, F32, True, True)
    got, _ = ops.finish_conv2d(x, bias, residual, phases, backend="reference")
    rows, columns = phases
    for i in range(rows):
        for j in range(columns):
            first = (i * columns + j) * channels
            phase = x[:, first : first + channels, i : 8 - rows + 1 + i, j : 9 - columns + 1 + j]
            want = phase + bias[:, None, None] + residual[:, :, i::rows, j::columns]
            assert torch.equal(got[:, :, i::rows, j::columns], want)


def test_table_rows_are_the_tables():
    check_rows("reference")


def test_a_cpu_has_no_kernel_of_its_own_for_them(extension):
    x = torch.zeros(1, 4, 2, 2)
    for call in (
        lambda: ops.finish_conv2d(x, None, None),
        lambda: ops.table_rows(torch.zeros(3, 4), torch.zeros(3), torch.zeros(2)),
    ):
        with pytest.raises(ops.BackendError, match="ask for the backend 'reference'"):
            call()


IMAGE = torch.zeros(2, 8, 3, 5).contiguous(memory_format=LAST)
BAD_FINISH = [
    ({"x": IMAGE.double()}, "x must be float32, bfloat16 or float16, but it is float64"),
    ({"x": IMAGE[0]}, r"x must have the shape \(N, C, H, W\), but it is \(8, 3, 5\)"),
    ({"x": IMAGE.contiguous()}, "x must be channels_last without gaps"),
    ({"phases": (2, 3)}, r"phases must be two of 1 and 2 .* phases are \(2, 3\)"),
    ({"x": IMAGE[:, :6], "phases": (2, 2)}, "phases must be"),
    ({"bias": torch.zeros(7)}, r"bias must be contiguous, of the shape \(8,\), but it is \(7\)"),
    ({"bias": torch.zeros(8).half()}, "bias must be float32, but it is float16"),
    ({"residual": IMAGE.half()}, "residual must be float32, but it is float16"),
    ({"residual": IMAGE[:1]}, r"residual must have the result's shape, \(2, 8, 3, 5\), but it"),
    ({"x": IMAGE.clone().requires_grad_()}, "finish_conv2d is not differentiable"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FINISH, ids=str)
def test_finish_conv2d_refuses_in_a_sentence(change, message):
    arguments = {"x": IMAGE, "bias": None, "residual": None, "phases": (1, 1)} | change
    if change.get("x") is not None and change["x"].shape[1:2] == (6,):
        arguments["x"] = change["x"].contiguous(memory_format=LAST)
    with pytest.raises(RuntimeError, match=message):
        ops.finish_conv2d(**arguments, backend="reference")


BAD_ROWS = [
    ({"table": torch.zeros(4, 5)}, r"table must have the shape .* they are \(4, 5\) and \(3\)"),
    ({"table": torch.zeros(6, 5).half()}, "table must be float32, but it is float16"),
    ({"t": torch.zeros(2, 1)}, r"t must have the shape \(N,\), contiguous, but it is \(2, 1\)"),
    ({"labels": torch.zeros(2)}, "labels must be int64, but it is float32"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must have the shape of t, \(2\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS, ids=str)
def test_table_rows_refuses_in_a_sentence(change, message):
    arguments = {"table": torch.zeros(6, 5), "known": torch.zeros(3), "t": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=message):
        ops.table_rows(**arguments | change, backend="reference")
