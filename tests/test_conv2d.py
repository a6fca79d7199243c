"""`ops.conv2d` against torch's convolution in float64, and where a prepared network uses it."""

import pickle
import platform

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


# Those that Winograd's algorithm is for, and tiles of it that hang over the edges of the output.
LAYERS_3X3 = [layer for layer in LAYERS if layer[2:4] == ((3, 3), (1, 1))] + [
    (17, 130, (3, 3), (1, 1), (0, 2), (7, 10)),
    (512, 70, (3, 3), (1, 1), (1, 1), (9, 30)),  # more than one strip
]
KERNELS = {"avx512_bf16": BF16, "avx512": F32, "avx2": F32}


@pytest.fixture(params=KERNELS)
def dtype(request, extension):
    """The dtype of the kernels of one instruction set, which are in use."""
    dtype, level = KERNELS[request.param], request.param.removesuffix("_bf16")
    if level not in extension.cpu_levels_available():
        pytest.skip(f"this CPU has no {level}")
    extension._set_cpu_level(level)
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


def convolution(layer, x, weight, bias=None, residual=None, winograd=False):
    packed = ops.pack_conv2d(weight.float(), x.dtype, winograd)
    return ops.conv2d(x, packed, bias, residual, *layer[1:5], winograd)


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


@pytest.mark.parametrize("layer", LAYERS_3X3, ids=str)
def test_winograd_is_the_convolution(dtype, layer):
    """In float32 within a few times the rounding of what lies around; the sums of a tile are not
    those of its outputs alone. In bfloat16 the weights, as float16, are rounded once more."""
    padding, slack = layer[4], {F32: 2**-20, BF16: 2**-9}[dtype]
    x, weight, bias, residual = case(layer, 3, dtype)
    weight = weight.float()
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        got = convolution(layer, x, weight, b, r, winograd=True)
        want = F.conv2d(x.double(), weight.double(), b if b is None else b.double(), 1, padding)
        around = F.max_pool2d(x.double().abs(), 9, 1, 4)
        size = F.conv2d(around, weight.double().abs(), None, 1, padding).amax(1, keepdim=True)
        if r is not None:
            want = want + r.double()
        assert got.dtype == dtype and got.is_contiguous(memory_format=LAST)
        assert got.shape == want.shape
        rounding = 2**-8 if dtype == BF16 else 2**-24
        apart = got.double() - want
        assert (apart.abs() <= rounding * want.abs() + slack * (size + 1)).all()
        assert apart.norm() <= {F32: 3e-6, BF16: 3e-3}[dtype] * want.norm()


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e8])
def test_winograds_weights_have_any_size(dtype, size):
    """Also where they are kept as float16."""
    layer = (64, 33, (3, 3), (1, 1), (1, 1), (8, 8))
    x, weight, _, _ = case(layer, 1, dtype)
    weight = size * weight.float()
    weight[3] *= 1e-3
    got = convolution(layer, x, weight, winograd=True).double()
    want = F.conv2d(x.double(), weight.double(), padding=1)
    for channel in (3, 4):
        apart = got[:, channel] - want[:, channel]
        assert apart.norm() <= {F32: 2e-6, BF16: 4e-3}[dtype] * want[:, channel].norm()


@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("layer", LAYERS + LAYERS_3X3[-2:], ids=str)
def test_neither_batch_nor_place_nor_threads_change_a_bit(dtype, layer, winograd):
    if winograd and layer not in LAYERS_3X3:
        pytest.skip("Winograd's algorithm is not for this layer")
    x, weight, bias, residual = case(layer, 7, dtype)
    torch.set_num_threads(1)
    want = convolution(layer, x, weight, bias, residual, winograd)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(convolution(layer, x, weight, bias, residual, winograd), want)
        for part in (slice(0, 1), slice(6, 7), slice(2, 5)):
            got = convolution(layer, x[part], weight, bias, residual[part], winograd)
            assert torch.equal(got, want[part])


def upsampled(x, weight, bias, taps):
    """Of a weight (O, I, 3, 3), or (O, I, 1, 3) for a series."""
    conv = torch.nn.Conv2d(*weight.shape[1::-1], taps, padding=tuple(k // 2 for k in taps))
    conv.weight, conv.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return fused.UpsampleConv(conv.requires_grad_(False), x.dtype, x.shape[2:])(x)


@pytest.mark.parametrize("taps", [(3, 3), (1, 3)])
@pytest.mark.parametrize("channels", [(24, 24), (5, 70)])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (6, 5), (16, 16)])
def test_upsampling_is_a_convolution_of_the_doubled_image(dtype, taps, channels, size):
    """The phases' weights are sums, rounded to the dtype; of whole numbers, they are exact."""
    generator = torch.Generator().manual_seed(0)
    factors = [2.0 if k == 3 else 1.0 for k in taps]

    def draw(*shape):
        return torch.randint(-3, 4, shape, generator=generator).float()

    x = draw(5, channels[0], *size).to(dtype).contiguous(memory_format=LAST)
    weight, bias = draw(channels[1], channels[0], *taps), draw(channels[1])
    doubled = F.interpolate(x.double(), scale_factor=factors)
    padding = tuple(k // 2 for k in taps)
    want = F.conv2d(doubled, weight.double(), bias.double(), padding=padding).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = upsampled(x, weight, bias, taps)
        assert torch.equal(got, want) and got.is_contiguous(memory_format=LAST)
        assert torch.equal(upsampled(x[2:3], weight, bias, taps), want[2:3])


@pytest.mark.parametrize("winograd", [False, True])
def test_no_samples(dtype, winograd):
    layer = LAYERS[0]
    x, weight, bias, _ = case(layer, 0, dtype)
    assert convolution(layer, x, weight, bias, None, winograd).shape == (0, 24, 28, 28)


@pytest.mark.parametrize("winograd", [False, True])
def test_what_is_not_finite_stays_so(dtype, winograd):
    """With Winograd's algorithm in all tiles that see it, otherwise in the outputs that do."""
    layer = (16, 24, (3, 3), (1, 1), (1, 1), (8, 8))
    x, weight, bias, _ = case(layer, 2, dtype)
    clean = convolution(layer, x, weight, bias, None, winograd)
    x[1, 3, 3, 6] = float("nan")
    got = convolution(layer, x, weight, bias, None, winograd)
    assert got[1, :, 2:5, 5:8].isnan().all() and torch.equal(got[0], clean[0])
    assert int(got.isnan().sum()) <= 24 * (32 if winograd else 9)


@pytest.mark.parametrize("winograd", [False, True])
def test_opcheck(dtype, winograd):
    layer = (4, 6, (3, 3), (1, 1), (1, 0), (7, 8))
    x, weight, bias, residual = case(layer, 2, dtype)
    weight = weight.float()
    packed = ops.pack_conv2d(weight, dtype, winograd)
    settings = [v if i == 0 else list(v) for i, v in enumerate(layer[1:5])]
    for b, r in ((None, None), (bias, residual)):
        arguments = (x, packed, b, r, *settings, winograd)
        torch.library.opcheck(torch.ops.ddpm_fast.conv2d.default, arguments)
    torch.library.opcheck(torch.ops.ddpm_fast.pack_conv2d.default, (weight, dtype, winograd))
    phases = torch.stack([ops.pack_conv2d(weight[:, :, :2, :2], dtype)] * 4)
    torch.library.opcheck(torch.ops.ddpm_fast.upsample_conv2d.default, (x, phases, bias, 6))


def test_a_thread_keeps_little_memory(dtype):
    """A 1 x 1 convolution whose pixels are copied, because their channels are filled up."""
    layer = (127, 8, (1, 1), (1, 1), (0, 0), (256, 256))
    x, weight, bias, _ = case(layer, 4, dtype)
    torch.set_num_threads(1)

    def in_use():
        return int(next(s for s in open("/proc/self/status") if "VmRSS" in s).split()[1])

    convolution(layer, x[:1], weight, bias)
    before = in_use()
    convolution(layer, x, weight, bias)
    assert in_use() - before < 16 * 1024  # KiB; x is 64 MiB or 128


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_is_freed_fits_the_next_result(dtype):
    """Also between others that are in use."""
    layer = (16, 32, (1, 1), (1, 1), (0, 0), (32, 32))
    x, weight, _, _ = case(layer, 4, dtype)
    packed = ops.pack_conv2d(weight.float(), dtype)

    def results(count):
        return [ops.conv2d(x, packed, None, None, *layer[1:5], False) for _ in range(count)]

    first = results(32)
    assert all(y.data_ptr() % 64 == 0 for y in first)
    freed = {y.data_ptr() for y in first[::2]}
    del first[::2]
    assert len(freed & {y.data_ptr() for y in results(16)}) >= 12


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 4, 3, 5, dtype=BF16)}, "x must be channels_last without gaps"),
        ({"x": torch.zeros(2, 4, 3, 5).half()}, "float32 and bfloat16, but the dtype is float16"),
        ({"x": torch.zeros(2, 4, 5, dtype=BF16)}, r"the shape \(N, C, H, W\), but it is \(2, 4, 5"),
        ({"x": torch.zeros(2, 0, 3, 5, dtype=BF16)}, "must have channels, but they have 0 and 6"),
        ({"x": torch.zeros(2, 6, 3, 5, dtype=BF16).contiguous(memory_format=LAST)},
         r"pack_conv2d makes of a weight \(6, 6, 3, 3\)"),
        ({"padding": [0, -1]}, "padding must be two integers from 0 to 1024"),
        ({"padding": [0, 0], "kernel_size": [5, 1]}, "as large as the kernel, with its padding"),
        ({"stride": [0, 1]}, "stride must be two integers from 1"),
        ({"kernel_size": [3]}, "kernel_size must be two integers"),
        ({"winograd": True}, "weight must be float16, but it is bfloat16"),
        ({"winograd": True, "stride": [1, 2]}, "winograd is for stride 1, but it is 1 and 2"),
        ({"winograd": True, "kernel_size": [3, 2]}, "kernels of 3 x 3, but this is 3 x 2"),
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
        "weight": ops.pack_conv2d(torch.zeros(6, 4, 3, 3), BF16),
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
    "weight,message",
    [
        (torch.zeros(3, 512, dtype=BF16), r"shape \(4, packed\), or \(2, packed\) .* \(3, 512\)"),
        (torch.zeros(4, 7, dtype=BF16), r"pack_conv2d makes of 4 weights \(6, 4, 2, 2\)"),
        (torch.zeros(4, 7), "weight must be bfloat16, but it is float32"),
    ],
)
def test_an_upsamplings_weights_that_do_not_fit_are_refused(bfloat16, weight, message):
    x = torch.zeros(2, 4, 3, 5, dtype=BF16).contiguous(memory_format=LAST)
    with pytest.raises(RuntimeError, match=message):
        ops.upsample_conv2d(x, weight, None, 6)


@pytest.mark.parametrize(
    "weight,dtype,winograd,message",
    [
        (torch.zeros(2, 3, 1, 1).half(), BF16, False, "weight must be float32"),
        (torch.zeros(2, 0, 1, 1), BF16, False, "not empty, but it is"),
        (torch.zeros(2, 3, 1, 1), torch.float16, False, "but the dtype is float16"),
        (torch.zeros(2, 3, 1, 1), BF16, True, "kernels of 3 x 3, but this is 1 x 1"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(bfloat16, weight, dtype, winograd, message):
    with pytest.raises(RuntimeError, match=message):
        ops.pack_conv2d(weight, dtype, winograd)


def test_a_lower_level_has_none(extension):
    extension._set_cpu_level("baseline")
    for dtype, wanted in ((F32, "AVX2"), (BF16, "AVX512-BF16")):
        assert backend.conv_kernels(dtype) is None and not ops.is_conv2d_fastest(dtype)
        with pytest.raises(RuntimeError, match=f"conv2d needs a CPU with {wanted}"):
            ops.pack_conv2d(torch.zeros(2, 2, 1, 1), dtype)


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
    for name, there in (("conv_kernels", lambda dtype: "other"), ("extension", None)):
        with monkeypatch.context() as patch:
            patch.setattr(backend, name, there)
            with pytest.raises(RuntimeError, match="prepared for another CPU or by another"):
                pickle.loads(written)
    monkeypatch.setattr(fused, "PACKING", 1)
    with pytest.raises(RuntimeError, match="prepared for another CPU or by another"):
        pickle.loads(written)
