"""lucidrains' U-Net: its configuration, and its parts against their formulas long-hand.

That it is theirs as a whole is in test_families.py.
"""

import pytest
import torch
from peer_fixtures import random_weights

from ddpm_fast.checkpoint import CheckpointError, Model, load_model, save_model
from ddpm_fast.lucid_unet import (
    Attention,
    LinearAttention,
    LucidUNet,
    LucidUNetConfig,
    RMSNorm,
)
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

TINY = {
    "in_channels": 2,
    "sample_size": (8, 12),
    "base_channels": 8,
    "init_channels": 6,
    "channel_mult": (1, 2, 3),
    "full_attention": (False, True, True),
    "num_heads": (2, 1, 3),
    "head_channels": (4, 8, 4),
    "memory": 3,
}


@pytest.fixture
def unet() -> LucidUNet:
    torch.manual_seed(0)
    return LucidUNet(LucidUNetConfig(**TINY)).eval().requires_grad_(False)


def test_the_norm_is_the_root_mean_square():
    norm, x = RMSNorm(6), torch.randn(2, 6, 3, 4)
    with torch.no_grad():
        norm.weight.normal_()
    want = x / (x**2).mean(1, keepdim=True).sqrt() * norm.weight[:, None, None]
    torch.testing.assert_close(norm(x), want)


def rows(layer, x):
    """Each head's queries, keys and values, as (N, head, channels, positions)."""
    qkv = torch.einsum("oc,ncl->nol", layer.qkv.weight[..., 0, 0], layer.norm(x).flatten(2))
    return [part.unflatten(1, (layer.heads, layer.width)) for part in qkv.chunk(3, dim=1)]


@pytest.mark.parametrize("kind", [Attention, LinearAttention])
def test_attention_is_the_formula(kind, unet):
    layer, x = kind(unet.config, 2, 10), torch.randn(2, 10, 3, 4)
    q, k, v = rows(layer, x)
    h = torch.zeros(2, layer.heads, layer.width, 12)
    for n in range(2):
        for head in range(layer.heads):
            keys, values = layer.memory[0, head], layer.memory[1, head]
            if kind is Attention:  # memory is (rows, channels)
                keys, values = keys.T, values.T
            keys = torch.cat((keys, k[n, head]), dim=1)
            values = torch.cat((values, v[n, head]), dim=1)
            if kind is Attention:
                weights = (q[n, head].T @ keys / layer.width**0.5).softmax(dim=1)
                h[n, head] = values @ weights.T
            else:
                context = values @ keys.softmax(dim=1).T
                h[n, head] = context @ q[n, head].softmax(dim=0) / layer.width**0.5
    want = layer.proj(h.reshape(2, -1, 3, 4))
    want = x + (want if kind is Attention else layer.norm_out(want))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_a_model_is_saved_sampled_and_read(unet, tmp_path):
    model = Model(unet, NoiseSchedule.linear(20, 1e-3, 0.2), "v_prediction", clip_denoised=False)
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config == unet.config and not loaded.clip_denoised
    x, t = torch.randn(2, 2, 8, 12), torch.tensor([1, 17])
    torch.testing.assert_close(loaded.unet(x, t), unet(x, t))
    sampler = Sampler.from_model(loaded, steps=2)
    assert not sampler.plan.clip_denoised and sampler.sample(3).shape == (3, 2, 8, 12)
    assert Sampler.from_model(loaded, clip_denoised=True).plan.clip_denoised


def test_it_is_the_package_s_network(tmp_path):
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    except Exception as error:  # it asks for a torchvision that fits this torch
        pytest.skip(f"denoising_diffusion_pytorch cannot be imported: {error}")
    network = Unet(16, init_dim=12, dim_mults=(1, 2, 3), full_attn=(False, True, True)).eval()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(random_weights(shapes, 1))
    process = GaussianDiffusion(
        network, image_size=(8, 16), objective="pred_noise", beta_schedule="linear"
    )
    torch.save({"model": process.state_dict(), "step": 1}, tmp_path / "model-1.pt")
    model = load_model(tmp_path / "model-1.pt", image_size=(8, 16))
    x, t = torch.randn(2, 3, 8, 16), torch.tensor([3, 970])
    with torch.no_grad():
        want, got = network(x, t), model.unet(x, t)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (model.schedule.betas == NoiseSchedule.linear().betas).all()
    assert model.prediction_type == "epsilon" and model.config.sample_size == (8, 16)


def test_inputs_that_do_not_fit_are_refused(unet):
    x, t = torch.randn(2, 2, 8, 12), torch.tensor([1, 17])
    for arguments, match in (
        ((x[:, :1], t), "must have 2 channels"),
        ((x, t[:1]), "one number per sample"),
        ((x[..., :6], t), "multiples of 4"),
        ((x, t, t), "without classes"),
    ):
        with pytest.raises(ValueError, match=match):
            unet(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"base_channels": 2},
        {"base_channels": 7},
        {"base_channels": "8"},
        {"in_channels": 0},
        {"channel_mult": ()},
        {"channel_mult": (1,) * 11},
        {"channel_mult": 2},
        {"channel_mult": (1, 2, 10**9)},
        {"full_attention": (True,)},
        {"full_attention": (0, 1, 1)},
        {"num_heads": (1, 2)},
        {"num_heads": (1, 2, -1)},
        {"head_channels": (4, 4, None)},
        {"memory": -1},
        {"dropout": 2.0},
        {"sample_size": (8,)},
        {"sample_size": (8, 6)},
        {"sample_size": [[8], 8]},
        {"learn_sigma": 1},
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(change):
    with pytest.raises(ValueError) as caught:
        LucidUNetConfig(**(TINY | change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_weights_and_configuration_that_disagree_are_refused(unet, tmp_path):
    unet.config = LucidUNetConfig(**(TINY | {"memory": 4}))
    save_model(tmp_path / "m.safetensors", Model(unet, NoiseSchedule.linear(20)))
    with pytest.raises(CheckpointError, match=r"memory' of shape .* where its configuration wants"):
        load_model(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="unknown U-Net fields"):
        LucidUNetConfig.from_dict({"depth": 3})
