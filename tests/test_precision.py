"""How far a bfloat16 network is from the float32 one: over seeds, kinds of weights and kernels."""

import pytest
from unet_cases import BF16, BOUND, CPU, F32, T, error, inputs, randomized, run, with_unit_gain

from ddpm_fast import backend, ops
from ddpm_fast.checkpoint import load_model
from ddpm_fast.inference import prepare, unfused
from ddpm_fast.sampler import Sampler
from ddpm_fast.unet_config import UNetConfig

# Ho et al.'s network, half as wide, with fewer blocks and levels. Thinner ones round more.
CONFIG = UNetConfig(
    base_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_levels=(False, True, False),
)
CIFAR10 = UNetConfig()
OWN, ONEDNN = "our own convolutions", "oneDNN's"


@pytest.fixture(params=[OWN, ONEDNN])
def convolutions(request, monkeypatch, no_amx):
    """oneDNN's as on a CPU with AMX."""
    if request.param == ONEDNN:
        for name in ("conv2d", "attention"):
            monkeypatch.setattr(f"ddpm_fast.ops.is_{name}_fastest", lambda dtype: False)
    elif not ops.is_conv2d_fastest(BF16):
        pytest.skip("prepared networks use oneDNN here")
    if not ops.has_conv2d(BF16):
        pytest.skip("this CPU has no AVX512-BF16")
    return request.param


# Of twelve seeds of each, with a little room.
MOST = {
    (with_unit_gain, OWN): 1.0e-2,
    (with_unit_gain, ONEDNN): 1.4e-2,
    (randomized, OWN): 1.1e-2,
    (randomized, ONEDNN): 1.2e-2,
}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("weights", [with_unit_gain, randomized])
def test_random_weights(weights, seed, convolutions):
    unet = weights(CONFIG, seed)
    x, _, _ = inputs(CONFIG, 6, seed + 1)
    network = prepare(unet, CPU, BF16)
    got, want = network(x, T), run(unet, F32, x, T)
    assert got.dtype == network.input_dtype == F32 and unfused(network) == []
    assert error(got.double(), want) < MOST[weights, convolutions]
    rounded = network(x.bfloat16(), T)
    assert rounded.dtype == BF16
    assert error(rounded.double(), want) < 1.1 * MOST[weights, convolutions]


@pytest.mark.parametrize("weights,most", [(with_unit_gain, 1.1e-2), (randomized, 1.0e-2)])
def test_random_weights_with_amx(weights, most, amx_level, monkeypatch):
    """One sample, which takes an emulator long enough."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    unet = weights(CONFIG, 0)
    x, _, _ = inputs(CONFIG, 1, 1)
    network, want = prepare(unet, CPU, BF16), run(unet, F32, x, T[3:4])
    assert unfused(network) == [] and network.is_own
    assert network.down[0].block.conv1.packing[1] == "amx"
    assert network.down[2].attention.attend.is_own
    assert error(network(x, T[3:4]).double(), want) < most


def test_the_shipped_model_with_amx(amx_level):
    unet = load_model("mnist").unet
    x, _, _ = inputs(unet.config, 1)
    got = prepare(unet, CPU, BF16)(x, T[3:4])
    assert error(got.double(), run(unet, F32, x, T[3:4])) < 0.3e-2


def test_the_shipped_model(convolutions):
    """Whose x and result, rounded, are a third of the error."""
    unet = load_model("mnist").unet
    x, _, _ = inputs(unet.config)
    network, want = prepare(unet, CPU, BF16), run(unet, F32, x, T)
    exact, rounded = error(network(x, T).double(), want), error(run(network, BF16, x, T), want)
    assert exact < 0.3e-2 and exact < 0.75 * rounded


def test_a_result_that_could_overflow_float16_is_bfloat16(convolutions):
    unet = randomized(CONFIG)
    assert prepare(unet, CPU, BF16).conv_out.half
    unet.norm_out.weight.mul_(1000.0)
    network, (x, *_) = prepare(unet, CPU, BF16), inputs(CONFIG)
    assert not network.conv_out.half
    assert error(network(x, T).double(), run(unet, F32, x, T)) < 1.2e-2


def test_a_sampler_gives_what_is_rounded_least(convolutions):
    sampler = Sampler.from_model(load_model("mnist"), steps=2, dtype=BF16, device="cpu")
    seen = []
    sampler.network.register_forward_hook(lambda layer, x, y: seen.append((x[0].dtype, y.dtype)))
    assert sampler.sample(3).dtype == F32 and seen == [(F32, F32)] * 2


@pytest.mark.parametrize("seed", [0, 2])
def test_bfloat16_with_the_weights_of_an_initialisation(seed):
    """Whose blocks give more than `randomized`'s: there each rounding counts for more."""
    unet = with_unit_gain(CIFAR10, seed)
    x, _, _ = inputs(CIFAR10, 2)
    network, want = prepare(unet, CPU, BF16), run(unet, F32, x, T[2:4])
    # Tiles have bfloat16 weights, and oneDNN wants bfloat16 everywhere.
    bound, of_rounded_x = 1.25e-2, 1.25e-2
    if backend.multiplies_tiles(BF16):
        bound, of_rounded_x = 1.0e-2, 1.05e-2
    elif ops.is_conv2d_fastest(BF16):
        bound, of_rounded_x = 0.8e-2, 0.85e-2
    elif ops.has_conv2d(BF16):
        bound = 1.1e-2
    assert error(run(network, F32, x, T[2:4]), want) < bound
    assert error(run(network, BF16, x, T[2:4]), want) < of_rounded_x


@pytest.mark.parametrize("gain,kept", [(1.0, "float16"), (300.0, "bfloat16")])
def test_what_could_overflow_float16_is_kept_as_bfloat16(gain, kept, tiny_config):
    if not ops.is_conv2d_fastest(BF16):
        pytest.skip("prepared networks use oneDNN here")
    unet = randomized(tiny_config(base_channels=64, channel_mult=(1,), attention_levels=(False,)))
    for stage in (*unet.down, *unet.middle, *unet.up):
        stage.block.norm1.weight *= gain
    network, arguments, seen = prepare(unet, CPU, BF16), inputs(unet.config), []
    for stage in (*network.down, *network.middle, *network.up):
        stage.block.conv1.register_forward_hook(lambda layer, x, y: seen.append((x[0], y)))
    assert error(run(network, BF16, *arguments), run(unet, F32, *arguments)) < BOUND[BF16]
    assert {(str(x.dtype)[6:], str(y.dtype)[6:]) for x, y in seen} == {("float16", kept)}
