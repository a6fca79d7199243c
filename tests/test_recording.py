"""A network's recorded calls are the network's, to the bit; and what cannot be recorded runs."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from unet_cases import BF16, CONFIGS, CPU, F32, inputs, randomized

from ddpm_fast import recording
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import prepare
from ddpm_fast.recording import Recordings
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
    made, network._records = network._records, False
    try:
        return network(*arguments)
    finally:
        network._records = made


def made_by(network):
    return list(network._recordings._made.values())


def changed(x, t, labels):
    """Other values of the same form."""
    return x.flip(0) * 0.5, t.flip(0), labels if labels is None else labels.flip(0)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_every_configuration_plays_to_the_same_bits(change, dtype, kernels, tiny_config):
    config = tiny_config(**change)
    network, arguments = prepare(randomized(config), CPU, dtype), inputs(config)
    for given in (arguments, arguments, changed(*arguments)):
        want = by_layers(network, *given)
        got = network(*given)
        assert torch.equal(got, want) and got.stride() == want.stride()
    assert len(made_by(network)) == 1 and None not in made_by(network)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("model", ["shipped", "cifar10"])
def test_whole_models_play_to_the_same_bits(model, dtype, kernels):
    unet = load_model("mnist").unet if model == "shipped" else randomized(UNetConfig())
    network = prepare(unet, CPU, dtype)
    for n in (1, 4):
        arguments = inputs(unet.config, n)
        want = by_layers(network, *arguments)
        assert torch.equal(network(*arguments), want)
        assert torch.equal(network(*arguments), want)
    assert None not in made_by(network)


def test_each_form_has_its_own_and_the_oldest_goes(tiny_config, monkeypatch):
    monkeypatch.setattr(recording, "MOST", 3)
    network = prepare(randomized(tiny_config()), CPU, F32)
    torch.set_num_threads(1)
    forms = [(1, 8, 8), (2, 8, 8), (2, 16, 8), (2, 8, 16), (1, 8, 8)]
    for i, (n, *size) in enumerate(forms, 1):
        x, t = torch.randn(n, 1, *size), torch.full((n,), 7)
        assert torch.equal(network(x, t), by_layers(network, x, t))
        assert len(made_by(network)) == min(i, 3)


def test_who_watches_sees_the_layers(tiny_config):
    network = prepare(randomized(tiny_config()), CPU, F32)
    arguments = inputs(tiny_config(), 2)
    want = network(*arguments)

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
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert made_by(made) == []
        assert torch.equal(made(*arguments), want) and len(made_by(made)) == 1


def test_nothing_is_kept_when_the_network_is_gone(tiny_config):
    network = prepare(randomized(tiny_config()), CPU, F32)
    network(*inputs(tiny_config()))
    storage = network.norm_out.weight.untyped_storage()
    del network
    gc.collect()
    assert torch._C._storage_Use_Count(storage._cdata) == 1


FUNCTIONS = {
    "views": lambda x, y: torch.bmm(x[:, 1:].permute(0, 2, 1), y.split([1, 2], 1)[1])[:, ::2],
    "a view of an input": lambda x, y: x[1:, None],
    "one that is written into": lambda x, y: written(x, y),
    "two results": lambda x, y: F.scaled_dot_product_attention(x[None], y[None], y[None])[0],
    "constants": lambda x, y: torch.bmm(x, CONSTANT[:, 1:4].expand(2, 3, 4)),
}
CONSTANT = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(2))


def written(x, y):
    made = x.new_empty([2, 3, 6])
    made[..., :3] = x
    made[..., 3:] = y
    return torch.bmm(made[..., 1:4], y)


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 3, generator=generator), torch.randn(2, 3, 3, generator=generator)


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_what_is_recorded(name):
    function, recordings, calls = FUNCTIONS[name], Recordings(), []

    def called(*given):
        calls.append(1)
        return function(*given)

    for seed in range(3):
        got, want = recordings(called, *pair(seed)), function(*pair(seed))
        assert torch.equal(got, want) and got.stride() == want.stride()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.sin(x),
        lambda x, y: x * x.sum().item(),
        lambda x, y: torch.bmm(x, y).contiguous(memory_format=torch.preserve_format),
        lambda x, y: CONSTANT,
    ],
    ids=["unknown", "asks for a number", "a plain product", "a constant"],
)
@torch.no_grad()
def test_whatever_a_function_does_it_is_called(function):
    recordings = Recordings()
    for seed in range(3):
        assert torch.equal(recordings(function, *pair(seed)), function(*pair(seed)))


def record(code, constants=()):
    return torch.ops.ddpm_fast.record(code, list(constants), list(pair()))


@pytest.fixture
def product():
    """The numbers of bmm(x, y), and what they make."""
    number = recording.backend.extension.recorded_operators().index("aten::bmm")
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
