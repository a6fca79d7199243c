"""The AMX emulator by itself: what each instruction does, against NumPy."""

from __future__ import annotations

import amx
import numpy as np
import pytest
from amx_forms import config

SMALLEST = np.float64(np.finfo(np.float32).tiny)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(16, 64), (1, 4), (7, 20), (16, 4), (1, 64), (13, 60)])
def test_tiles_are_loaded_stored_and_zeroed(forms, rng, shape, amx_emulator):
    rows, colsb = shape
    # The other tiles have other shapes.
    forms.configure(rows=(16, rows) * 4, colsb=(64, colsb) * 4)
    for stride in (64, 96, 1000):
        source = rng.integers(0, 256, (16, stride), np.uint8)
        forms.load(3, source)
        assert (forms.store(3, *shape) == source[:rows, :colsb]).all()
        target = source[::-1].copy()  # rows written backwards, and nothing else
        forms("store_3", target[rows - 1], -stride)
        expected = source[::-1].copy()
        expected[:rows, :colsb] = source[:rows, :colsb][::-1]
        assert (target == expected).all()
    forms("zero_3")
    assert not forms.store(3, *shape).any()
    assert amx_emulator() == dict.fromkeys(amx.INSTRUCTIONS, 0) | {
        "ldtilecfg": 1, "tilezero": 1, "tileloadd": 3, "tilestored": 7
    }  # fmt: skip


def test_a_configuration_clears_tiles_and_is_given_back(forms, rng):
    assert forms.configuration() == bytes(64)
    fields = {"rows": range(1, 9), "colsb": range(4, 36, 4)}
    for again in (lambda: forms.configure(**fields), lambda: forms("release")):
        forms.configure(**fields)
        assert forms.configuration() == config(**fields)
        forms.load(7, rng.integers(1, 256, (8, 64), np.uint8))
        again()
        forms.configure(**fields)
        assert not forms.store(7, 8, 32).any()
    forms.configure(palette=0)
    assert forms.configuration() == bytes(64)


def test_start_row_is_where_a_move_begins(forms, rng):
    source = rng.integers(1, 256, (16, 64), np.uint8)
    forms.configure(start_row=5)
    assert forms.configuration() == config(start_row=5)
    forms.load(0, source)
    assert forms.configuration() == config()
    source[:5] = 0
    assert (forms.store(0, 16, 64) == source).all()


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once, to nearest even, denormals zero; float64 of float32's numbers.

    The product is exact. The sum in float64 is rounded to odd, so that a second rounding is right.
    """
    a, b, c = (np.where(np.abs(x) < SMALLEST, np.copysign(0, x), x) for x in (a, b, c))
    product = a * b
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    away = np.where(error > 0, np.inf, -np.inf)
    even = total.view(np.int64) % 2 == 0
    total = np.where((error != 0) & even, np.nextafter(total, away), total)
    mantissa, exponent = np.frexp(total)
    total = np.ldexp(np.rint(np.ldexp(mantissa, 24)), exponent - 24)
    return np.where(np.abs(total) < SMALLEST, np.copysign(0, total), total)


def bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a (m, 2 k) and b (k, 2 n) of bfloat16's bits, c (m, n) float32."""
    a, b = bfloat16(a), bfloat16(b)
    sums = np.zeros((2, *c.shape))
    for k in range(b.shape[0]):
        for half in range(2):
            left, right = a[:, 2 * k + half, None], b[k, None, half::2]
            sums[half] = fused(left, right, sums[half])
    one = np.float64(1)
    return fused(one, c.astype(np.float64), fused(one, *sums)).astype(np.float32)


def numbers(rng, shape, kind) -> np.ndarray:
    """Bits of bfloat16."""
    if kind == "tiny":  # products and inputs that are denormal, and zeros of both signs
        exponent = rng.choice([0, 1, 40, 64], shape)
    else:
        exponent = rng.integers(*{"near": (120, 131), "far": (40, 190)}[kind], shape)
    sign, mantissa = rng.integers(0, 2, shape), rng.integers(0, 128, shape)
    return (sign << 15 | exponent << 7 | mantissa).astype(np.uint16)


@pytest.mark.parametrize("kind", ["near", "far", "tiny"])
@pytest.mark.parametrize("shape", [(16, 16, 16), (1, 1, 1), (7, 5, 11), (16, 3, 1), (2, 16, 9)])
def test_a_product_is_that_of_numpy(forms, rng, shape, kind):
    m, n, k = shape
    forms.configure(rows=(m, m, k), colsb=(4 * n, 4 * k, 4 * n))
    a, b = numbers(rng, (m, 2 * k), kind), numbers(rng, (k, 2 * n), kind)
    c = bfloat16(numbers(rng, (m, n), kind)).astype(np.float32)
    for tile, values in enumerate((c, a, b)):
        forms.load(tile, values)
    forms("product_0_1_2")
    found = forms.store(0, m, 4 * n).view(np.float32)
    expected = product(a, b, c)
    assert (found.view(np.uint32) == expected.view(np.uint32)).all()
    pairs = [bfloat16(b)[:, half::2] for half in range(2)]
    whole = [np.stack(pairs, 1).reshape(2 * k, n), bfloat16(a), c.astype(np.float64)]
    exact, size = (x[1] @ x[0] + x[2] for x in (whole, [np.abs(x) for x in whole]))
    assert (np.abs(found - exact) <= (k + 3) * 2.0**-24 * size + (k + 3) * 2 * SMALLEST).all()


def test_infinities_and_nan_stay_in_their_columns(forms):
    forms.configure(rows=(2, 2, 1), colsb=(12, 4, 12))
    forms.load(1, np.array([[0x7F80, 0], [0x3F80, 0x7FC0]], np.uint16))
    forms.load(2, np.array([[0x3F80, 0, 0, 0, 0xBF80, 0]], np.uint16))
    forms("product_0_1_2")
    found = forms.store(0, 2, 12).view(np.float32)
    np.testing.assert_array_equal(found, [[np.inf, np.nan, -np.inf], [np.nan] * 3])


def test_every_three_tiles_multiply(forms, rng):
    forms.configure()
    tiles = numbers(rng, (8, 16, 32), "near")
    loaded = tiles.view(np.float32)
    for c in range(8):
        for a in range(8):
            for b in range(8):
                if not c != a != b != c:
                    continue
                for tile in (c, a, b):
                    forms.load(tile, tiles[tile])
                forms(f"product_{c}_{a}_{b}")
                found = forms.store(c, 16, 64).view(np.uint32)
                expected = product(tiles[a], tiles[b], loaded[c]).view(np.uint32)
                assert (found == expected).all(), (c, a, b)
