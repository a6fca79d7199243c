"""Where a prepared network uses `ops.conv2d`: its layers, and what `info` says of them."""

import pickle

import pytest
import torch
from conv_cases import BF16, F32, LAST, LAYERS, case, needs_bfloat16

from ddpm_fast import backend, fused, info, ops
from ddpm_fast.inference import prepare


def layer_of(layer, dtype, end=(0, 0)):
    *_, stride, padding, size = layer
    weight, bias = case(layer, 1, F32)[1:3]
    return fused.Conv(weight, bias, dtype, size, padding, stride, end=end)


@needs_bfloat16
@pytest.mark.parametrize("has_amx", [False, True])
def test_a_network_uses_it_where_the_cpu_has_no_amx(monkeypatch, no_amx, has_amx):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)
    layer = (24, 24, (3, 3), (1, 1), (1, 1), (9, 9))
    x, _, _, residual = case(layer, 2, BF16)
    conv = layer_of(layer, BF16)
    assert conv.is_own != has_amx and conv.shape == (24, 24, 3, 3)
    assert conv.is_fused == (conv.is_own or fused.is_packable(BF16))
    assert layer_of(layer, F32).is_own
    for to in (None, residual):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: not has_amx)
        # Torch's own convolution rounds before it adds.
        torch.testing.assert_close(
            conv(x, to), layer_of(layer, BF16)(x, to), rtol=2**-7, atol=2**-6
        )


@pytest.mark.parametrize("has_amx", [False, True])
def test_with_the_level_amx_it_is_used_with_amx_too(monkeypatch, amx_level, has_amx):
    """Without Winograd's algorithm, but where that rounds less."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)
    weight, size = torch.randn(64, 64, 3, 3), (16, 16)
    usual, exact = (
        fused.Conv(weight, None, BF16, size, (1, 1), exact=exact) for exact in (False, True)
    )
    x = torch.randn(2, 64, *size, dtype=BF16).contiguous(memory_format=LAST)
    for conv, winograd in ((usual, False), (exact, True)):
        assert conv.is_own and conv.takes_half and conv.own_place[-1] == winograd
        want = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
        for given in (x, x.half()):
            assert (conv(given).double() - want).norm() < 4e-3 * want.norm()
    assert info.report()


@pytest.mark.parametrize("end", [(1, 1), (0, 2)])
def test_more_padding_at_the_end_is_the_same_with_every_kernel(monkeypatch, end):
    layer = (24, 32, (3, 3), (2, 2), (0, 0), (8, 9))
    x = case(layer, 2, F32)[0]
    own = layer_of(layer, F32, end)
    monkeypatch.setattr(ops, "is_conv2d_fastest", lambda dtype: False)
    other = layer_of(layer, F32, end)
    padded = torch.nn.functional.pad(x, (0, end[1], 0, end[0])).contiguous(memory_format=LAST)
    want = layer_of(layer, F32)(padded)
    assert not other.is_own
    for conv in (own, other):
        torch.testing.assert_close(conv(x), want)


def test_without_the_extension_there_is_none(monkeypatch):
    monkeypatch.setattr(backend, "extension", None)
    for dtype in (F32, BF16):
        assert not ops.is_conv2d_fastest(dtype) and not layer_of(LAYERS[0], dtype).is_own


@pytest.mark.parametrize("has_amx", [False, True])
def test_the_choice_is_named(monkeypatch, no_amx, has_amx):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)
    lines = dict(info.report())
    for name, dtype in (("float32", F32), ("bfloat16", BF16)):
        own = f"own ({backend.conv_kernels(dtype)})"
        wanted = own if ops.is_conv2d_fastest(dtype) else "oneDNN's"
        if has_amx and dtype == BF16 and ops.has_conv2d(dtype):
            wanted = f"oneDNN's; at the network's ends {own}"
        assert lines[f"{name} convolutions"] == wanted


@needs_bfloat16
def test_a_pickled_layer_stays_on_cpus_of_its_kind(monkeypatch):
    if not ops.is_conv2d_fastest(BF16):
        pytest.skip("prepared networks use oneDNN here")
    written = pickle.dumps(layer_of(LAYERS[4], BF16))
    x = case(LAYERS[4], 2, BF16)[0]
    assert torch.equal(pickle.loads(written)(x), layer_of(LAYERS[4], BF16)(x))
    for name, there in (("conv_kernels", lambda dtype: "other"), ("extension", None)):
        with monkeypatch.context() as patch:
            patch.setattr(backend, name, there)
            with pytest.raises(RuntimeError, match="prepared for another CPU or by another"):
                pickle.loads(written)
    monkeypatch.setattr(fused, "PACKING", 1)
    with pytest.raises(RuntimeError, match="prepared for another CPU or by another"):
        pickle.loads(written)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_pickled_network_of_another_version_is_refused(is_own, monkeypatch, tiny_unet):
    """Also one without packed weights of our own."""
    if not is_own:
        monkeypatch.setattr(ops, "is_conv2d_fastest", lambda dtype: False)
    network = prepare(tiny_unet(), torch.device("cpu"), F32)
    written = pickle.dumps(network)
    assert pickle.loads(written).packing == fused.PACKING
    del network.packing  # as before there was one
    with pytest.raises(RuntimeError, match="prepared for another CPU or by another"):
        pickle.loads(pickle.dumps(network))
    monkeypatch.setattr(fused, "PACKING", 1)
    with pytest.raises(RuntimeError, match="prepared for another CPU or by another"):
        pickle.loads(written)
