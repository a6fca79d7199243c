"""A prepared network's replayed calls are its layers', to the bit."""

import copy
import gc
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from unet_cases import BF16, CONFIGS, CPU, F32, inputs, randomized

from ddpm_fast import backend
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import prepare
from ddpm_fast.unet_config import UNetConfig
from ddpm_fast.workers import group_size

pytestmark = pytest.mark.usefixtures("extension")


@pytest.fixture(autouse=True)
def whatever_it_takes(monkeypatch):
    """A slow machine records, too."""
    monkeypatch.setattr("ddpm_fast.replay.LONGEST", 1e9)


@pytest.fixture(params=["own", "oneDNN"])
def kernels(request, monkeypatch):
    """Our own convolutions and attention, where the CPU has them; and those of a CPU with AMX."""
    if request.param == "oneDNN":
        for name in ("is_conv2d_fastest", "is_attention_fastest"):
            monkeypatch.setattr(f"ddpm_fast.ops.{name}", lambda dtype: False)


def by_layers(network, *arguments):
    """What its layers give, one by one."""
    kept, network._recordings = network._recordings, None
    try:
        return network(*arguments)
    finally:
        network._recordings = kept


def made_by(network):
    return list(network._recordings._made.values())


def is_recorded(network):
    """Whether what was called twice in each form is replayed from then on."""
    return all(isinstance(made, torch.Tensor) for made in made_by(network)) and made_by(network)


def changed(x, t, labels):
    """Other values of the same form."""
    return x.flip(0) * 0.5, t.flip(0), labels if labels is None else labels.flip(0)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_every_configuration_replays_to_the_same_bits(change, dtype, kernels, tiny_config):
    config = tiny_config(**change)
    network, arguments = prepare(randomized(config), CPU, dtype), inputs(config)
    for given in (arguments, arguments, changed(*arguments)):
        want = by_layers(network, *given)
        got = network(*given)
        assert torch.equal(got, want) and got.stride() == want.stride()
    assert len(made_by(network)) == 1 and is_recorded(network)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("model", ["shipped", "cifar10"])
def test_whole_models_replay_to_the_same_bits(model, dtype, kernels):
    unet = load_model("mnist").unet if model == "shipped" else randomized(UNetConfig())
    network = prepare(unet, CPU, dtype)
    for n in (1, 4):
        arguments = inputs(unet.config, n)
        want = by_layers(network, *arguments)
        for _ in range(3):
            assert torch.equal(network(*arguments), want)
    assert is_recorded(network)


def test_who_watches_sees_the_layers(tiny_config):
    network = prepare(randomized(tiny_config()), CPU, F32)
    arguments = inputs(tiny_config(), 2)
    want = network(*arguments)
    network(*arguments)
    assert is_recorded(network)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    with Seen():
        assert torch.equal(network(*arguments), want)
    assert seen.count("ddpm_fast.group_norm.default") > 5
    with torch.profiler.profile() as profile:
        assert torch.equal(network(*arguments), want)
    assert "ddpm_fast::group_norm" in {event.key for event in profile.key_averages()}

    seen = []
    handle = network.conv_in.register_forward_hook(lambda *_: seen.append("called"))
    assert torch.equal(network(*arguments), want) and seen == ["called"]
    made = copy.deepcopy(network)
    assert torch.equal(made(*arguments), want) and seen == ["called"] * 2
    handle.remove()
    assert torch.equal(network(*arguments), want) and seen == ["called"] * 2


def test_copies_and_pickles_have_none(tiny_config):
    network, arguments = prepare(randomized(tiny_config()), CPU, BF16), inputs(tiny_config())
    want = network(*arguments)
    network(*arguments)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert made_by(made) == []
        for _ in range(3):
            assert torch.equal(made(*arguments), want)
        assert is_recorded(made)


def test_nothing_is_kept_when_the_network_is_gone(tiny_config):
    network = prepare(randomized(tiny_config()), CPU, F32)
    for _ in range(3):
        network(*inputs(tiny_config()))
    assert is_recorded(network)
    storage = network.norm_out.weight.untyped_storage()
    del network
    gc.collect()
    assert torch._C._storage_Use_Count(storage._cdata) == 1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_inference_mode_and_groups_are_recorded(dtype, kernels, tiny_config, monkeypatch):
    for limit in ("LARGEST_OF_ONE_CORE", "SMALLEST_GROUP"):
        monkeypatch.setattr(f"ddpm_fast.workers.{limit}", 0)
    group_size.cache_clear()
    torch.set_num_threads(2)
    config = tiny_config(resblock_updown=True, num_heads=2)
    with torch.inference_mode():
        network, arguments = prepare(randomized(config), CPU, dtype), inputs(config, 4)
        want = by_layers(network, *arguments)
        for _ in range(4):
            assert torch.equal(network(*arguments), want)
    assert len(made_by(network)) == 1 and is_recorded(network)
    assert next(iter(network._recordings._made))[0][0][0] == 2  # samples of a group
    group_size.cache_clear()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_torch_func_sees_the_layers(tiny_config):
    network, (x, t, _) = prepare(randomized(tiny_config()), CPU, F32), inputs(tiny_config())
    want = by_layers(network, x, t)
    for _ in range(3):
        got, _ = torch.func.jvp(lambda x: network(x, t), (x,), (x,))
        assert torch.equal(got, want)


@pytest.mark.parametrize("watching", ["torch.compiler.is_compiling", "torch.jit.is_tracing"])
def test_nothing_is_replayed_into_a_trace(watching, tiny_config, monkeypatch):
    network, x = prepare(randomized(tiny_config()), CPU, F32), inputs(tiny_config())[0]
    assert network._is_replayed(x) and not network._is_replayed(x.to("meta"))
    monkeypatch.setattr(watching, lambda: True)
    assert not network._is_replayed(x)


def test_threads_may_share_a_network(tiny_config):
    network, wrong = prepare(randomized(tiny_config()), CPU, F32), []
    cases = [inputs(tiny_config(), n) for n in range(1, 7)]
    wanted = [by_layers(network, *arguments) for arguments in cases]

    def work():
        torch.set_num_threads(1)
        for _ in range(5):
            for arguments, want in zip(cases, wanted, strict=True):
                if not torch.equal(network(*arguments), want):
                    wrong.append(len(want))

    is_flagged = is_in_torch_dispatch_mode()  # of the whole process; other tests' torch may set it
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and is_recorded(network)
    assert is_in_torch_dispatch_mode() == is_flagged


def test_without_the_extension_layers_are_called(tiny_config, monkeypatch):
    monkeypatch.setattr("ddpm_fast.ops.is_conv2d_fastest", lambda dtype: False)
    monkeypatch.setattr("ddpm_fast.ops.is_attention_fastest", lambda dtype: False)
    network, arguments = prepare(randomized(tiny_config()), CPU, F32), inputs(tiny_config())
    want = network(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "extension", None)
        for _ in range(3):
            assert torch.allclose(network(*arguments), want, atol=1e-4)


def test_torch_does_not_import_its_compiler_for_it():
    code = """
import sys, torch
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import prepare
network = prepare(load_model("mnist").unet, torch.device("cpu"), torch.float32)
for _ in range(3):
    network(torch.zeros(1, 1, 28, 28), torch.zeros(1))
made = [type(m).__name__ for m in network._recordings._made.values()]
print(made, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['Tensor'] False\n", done.stderr
