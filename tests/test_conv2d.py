"""`ops.conv2d` and `ops.upsample_conv2d` against torch's convolution in float64."""

import platform

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    BF16,
    F32,
    LAST,
    LAYERS,
    LAYERS_3X3,
    case,
    convolution,
    needs_bfloat16,
)

from ddpm_fast import backend, fused, ops

KERNELS = {"avx512_bf16": BF16, "avx512": F32, "avx2": F32, "amx": BF16}


@pytest.fixture(params=KERNELS)
def dtype(request, extension):
    """The dtype of the kernels of one instruction set, which are in use."""
    dtype, level = KERNELS[request.param], request.param.removesuffix("_bf16")
    if level == "amx":
        request.getfixturevalue("amx_level")
        return dtype
    if level not in extension.cpu_levels_available():
        pytest.skip(f"this CPU has no {level}")
    extension._set_cpu_level(level)
    if backend.conv_kernels(dtype) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return dtype


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


@needs_bfloat16
@pytest.mark.parametrize("layer", LAYERS_3X3, ids=str)
def test_winograd_of_float16(layer):
    """As of float32, but for the weights; the result is what that is rounded to."""
    x, weight, bias, residual = case(layer, 3, torch.float16)
    packed = ops.pack_conv2d(weight.float(), BF16, True)
    assert torch.equal(packed, ops.pack_conv2d(weight.float(), torch.float16, True))
    for half, r in ((False, residual.to(BF16)), (False, None), (True, residual), (True, None)):
        want = F.conv2d(x.double(), weight.double(), bias.double(), 1, layer[4])
        want = want if r is None else want + r.double()
        got = ops.conv2d(x, packed, bias, r, *layer[1:5], True, half)
        assert got.dtype == (torch.float16 if half else BF16)
        assert got.is_contiguous(memory_format=LAST)
        assert (got.double() - want).norm() <= (1.5e-3 if half else 2.5e-3) * want.norm()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_tiles_of_float16(amx_level, layer):
    """x is rounded to bfloat16; the result is what that is rounded to."""
    x, weight, bias, residual = case(layer, 3, torch.float16)
    packed = ops.pack_conv2d(weight.float(), BF16)
    assert torch.equal(packed, ops.pack_conv2d(weight.float(), torch.float16))
    same = ops.conv2d(x.bfloat16(), packed, bias, residual.bfloat16(), *layer[1:5])
    got = ops.conv2d(x, packed, bias, residual.bfloat16(), *layer[1:5])
    assert got.dtype == BF16 and torch.equal(got, same)
    exact = [x.bfloat16().double(), weight.bfloat16().double(), bias.double()]
    want = F.conv2d(*exact, *layer[3:5]) + residual.double()
    got = ops.conv2d(x, packed, bias, residual, *layer[1:5], half=True)
    assert got.dtype == torch.float16 and got.is_contiguous(memory_format=LAST)
    assert (got.double() - want).norm() <= 4e-4 * want.norm()


def test_tiles_are_given_back(amx_level):
    """A thread that keeps them makes each change of threads save them."""
    if amx_level is None:
        pytest.skip("this CPU does not count its instructions")
    torch.set_num_threads(1)
    for layer in ((32, 32, (1, 1), (1, 1), (0, 0), (2, 2)), LAYERS[1]):
        x, weight, bias, _ = case(layer, 1, BF16)
        before = amx_level()["tilerelease"]
        convolution(layer, x, weight, bias)
        assert amx_level()["tilerelease"] == before + 1


def test_an_upsampling_by_tiles_takes_no_float16(amx_level):
    weight = torch.zeros(4, ops.pack_conv2d(torch.zeros(6, 4, 2, 2), BF16).numel())
    x = torch.zeros(1, 4, 3, 3).half().contiguous(memory_format=LAST)
    for dtype in (BF16, torch.float16):
        with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
            ops.upsample_conv2d(x, weight.to(dtype), None, 6)


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


@pytest.mark.parametrize(
    "layer,winograd",
    [(layer, False) for layer in LAYERS] + [(layer, True) for layer in LAYERS_3X3],
    ids=str,
)
def test_neither_batch_nor_place_nor_threads_change_a_bit(dtype, layer, winograd):
    x, weight, bias, residual = case(layer, 7, dtype)
    torch.set_num_threads(1)
    want = convolution(layer, x, weight, bias, residual, winograd)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(convolution(layer, x, weight, bias, residual, winograd), want)
        for part in (slice(0, 1), slice(6, 7), slice(2, 5)):
            got = convolution(layer, x[part], weight, bias, residual[part], winograd)
            assert torch.equal(got, want[part])


@pytest.mark.parametrize(
    "stride,padding,winograd",
    [
        ((2, 2), (0, 0, 1, 1), False),  # as in Ho et al.
        ((2, 1), (1, 0, 0, 2), False),
        ((1, 1), (0, 2, 3, 1), False),
        ((1, 1), (0, 2, 3, 1), True),
    ],
)
def test_padding_may_differ_on_the_four_sides(dtype, stride, padding, winograd):
    """Bit for bit what an input with these zeros gives."""
    top, left, bottom, right = padding
    layer = (24, 40, (3, 3), stride, padding, (9, 14))
    x, weight, bias, _ = case((*layer[:4], (0, 0), layer[5]), 2, dtype)
    padded = F.pad(x, (left, right, top, bottom)).contiguous(memory_format=LAST)
    want = convolution((*layer[:4], (0, 0)), padded, weight, bias, winograd=winograd)
    assert torch.equal(convolution(layer, x, weight, bias, winograd=winograd), want)


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
    takes_half = dtype == BF16 and (winograd or backend.multiplies_tiles(BF16))
    for half in (False, True) if takes_half else ():
        arguments = (x.half(), packed, bias, None, *settings, winograd, half)
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
