"""`ops.conv2d` against torch's convolution in float64, and where a prepared network uses it."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import backend, fused, info, ops

LAST, BF16, F32 = torch.channels_last, torch.bfloat16, torch.float32
# (C_in, C_out, kernel, stride, padding, size): channels of every width of a block, also odd ones;
# images of fewer pixels than a tile has; a padding that hides whole rows of the kernel.
LAYERS = [
    (1, 24, (3, 3), (1, 1), (1, 1), (28, 28)),
    (24, 1, (3, 3), (1, 1), (1, 1), (28, 28)),
    (3, 128, (3, 3), (1, 1), (1, 1), (16, 16)),
    (128, 6, (3, 3), (1, 1), (1, 1), (16, 16)),
    (24, 48, (3, 3), (2, 2), (0, 0), (29, 29)),
    (48, 48, (3, 3), (2, 2), (1, 1), (14, 14)),
    (96, 96, (3, 3), (1, 1), (1, 1), (7, 7)),
    (64, 160, (3, 3), (1, 1), (1, 1), (4, 4)),
    (32, 40, (3, 3), (1, 1), (1, 1), (2, 2)),
    (24, 56, (3, 3), (1, 1), (1, 1), (1, 1)),
    (96, 192, (2, 2), (1, 1), (1, 1), (7, 7)),
    (48, 24, (1, 1), (1, 1), (0, 0), (14, 14)),
    (5, 7, (1, 1), (1, 1), (0, 0), (3, 5)),
    (16, 17, (1, 1), (2, 2), (0, 0), (9, 8)),
    (16, 24, (1, 3), (1, 1), (0, 1), (1, 50)),
    (16, 32, (1, 2), (1, 2), (0, 1), (1, 33)),
    (7, 65, (5, 3), (2, 1), (4, 2), (6, 9)),
    (2, 3, (2, 2), (1, 1), (5, 5), (1, 1)),
    (256, 16, (3, 3), (1, 1), (1, 1), (40, 20)),  # more than one strip
]


KERNELS = {"avx512_bf16": BF16, "avx512": F32}


@pytest.fixture(params=KERNELS)
def dtype(request, extension):
    """The dtype of the kernels of one instruction set."""
    dtype = KERNELS[request.param]
    if backend.conv_kernels(dtype) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return dtype


@pytest.fixture
def bfloat16(extension):
    if backend.conv_kernels(BF16) is None:
        pytest.skip("this CPU has no AVX-512 for bfloat16")


def case(layer, n, dtype, seed=0):
    """(x, weight, bias, residual)."""
    c_in, c_out, kernel, stride, padding, size = layer
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x = (draw(n, c_in, *size) + 0.5).to(dtype).contiguous(memory_format=LAST)
    weight = (draw(c_out, c_in, *kernel) / (c_in * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    residual = draw(n, c_out, *out).to(dtype).contiguous(memory_format=LAST)
    return x, weight, draw(c_out), residual


def convolution(layer, x, weight, bias=None, residual=None):
    return ops.conv2d(x, ops.pack_conv2d(weight), bias, residual, *layer[1:5])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_it_is_the_convolution(dtype, layer):
    """Within what one rounding to its dtype, and one to float32 a product, can do."""
    rounding = 2**-8 if dtype == BF16 else 2**-24
    *_, stride, padding, _ = layer
    products = layer[0] * layer[2][0] * layer[2][1]
    for n in (1, 3):
        x, weight, bias, residual = case(layer, n, dtype)
        for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
            got = convolution(layer, x, weight, b, r)
            exact = [None if t is None else t.double() for t in (x, weight, b)]
            want = F.conv2d(*exact, stride, padding)
            size = F.conv2d(*(t if t is None else t.abs() for t in exact), stride, padding)
            if r is not None:
                want, size = want + r.double(), size + r.double().abs()
            assert got.dtype == dtype and got.is_contiguous(memory_format=LAST)
            assert got.shape == want.shape
            apart = (got.double() - want).abs()
            assert (apart <= rounding * want.abs() + (products + 2) * 2**-24 * size).all()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_neither_batch_nor_place_nor_threads_change_a_bit(dtype, layer):
    x, weight, bias, residual = case(layer, 7, dtype)
    torch.set_num_threads(1)
    want = convolution(layer, x, weight, bias, residual)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(convolution(layer, x, weight, bias, residual), want)
        for part in (slice(0, 1), slice(6, 7), slice(2, 5)):
            got = convolution(layer, x[part], weight, bias, residual[part])
            assert torch.equal(got, want[part])


def test_no_samples(dtype):
    layer = LAYERS[0]
    x, weight, bias, _ = case(layer, 0, dtype)
    assert convolution(layer, x, weight, bias).shape == (0, 24, 28, 28)


def test_what_is_not_finite_stays_so(dtype):
    layer = (16, 24, (3, 3), (1, 1), (1, 1), (8, 8))
    x, weight, bias, _ = case(layer, 2, dtype)
    clean = convolution(layer, x, weight, bias)
    x[1, 3, 4, 5] = float("nan")
    got = convolution(layer, x, weight, bias)
    assert got[1, :, 3:6, 4:7].isnan().all() and int(got.isnan().sum()) == 24 * 9
    assert torch.equal(got[0], clean[0])


def test_opcheck(dtype):
    layer = (4, 6, (3, 3), (2, 1), (1, 0), (7, 8))
    x, weight, bias, residual = case(layer, 2, dtype)
    packed, settings = (
        ops.pack_conv2d(weight),
        [v if i == 0 else list(v) for i, v in enumerate(layer[1:5])],
    )
    for b, r in ((None, None), (bias, residual)):
        torch.library.opcheck(torch.ops.ddpm_fast.conv2d.default, (x, packed, b, r, *settings))
    torch.library.opcheck(torch.ops.ddpm_fast.pack_conv2d.default, (weight,))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 4, 3, 5, dtype=BF16)}, "x must be channels_last without gaps"),
        ({"x": torch.zeros(2, 4, 3, 5).half()}, "x must be float32 or bfloat16, but it is float16"),
        ({"x": torch.zeros(2, 4, 5, dtype=BF16)}, r"the shape \(N, C, H, W\), but it is \(2, 4, 5"),
        ({"x": torch.zeros(2, 0, 3, 5, dtype=BF16)}, "must have channels, but they have 0 and 6"),
        ({"x": torch.zeros(2, 6, 3, 5, dtype=BF16).contiguous(memory_format=LAST)},
         r"pack_conv2d makes of a weight \(6, 6, 3, 3\)"),
        ({"padding": [0, -1]}, "padding must be two integers from 0 to 1024"),
        ({"padding": [0, 0], "kernel_size": [5, 1]}, "as large as the kernel, with its padding"),
        ({"stride": [0, 1]}, "stride must be two integers from 1"),
        ({"kernel_size": [3]}, "kernel_size must be two integers"),
        ({"weight": torch.zeros(6, 4, 3, 3, dtype=BF16)}, "weight must be what pack_conv2d makes"),
        ({"weight": torch.zeros(6)}, "weight must be bfloat16, but it is float32"),
        ({"bias": torch.zeros(4)}, r"bias must have the shape \(6,\), but it is \(4\)"),
        ({"bias": torch.zeros(6, dtype=BF16)}, "bias must be float32, but it is bfloat16"),
        ({"residual": torch.zeros(2, 6, 3, 4, dtype=BF16).contiguous(memory_format=LAST)},
         r"residual must have the shape of the result, \(2, 6, 3, 5\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(bfloat16, change, message):
    arguments = {
        "x": torch.zeros(2, 4, 3, 5, dtype=BF16).contiguous(memory_format=LAST),
        "weight": ops.pack_conv2d(torch.zeros(6, 4, 3, 3, dtype=BF16)),
        "bias": None,
        "residual": None,
        "out_channels": 6,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
    } | change
    with pytest.raises(RuntimeError, match=message):
        ops.conv2d(**arguments)


@pytest.mark.parametrize(
    "weight", [torch.zeros(2, 3, 1, 1).half(), torch.zeros(2, 0, 1, 1, dtype=BF16)]
)
def test_weights_that_cannot_be_packed_are_refused(bfloat16, weight):
    with pytest.raises(RuntimeError, match=r"must be float32 or bfloat16|not empty, but it is"):
        ops.pack_conv2d(weight)


def test_a_lower_level_has_none(extension):
    extension._set_cpu_level("baseline")
    for dtype, wanted in ((F32, "AVX-512"), (BF16, "AVX512-BF16")):
        assert backend.conv_kernels(dtype) is None and not ops.is_conv2d_fastest(dtype)
        with pytest.raises(RuntimeError, match=f"conv2d needs a CPU with {wanted}"):
            ops.pack_conv2d(torch.zeros(2, 2, 1, 1, dtype=dtype))


def layer_of(layer, dtype):
    *_, stride, padding, size = layer
    weight, bias = case(layer, 1, F32)[1:3]
    return fused.Conv(weight, bias, dtype, size, padding, stride)


@pytest.mark.parametrize("has_amx", [False, True])
def test_a_network_uses_it_where_the_cpu_has_no_amx(bfloat16, monkeypatch, has_amx):
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


def test_without_the_extension_there_is_none(monkeypatch):
    monkeypatch.setattr(backend, "extension", None)
    for dtype in (F32, BF16):
        assert not ops.is_conv2d_fastest(dtype) and not layer_of(LAYERS[0], dtype).is_own


def test_the_choice_is_named():
    lines = dict(info.report())
    for name, dtype in (("float32", F32), ("bfloat16", BF16)):
        own = f"own ({backend.conv_kernels(dtype)})"
        wanted = own if ops.is_conv2d_fastest(dtype) else "oneDNN's"
        assert lines[f"{name} convolutions"] == wanted


def test_a_pickled_layer_stays_on_cpus_of_its_kind(bfloat16, monkeypatch):
    if not ops.is_conv2d_fastest(BF16):
        pytest.skip("prepared networks use oneDNN here")
    written = pickle.dumps(layer_of(LAYERS[4], BF16))
    x = case(LAYERS[4], 2, BF16)[0]
    assert torch.equal(pickle.loads(written)(x), layer_of(LAYERS[4], BF16)(x))
    monkeypatch.setattr(ops, "is_conv2d_fastest", lambda dtype: False)
    with pytest.raises(RuntimeError, match="prepared for another CPU"):
        pickle.loads(written)
