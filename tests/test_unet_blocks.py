"""The U-Net's embedding and blocks: each is the formula that it is named for."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.unet import Attention, Downsample, ResBlock, UNet, timestep_embedding


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin", "interleaved"])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_embedding_is_the_formula(order, shift):
    half = 4
    got = timestep_embedding(torch.tensor([0, 17, 999]), 2 * half, order, shift)
    for row, t in zip(got, (0, 17, 999), strict=True):
        angles = [t * 10000 ** (-i / (half - shift)) for i in range(half)]
        sin, cos = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        if order == "interleaved":
            want = [v for pair in zip(sin, cos, strict=True) for v in pair]
        else:
            want = sin + cos if order == "sin_cos" else cos + sin
        torch.testing.assert_close(row, torch.tensor(want), rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups,eps", [(4, 1e-6), (2, 0.5)])
def test_every_norm_has_the_groups_and_eps(groups, eps, tiny_config):
    unet = UNet(tiny_config(norm_groups=groups, norm_eps=eps))
    norms = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(groups, eps)}


@pytest.mark.parametrize("size", [(8, 6), (8,)])
@pytest.mark.parametrize("way", ["symmetric", "asymmetric"])
def test_downsampling_pads_as_named(way, size, tiny_config):
    config = tiny_config(sample_size=size, downsample_padding=way)
    layer = Downsample(config, 8)
    x = torch.randn(2, 8, *size)
    padded = F.pad(x, (1, 1) * len(size) if way == "symmetric" else (0, 1) * len(size))
    conv = F.conv1d if len(size) == 1 else F.conv2d
    want = conv(padded, layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), want)
    assert want.shape[2:] == tuple(s // 2 for s in size)


def norm(x, layer):
    """GroupNorm, long-hand."""
    groups = x.reshape(x.shape[0], layer.num_groups, -1)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    x = ((groups - mean) / (var + layer.eps).sqrt()).reshape(x.shape)
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_residual_block_is_the_formula(scale_shift, resample, tiny_config):
    block = ResBlock(tiny_config(scale_shift_norm=scale_shift), 8, 16, resample)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, emb = torch.randn(2, 8, 4, 6), torch.randn(2, 32)

    def resized(x):
        if resample == "down":
            return (
                x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
            ) / 4
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2) if resample else x

    def silu(x):
        return x / (1 + (-x).exp())

    h = F.conv2d(
        resized(silu(norm(x, block.norm1))), block.conv1.weight, block.conv1.bias, padding=1
    )
    time = (emb @ block.time.weight.T + block.time.bias)[:, :, None, None]
    if scale_shift:
        h = norm(h, block.norm2) * (1 + time[:, :16]) + time[:, 16:]
    else:
        h = norm(h + time, block.norm2)
    h = F.conv2d(silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    want = h + F.conv2d(resized(x), block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x, emb), want, rtol=1e-4, atol=1e-4)


def attention(layer, x, heads):
    """Self-attention with the rows of qkv as all queries, all keys, all values; long-hand."""
    n, c, width = x.shape[0], x.shape[1], x.shape[1] // heads
    rows = layer.qkv.weight.flatten(1) @ norm(x, layer.norm).flatten(2)
    rows = rows + layer.qkv.bias[:, None]
    h = torch.empty(n, c, rows.shape[-1])
    for head in range(heads):
        q, k, v = (rows[:, i * c + head * width : i * c + (head + 1) * width] for i in range(3))
        weights = (torch.einsum("ncl,ncm->nlm", q, k) / math.sqrt(width)).softmax(-1)
        h[:, head * width : (head + 1) * width] = torch.einsum("nlm,ncm->ncl", weights, v)
    return x + F.conv2d(h.reshape(x.shape), layer.proj.weight, layer.proj.bias)


@pytest.mark.parametrize("heads", [{"num_heads": 1}, {"num_heads": 4}, {"head_channels": 4}])
def test_attention_is_the_formula_in_both_orders(heads, tiny_config):
    config = tiny_config(**heads)
    layer = Attention(config, 16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, number = torch.randn(2, 16, 4, 6), 1 if heads == {"num_heads": 1} else 4
    want = attention(layer, x, number)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    other = Attention(dataclasses.replace(config, qkv_order="heads"), 16)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for p in (other.qkv.weight, other.qkv.bias):
            p.copy_(p.reshape(3, number, -1, *p.shape[1:]).transpose(0, 1).reshape(p.shape))
    torch.testing.assert_close(other(x), want, rtol=1e-4, atol=1e-4)
