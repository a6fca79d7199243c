"""A network's replayed calls are the network's, to the bit; and what cannot be recorded runs."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from unet_cases import BF16, CONFIGS, CPU, F32, inputs, randomized

from ddpm_fast import backend, replay
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import prepare
from ddpm_fast.replay import Recordings
from ddpm_fast.unet_config import UNetConfig

pytestmark = pytest.mark.usefixtures("extension")


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


CONSTANT = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(2))


def written(x, y):
    made = x.new_empty([2, 3, 6])
    made[..., :3] = x
    made[..., 3:] = y
    return torch.bmm(made[..., 1:4], y)


def released(x, y):
    """What is not needed any more is gone while the rest is recorded."""
    made = torch.bmm(x, y)
    last, gone = torch.bmm(made, y), weakref.ref(made)
    del made
    assert gone() is None
    return last


def attention(x, y):
    return F.scaled_dot_product_attention(x[None], y[None], y[None])[0]


FUNCTIONS = {
    "views": lambda x, y: torch.bmm(x[:, 1:].permute(0, 2, 1), y.split([1, 2], 1)[1])[:, ::2],
    "a view of an input": lambda x, y: x[1:, None],
    "an empty view": lambda x, y: torch.bmm(x[:, :0], y),
    "one that is written into": written,
    "what is released": released,
    "the first of two results": attention,
    "constants": lambda x, y: torch.bmm(x, CONSTANT[:, 1:4].expand(2, 3, 4)),
}


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 3, generator=generator), torch.randn(2, 3, 3, generator=generator)


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *given):
        self.calls += 1
        return self.function(*given)


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_the_second_call_is_recorded_and_then_replayed(name):
    function, recordings = Counted(FUNCTIONS[name]), Recordings()
    for seed in range(4):
        got, want = recordings(function, *pair(seed)), FUNCTIONS[name](*pair(seed))
        assert torch.equal(got, want) and got.stride() == want.stride()
    assert function.calls == 2


def unseen(x, y):
    """Does something that no operator does."""
    made = torch.bmm(x, y)
    made.numpy()[0] += 1
    return made


def both(x, y):
    flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = flash_attention(x[None], y[None], y[None])
    return torch.bmm(out[0], sums[0, :, :, None].expand(2, 3, 3))


OTHERS = {
    "an unknown operator": lambda x, y: torch.sin(x),
    "a number": lambda x, y: torch.bmm(x, y) * x.sum().item(),
    "numpy": unseen,
    "a constant": lambda x, y: CONSTANT,
    "a constant written into": lambda x, y: torch.bmm(x, CONSTANT.clone()[:, :3, :3].copy_(y[:1])),
    "the second of two results": both,
    "another dtype": lambda x, y: torch.bmm(x, y.view(torch.int32).float()),
    "another layout": lambda x, y: torch.bmm(x, y.to_sparse().to_dense()),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_cannot_be_recorded_is_called(name):
    if name == "a constant written into":
        constant = torch.zeros(2, 3, 3)
        OTHERS[name] = lambda x, y: torch.bmm(x, constant.copy_(y))
    function, recordings = Counted(OTHERS[name]), Recordings()
    for seed in range(4):
        assert torch.equal(recordings(function, *pair(seed)), OTHERS[name](*pair(seed)))
    assert function.calls == 4


@torch.no_grad()
def test_inputs_that_share_memory_are_not_recorded():
    """Others need not."""
    function, recordings = Counted(torch.bmm), Recordings()
    for x, y in [pair()[:1] * 2] * 3 + [pair(1)] * 3:
        assert torch.equal(recordings(function, x, y), torch.bmm(x, y))
    assert function.calls == 6


@torch.no_grad()
def test_the_forms_that_were_not_used_for_longest_go(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 2)
    function, recordings = Counted(torch.bmm), Recordings()

    def calls(n, times=1):
        before = function.calls
        for _ in range(times):
            x = torch.randn(n, 3, 3)
            assert torch.equal(recordings(function, x, x + 1), torch.bmm(x, x + 1))
        return function.calls - before

    assert [calls(1, 3), calls(2, 3), calls(1), calls(3, 3)] == [2, 2, 0, 2]
    assert [calls(1), calls(3), calls(2)] == [0, 0, 1]


@torch.no_grad()
def test_a_replay_that_fails_leaves_it_to_the_function():
    function, recordings = Counted(torch.bmm), Recordings()
    for _ in range(3):
        recordings(function, *pair())
    for form in recordings._made:
        recordings._made[form] = torch.zeros(1)  # is none
    assert torch.equal(recordings(function, *pair()), torch.bmm(*pair())) and function.calls == 3


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

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and is_recorded(network) and not is_in_torch_dispatch_mode()


def test_without_the_extension_layers_are_called(tiny_config, monkeypatch):
    monkeypatch.setattr("ddpm_fast.ops.is_conv2d_fastest", lambda dtype: False)
    monkeypatch.setattr("ddpm_fast.ops.is_attention_fastest", lambda dtype: False)
    network, arguments = prepare(randomized(tiny_config()), CPU, F32), inputs(tiny_config())
    want = network(*arguments)
    monkeypatch.setattr(backend, "extension", None)
    for _ in range(3):
        assert torch.allclose(network(*arguments), want, atol=1e-4)


def told(code):
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr[-2000:]


def test_torch_does_not_import_its_compiler_for_it():
    code = """
import sys, torch
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import prepare
network = prepare(load_model("mnist").unet, torch.device("cpu"), torch.float32)
for _ in range(3):
    network(torch.zeros(1, 1, 28, 28), torch.zeros(1))
print([m is not None for m in network._recordings._made.values()], "torch._dynamo" in sys.modules)
"""
    assert told(code) == "[True] False\n"


def test_freeing_one_may_free_another():
    code = """
import torch, weakref
from ddpm_fast.replay import Recordings
def made(weight):
    recordings = Recordings()
    with torch.no_grad():
        for _ in range(3):
            recordings(lambda x: torch.bmm(x, weight), torch.zeros(1, 2, 2))
    return recordings
weight = torch.zeros(1, 2, 2)
held = [made(torch.ones(1, 2, 2))]
weakref.finalize(weight, held.clear)
recordings = made(weight)
del weight
recordings._made.clear()
print("freed", held)
"""
    assert told(code) == "freed []\n"


def test_it_takes_no_more_memory_than_the_function():
    """Neither while it is recorded nor in a replay; but what the allocator makes of it."""
    code = """
import torch
from ddpm_fast.replay import Recordings
weight = torch.eye(1024)[None]
def chain(x):
    for _ in range(100):
        x = torch.bmm(x, weight)  # 4 MiB each
    return x
def highest():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
with torch.no_grad():
    torch.set_num_threads(1)
    x, recordings = torch.ones(1, 1024, 1024), Recordings()
    chain(x), chain(x)
    before = highest()
    for _ in range(4):
        recordings(chain, x)
    print(highest() - before < 120, [type(m).__name__ for m in recordings._made.values()])
"""
    assert told(code) == "True ['Tensor']\n"


def record(code, constants=()):
    return torch.ops.ddpm_fast.record(code, list(constants), list(pair()))


@pytest.fixture
def product():
    """The numbers of bmm(x, y), and what they make."""
    number = backend.extension.replay_operators().index("aten::bmm")
    return [1, 1, number, 1, 0, 1, 1, 2, 2, 0, 1, 2]


def test_a_recording_takes_only_what_it_was_made_for(product):
    made, (x, y) = record(product), pair()
    play = torch.ops.ddpm_fast.replay
    assert torch.equal(play(made, [x, y]), torch.bmm(x, y))
    with pytest.raises(RuntimeError, match="takes 2 tensors, but it was given 1"):
        play(made, [x])
    for other in (x[:1], x.double(), x.mT, x[0]):
        with pytest.raises(RuntimeError, match=r"input 1 of this recording, .*, is not as it was"):
            play(made, [x, other])
    for no_recording in (made.clone(), torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="this tensor is no recording"):
            play(no_recording, [x, y])


def test_numbers_that_are_no_recording_are_refused(product):
    """Nothing reads beyond what is there."""
    for length in range(len(product)):
        with pytest.raises(RuntimeError, match=r"ddpm_fast: this recording (is cut|has the num)"):
            record(product[:length])
    for place in range(len(product)):
        for value in (-1, 1 << 40):
            wrong = [*product[:place], value, *product[place + 1 :]]
            with pytest.raises(RuntimeError, match="ddpm_fast: this recording "):
                torch.ops.ddpm_fast.replay(record(wrong), list(pair()))
    before = [*product]
    before[5:7] = [1, 2]  # its own result
    with pytest.raises(RuntimeError, match="reads a tensor before it is made"):
        torch.ops.ddpm_fast.replay(record(before), list(pair()))
    number = [*product]
    number[5:7] = [3, 1]
    with pytest.raises(RuntimeError, match="was given no tensor"):
        torch.ops.ddpm_fast.replay(record(number), list(pair()))
