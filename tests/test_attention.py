"""`ops.attention` against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import backend, ops

LAST, BF16, F32 = torch.channels_last, torch.bfloat16, torch.float32
LONG = (16, (40, 30), 2)
# (channels, (H, W), heads): every width of a block of channels and of positions, also odd ones;
# fewer positions than are taken at a time, and more; Ho et al.'s; one long sequence.
SHAPES = [
    (256, (16, 16), 1),
    (256, (4, 4), 1),
    (96, (7, 7), 1),
    (96, (7, 7), 4),
    (24, (5, 5), 2),
    (72, (6, 6), 3),
    (40, (9, 8), 1),
    (7, (3, 5), 1),
    (9, (1, 50), 3),
    (6, (1, 1), 2),
    (1, (1, 3), 1),
    (16, (24, 25), 2),
    LONG,
]


@pytest.fixture(params=[(F32, ""), (BF16, "avx512"), (BF16, "amx")], ids=str)
def dtype(request, extension):
    """The dtype of the kernels of a level, which is in use."""
    dtype, level = request.param
    if level == "amx":
        is_emulated = request.getfixturevalue("amx_level") is not None
        if is_emulated and request.node.callspec.params.get("shape") == LONG:
            pytest.skip("an emulator takes half a minute for it")
    elif level in extension.cpu_levels_available():
        extension._set_cpu_level(level)
    if not backend.has_attention(dtype):
        pytest.skip("this CPU has no AVX-512 for it")
    return dtype


def case(shape, n, dtype, seed=0):
    """Query, key and value as the channels of one tensor; the query's scale is the usual one."""
    channels, size, heads = shape
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(n, 3 * channels, *size, generator=generator)
    projected[:, :channels] *= 2 * (heads / channels) ** 0.5
    return projected.to(dtype).contiguous(memory_format=LAST).chunk(3, 1)


def formula(query, key, value, heads):
    """The result, and how large its terms are: in float64."""
    q, k, v = (x.double().flatten(2).unflatten(1, (heads, -1)).mT for x in (query, key, value))
    results = (F.scaled_dot_product_attention(q, k, x, scale=1.0) for x in (v, v.abs()))
    return [x.mT.reshape(query.shape) for x in results]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention(dtype, shape):
    """Within a rounding of the weights and one of the result, and float32's of scores and sums."""
    rounding = 2**-8 if dtype == BF16 else 0.0
    for n in (1, 3):
        inputs = case(shape, n, dtype)
        got = ops.attention(*inputs, shape[2])
        want, size = formula(*inputs, shape[2])
        assert got.dtype == dtype and got.is_contiguous(memory_format=LAST)
        assert got.shape == want.shape
        assert ((got.double() - want).abs() <= rounding * (want.abs() + size) + 2e-5 * size).all()


@pytest.mark.parametrize(
    "shape,products",
    [
        ((256, (16, 16), 1), 16 * 16 * 8 + 16 * 16 * 8),
        ((96, (7, 7), 1), 4 * 4 * 3 + 4 * 6 * 2),
        ((40, (4, 4), 2), 2 * (1 * 1 * 1 + 1 * 2 * 1)),
    ],
)
def test_both_products_are_of_tiles_which_are_given_back(shape, products, amx_level):
    """Of 16 queries, 16 positions and 32 channels; 16 queries, 16 channels and 32 positions."""
    if amx_level is None:
        pytest.skip("this CPU does not count its instructions")
    torch.set_num_threads(1)
    ops.attention(*case(shape, 1, BF16), shape[2])
    assert amx_level()["tdpbf16ps"] == products and amx_level()["tilerelease"] == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neither_batch_nor_place_nor_threads_change_a_bit(dtype, shape):
    inputs = case(shape, 5, dtype)
    torch.set_num_threads(1)
    want = ops.attention(*inputs, shape[2])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.attention(*inputs, shape[2]), want)
        for part in (slice(0, 1), slice(4, 5), slice(1, 4)):
            got = ops.attention(*(x[part] for x in inputs), shape[2])
            assert torch.equal(got, want[part])


def test_the_same_tensor_may_be_key_and_value(dtype):
    query, key, _ = (x.contiguous(memory_format=LAST) for x in case((48, (6, 6), 1), 2, dtype))
    got = ops.attention(query, key, key)
    assert torch.equal(got, ops.attention(query, key, key.clone(memory_format=LAST)))
    assert not torch.equal(got, ops.attention(query, key, query))


def test_large_scores_do_not_overflow(dtype):
    query, key, value = case((16, (4, 4), 1), 2, dtype)
    query, key = 1e4 * query, 1e4 * key
    got, (want, _) = ops.attention(query, key, value), formula(query, key, value, 1)
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-6)


def test_what_is_not_finite_stays_so(dtype):
    query, key, value = case((16, (4, 4), 2), 2, dtype)
    clean = ops.attention(query, key, value, 2)
    query[0, 3, 1, 2] = float("nan")
    got = ops.attention(query, key, value, 2)
    assert got[0, :8, 1, 2].isnan().all() and int(got.isnan().sum()) == 8
    assert torch.equal(got[1], clean[1])
    key[0, 9, 1, 2], value[1, 5, 3, 0] = float("-inf"), float("nan")
    got, (want, _) = ops.attention(query, key, value, 2), formula(query, key, value, 2)
    assert torch.equal(got.isnan(), want.isnan())
    assert 8 < int(got.isnan().sum()) < got.numel() // 2
    lowest = torch.full((1, 4, 3, 3), float("-inf"), dtype=dtype).contiguous(memory_format=LAST)
    ones = lowest.isinf().to(dtype)
    assert ops.attention(ones, lowest, ones).isnan().all()


def test_no_samples_and_no_pixels(dtype):
    for shape in ((0, 4, 2, 2), (2, 4, 0, 2)):
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=LAST)
        assert ops.attention(x, x, x).shape == shape


def test_opcheck(dtype):
    inputs = case((6, (2, 3), 2), 2, dtype)
    torch.library.opcheck(torch.ops.ddpm_fast.attention.default, (*inputs, 2))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"query": torch.zeros(2, 4, 2, 2).half()}, "query must be float32 or bfloat16, but"),
        ({"query": torch.zeros(2, 4, 2)}, r"shape \(N, C, H, W\), but it is \(2, 4, 2\)"),
        ({"key": torch.zeros(2, 4, 2, 2)}, "key must be channels_last"),
        ({"value": torch.zeros(2, 4, 2, 3)}, r"value must have the shape of query, \(2, 4, 2, 2\)"),
        ({"value": torch.zeros(2, 4, 2, 2).bfloat16()}, "value must be float32"),
        ({"heads": 3}, "heads must divide the 4 channels, but it is 3"),
        ({"heads": 0}, "heads must divide"),
    ],
)
def test_what_does_not_fit_is_refused(extension, change, message):
    x = torch.zeros(2, 4, 2, 2).contiguous(memory_format=LAST)
    arguments = {"query": x, "key": x, "value": x, "heads": 1} | change
    with pytest.raises(RuntimeError, match=message):
        ops.attention(**arguments)


def test_a_lower_level_has_none(extension):
    extension._set_cpu_level("baseline")
    for dtype, wanted in ((F32, "AVX-512"), (BF16, "AVX512-BF16")):
        assert not backend.has_attention(dtype) and not ops.is_attention_fastest(dtype)
        x = torch.zeros(1, 2, 1, 1, dtype=dtype).contiguous(memory_format=LAST)
        with pytest.raises(RuntimeError, match=f"attention needs a CPU with {wanted}"):
            ops.attention(x, x, x)


def test_where_it_is_fastest(dtype, extension, monkeypatch):
    for has_amx in (False, True):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        wanted = dtype == F32 or not has_amx or extension.cpu_level() == "amx"
        assert ops.is_attention_fastest(dtype) == wanted
    monkeypatch.setattr(backend, "extension", None)
    assert not ops.is_attention_fastest(dtype)
