"""The prepared network is the trained one: its values, and what they may depend on."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from unet_cases import (
    BF16,
    BOUND,
    CONFIGS,
    CPU,
    F32,
    T,
    error,
    has_fused_layers,
    inputs,
    randomized,
    run,
)

from ddpm_fast.checkpoint import load_model
from ddpm_fast.fused import CpuLayers
from ddpm_fast.fused_blocks import FusedAttention
from ddpm_fast.fused_layer import Layer
from ddpm_fast.inference import FusedUNet, prepare, unfused
from ddpm_fast.sampler import Sampler
from ddpm_fast.unet import Attention, UNet
from ddpm_fast.unet_config import UNetConfig

CIFAR10 = UNetConfig()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_every_configuration_computes_the_same(change, dtype, tiny_config):
    config = tiny_config(**change)
    unet = randomized(config)
    arguments = inputs(config)
    want = run(unet, F32, *arguments)
    network = prepare(unet, CPU, dtype)
    assert isinstance(network, FusedUNet)
    # A thin network rounds more than a wide one: PyTorch's own bfloat16 is the measure there.
    plain = error(run(prepare(unet, CPU, dtype, fused=False), dtype, *arguments), want)
    for given in {dtype, F32}:
        got = run(network, given, *arguments)
        assert got.shape == want.shape and error(got, want) < max(BOUND[dtype], 1.25 * plain)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("t", T.tolist())
def test_the_published_cifar10_model(dtype, t, cifar10):
    unet, networks = cifar10
    x, _, _ = inputs(CIFAR10, 2)
    times = torch.full((2,), t)
    assert error(run(networks[dtype], dtype, x, times), run(unet, F32, x, times)) < BOUND[dtype]
    if has_fused_layers(dtype):
        assert unfused(networks[dtype]) == []


@pytest.fixture(scope="module")
def cifar10():
    unet = randomized(CIFAR10)
    return unet, {dtype: prepare(unet, CPU, dtype) for dtype in (F32, BF16)}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_copy_and_a_pickle_compute_the_same_bits(dtype, tiny_config):
    """A host project copies what it holds; oneDNN's weights can be neither copied nor written."""
    config = tiny_config(resblock_updown=True, scale_shift_norm=True, num_classes=4)
    network, (x, *rest) = prepare(randomized(config), CPU, dtype), inputs(config)
    want = run(network, dtype, x, *rest)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(run(made, dtype, x, *rest), want) and unfused(made) == unfused(network)
    assert torch.equal(run(network, dtype, x, *rest), want)


def test_its_layers_hooks_are_called(tiny_config):
    """Which a profile needs."""
    network, seen = prepare(UNet(tiny_config()), CPU, F32), []
    layers = [m for m in network.modules() if isinstance(m, Layer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(module))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(module))
    network(*inputs(tiny_config(), 2)[:2])
    assert len(layers) > 50 and all(sum(m is layer for m in seen) == 2 for layer in layers)


def test_it_stays_where_it_was_prepared_for(tiny_config):
    """It has no parameters, so torch itself would move nothing, and say nothing."""
    host = torch.nn.Sequential(prepare(UNet(tiny_config()), CPU, F32))
    assert host.to("cpu", F32) is host and host.to(memory_format=torch.channels_last) is host
    for move, asked in ((host.half, "float16 on cpu"), (lambda: host.to("meta"), "32 on meta")):
        with pytest.raises(ValueError, match=f"prepared for float32 on the CPU, .*{asked}"):
            move()


@pytest.fixture
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(F32)


@pytest.fixture
def default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("default", ["default_dtype", "default_device"])
def test_torchs_defaults_change_nothing(default, tiny_config, request):
    unet = randomized(tiny_config(num_heads=2, num_classes=4))
    network, (x, *rest) = prepare(unet, CPU, F32), inputs(unet.config)
    want = run(network, F32, x, *rest)
    request.getfixturevalue(default)
    for made in (network, prepare(unet, CPU, F32)):
        assert torch.equal(run(made, F32, x, *rest), want)
        assert torch.nn.Sequential(made).to("cpu", F32)[0] is made


def test_it_has_no_gradients(tiny_config):
    network, (x, t, _) = prepare(UNet(tiny_config()), CPU, F32), inputs(tiny_config())
    assert torch.is_grad_enabled() and not network(x.requires_grad_(), t).requires_grad


def test_a_network_of_another_class_stays_what_it_is(tiny_config):
    class Doubled(UNet):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    unet = randomized(tiny_config())
    doubled = Doubled(unet.config).eval()
    doubled.load_state_dict(unet.state_dict())
    arguments = inputs(unet.config)
    got = run(prepare(doubled, CPU, F32), F32, *arguments)
    assert error(got, 2 * run(unet, F32, *arguments)) < BOUND[F32]


@pytest.mark.parametrize("change", [{}, {"num_classes": 4}], ids=str)
def test_a_hosts_autocast_changes_nothing(change, tiny_config):
    config = tiny_config(num_heads=2, **change)
    x, t, labels = inputs(config)

    def eps():
        network = prepare(randomized(config), CPU, F32)
        network.expect(t.tolist()[:4])  # and two by themselves
        return run(network, F32, x, t, labels)

    want = eps()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(eps(), want) and torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_shipped_model(dtype):
    unet = load_model("mnist").unet
    network = prepare(unet, CPU, dtype)
    x, _, _ = inputs(unet.config)
    for t in T.tolist():
        times = torch.full((len(x),), t)
        for labels in (None, torch.arange(len(x))):
            want = run(unet, F32, x, times, labels)
            assert error(run(network, dtype, x, times, labels), want) < BOUND[dtype]
    if has_fused_layers(dtype):
        assert unfused(network) == []


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_another_size_than_the_trained_one(dtype, tiny_config):
    unet = randomized(tiny_config())
    network = prepare(unet, CPU, dtype)
    x = torch.randn(2, 1, 12, 20)
    want = run(unet, F32, x, T[:2])
    assert error(run(network, dtype, x, T[:2]), want) < 1.5 * BOUND[dtype]


def test_a_long_attention_keeps_no_scores(tiny_config, monkeypatch):
    """Where it is torch's."""
    monkeypatch.setattr("ddpm_fast.ops.is_attention_fastest", lambda dtype: False)
    layer = Attention(tiny_config(), 16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 16, 6, 4).contiguous(memory_format=torch.channels_last)
    fused = FusedAttention(layer, CpuLayers(F32), (6, 4))
    whole = fused(x)
    monkeypatch.setattr("ddpm_fast.fused.LONGEST_SCORES", 8)
    monkeypatch.delattr("torch.bmm")
    for got in (whole, fused(x)):
        torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)


def test_what_is_prepared_is_a_copy(tiny_config):
    unet = randomized(tiny_config())
    state = copy.deepcopy(unet.state_dict())
    arguments = inputs(unet.config)
    network = prepare(unet, CPU, F32)
    before = run(network, F32, *arguments)
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    for parameter in unet.parameters():
        parameter.zero_()
    assert torch.equal(run(network, F32, *arguments), before)


@pytest.mark.parametrize("has_own", [False, True])
def test_what_cannot_be_fused_is_counted(extension, tiny_config, monkeypatch, has_own):
    monkeypatch.setattr("ddpm_fast.ops.is_attention_fastest", lambda dtype: has_own)
    names = unfused(prepare(UNet(tiny_config(num_heads=2, resblock_updown=True)), CPU, F32))
    assert [name.split(".")[-1] for name in names].count("attend") == (0 if has_own else 4)
    assert sum(name.split(".")[-1].isdigit() for name in names) == 2  # the blocks that resample
    assert unfused(prepare(UNet(tiny_config()), CPU, F32)) == []


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_it_can_be_turned_off(dtype, class_model):
    plain = Sampler.from_model(class_model, dtype=dtype, fused=False).network
    assert isinstance(plain, UNet) and plain.conv_in.weight.dtype == dtype
    fused = Sampler.from_model(class_model, dtype=dtype).network
    assert isinstance(fused, FusedUNet) == (dtype != torch.float16)


def test_inputs_that_do_not_fit_are_refused_as_by_the_unet(tiny_unet):
    network = prepare(tiny_unet(), CPU, F32)
    x, t, _ = inputs(network.config, 2)
    for arguments, message in (
        ((x, t, t), "trained without classes"),
        ((x.repeat(1, 3, 1, 1), t), "1 channels, got 3"),
        ((x, t[:1]), r"t must have shape \(2,\)"),
        ((x[:0], t[:0]), r"at least one sample, got shape \(0, 1, 8, 8\)"),
        ((x[..., :7], t), "multiples of 2, got"),
        ((x.bfloat16(), t), "x must be float32, as the network was prepared for, but it is bfl"),
    ):
        with pytest.raises(ValueError, match=message):
            network(*arguments)


WITHOUT = """
import sys, warnings
sys.modules["ddpm_fast._C"] = None
sys.path.insert(0, "tests")
warnings.simplefilter("ignore")
import torch
from test_inference import *
for change in ({}, {"num_heads": 2, "scale_shift_norm": True}, {"sample_size": (16,)}):
    unet = randomized(UNetConfig(**(TINY | change)))
    arguments = inputs(unet.config)
    for dtype in (F32, BF16):
        network = prepare(unet, CPU, dtype)
        wrong = error(run(network, dtype, *arguments), run(unet, F32, *arguments))
        assert wrong < 2.5 * BOUND[dtype], (change, dtype, wrong)
print(len(unfused(prepare(UNet(UNetConfig(**TINY)), CPU, F32))))
"""


def test_without_the_extension_it_is_plain_torch():
    from conftest import TINY

    code = f"TINY = {TINY!r}\n{WITHOUT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 10, done.stderr


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("change", [{}, {"num_heads": 2, "qkv_order": "heads"}], ids=str)
def test_without_our_own_operators_it_computes_the_same(change, dtype, tiny_config, monkeypatch):
    """As on a CPU with AMX."""
    for name in ("conv2d", "attention"):
        monkeypatch.setattr(f"ddpm_fast.ops.is_{name}_fastest", lambda dtype: False)
    unet = randomized(tiny_config(**change))
    arguments = inputs(unet.config)
    want = run(unet, F32, *arguments)
    got = run(prepare(unet, CPU, dtype), dtype, *arguments)
    plain = error(run(prepare(unet, CPU, dtype, fused=False), dtype, *arguments), want)
    assert error(got, want) < max(BOUND[dtype], 1.25 * plain)


def test_without_onednn_the_convolutions_are_torchs(tiny_config, monkeypatch):
    monkeypatch.setattr("ddpm_fast.ops.is_conv2d_fastest", lambda dtype: False)
    monkeypatch.setattr("ddpm_fast.fused.is_packable", lambda dtype: False)
    unet = randomized(tiny_config(resblock_updown=True))
    network = prepare(unet, CPU, F32)
    assert any("conv" in name for name in unfused(network))
    arguments = inputs(unet.config)
    assert error(run(network, F32, *arguments), run(unet, F32, *arguments)) < BOUND[F32]
