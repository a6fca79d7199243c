"""The noise contract, version 1: every normal is a pure function of
(seed, sample index, stream, step, element index), equal bit for bit on every backend.

This file is the definition; the C++ and CUDA kernels follow it operation by operation.
Words are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
normals are Box-Muller in float32: each `fma32` below is one fused multiply-add, every other
operation rounds by itself.

Counter: c0 = element index // 4; c1 = step | stream << 20; c2, c3 = sample index, low and high.
Key: the seed's low and high 32 bits. Element index: the position within one sample in logical
C, H, W order, whatever the memory format. Element i takes normal i % 4 of its counter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

VERSION = 1
SAMPLING, Q_SAMPLE, EDITING = 0, 1, 2  # streams
MAX_STEP = 1 << 20
MAX_STREAM = 1 << 12
MAX_ELEMENTS = 1 << 34

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def _constants(hexadecimal: str) -> list[float]:
    return [float.fromhex(text) for text in hexadecimal.split()]


# Minimax coefficients, lowest power first, each exactly a float32.
_LOG = _constants("-0x1.555506p-1 0x1.fffef4p-2 -0x1.99d05ep-2 0x1.559d36p-2")
_LOG += _constants("-0x1.1ed424p-2 0x1.f32078p-3 -0x1.1e73a0p-2 0x1.07e5f4p-2")
_SIN = _constants("-0x1.4abbbep-1 0x1.465facp-4 -0x1.2db5a6p-8")
_COS = _constants("-0x1.3bd3ccp0 0x1.03c1b0p-2 -0x1.55b2b6p-6 0x1.d4f7ecp-11")
_EXP = _constants("0x1.fffffcp-2 0x1.555492p-3 0x1.5558acp-5 0x1.12397ap-7 0x1.6a5166p-10")
_HALF_PI = _constants("0x1.921fb6p0 -0x1.777a5cp-25")  # high and low part
_LN2 = _constants("0x1.62e430p-1 -0x1.05c610p-29")  # high and low part
_LOG2_E = float.fromhex("0x1.715476p0")
_ROUND = float.fromhex("0x1.8p23")  # adding it rounds a float32 to a whole number
_TWO_THIRDS_BITS = np.int32(0x3F2AAAAB)

_Float = npt.NDArray[np.float32]
_Words = npt.NDArray[np.uint32]


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike) -> _Words:
    """Philox4x32-10: counter (..., 4) and key (..., 2) of 32-bit words -> words (..., 4)."""
    counter, key = np.asarray(counter, np.uint64), np.asarray(key, np.uint64)
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _LOW, high0 ^ c3 ^ k1, p0 & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def fma32(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> _Float:
    """a * b + c in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (an inexact result whose
    last bit is 0 moves to its odd neighbour towards the true value), so that the rounding to
    float32 sees on which side of a tie it lies (Boldo and Melquiond 2008).
    """
    p = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32)
    c = np.asarray(c, np.float32).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        s = np.asarray(p + c)
        v = s - p
        error = np.where(np.isfinite(s), (p - (s - v)) + (c - v), 0.0)
        bits = s.view(np.int64)
        move = np.where((error > 0) == (s > 0), 1, -1)
        odd = np.where((error != 0) & (bits & 1 == 0), bits + move, bits)
        return odd.view(np.float64).astype(np.float32)


def _horner(coefficients: Sequence[float], x: _Float) -> _Float:
    value: _Float = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = fma32(value, x, c)
    return value


def _radius(word: _Words) -> _Float:
    """sqrt(-2 ln u), u = word / 2^32 rounded, kept above 0."""
    u = fma32(word.astype(np.float32), 2.0**-32, 2.0**-33)
    bits = u.view(np.int32) - _TWO_THIRDS_BITS
    exponent = (bits >> 23).astype(np.float32)
    # u = 2^exponent * (1 + f), 1 + f in [2/3, 4/3)
    f = ((bits & 0x7FFFFF) + _TWO_THIRDS_BITS).view(np.float32) - np.float32(1)
    y = fma32(_horner(_LOG, f), f, 1.0)
    t = fma32(f * f, y, np.float32(-2) * f)
    return np.sqrt(fma32(exponent, -2 * _LN2[0], t))


def _cos_sin(word: _Words) -> tuple[_Float, _Float]:
    """cos and sin of 2 pi word / 2^32. The integer's top bits give the quarter turn."""
    a = word + np.uint32(0x20000000)
    remainder = (a & np.uint32(0x3FFFFFFF)).astype(np.int32) - np.int32(0x20000000)
    x = remainder.astype(np.float32) * np.float32(2.0**-30)  # quarter turns, in [-1/2, 1/2]
    z = x * x
    sin = fma32(x, _HALF_PI[0], x * fma32(_horner(_SIN, z), z, _HALF_PI[1]))
    cos = fma32(_horner(_COS, z), z, 1.0)
    odd = (a & np.uint32(0x40000000)) != 0
    sin, cos = np.where(odd, cos, sin), np.where(odd, sin, cos)
    sign = np.uint32(0x80000000)
    sin = (sin.view(np.uint32) ^ (a & sign)).view(np.float32)
    cos = (cos.view(np.uint32) ^ ((a + np.uint32(0x40000000)) & sign)).view(np.float32)
    return cos, sin


def box_muller(words: npt.ArrayLike) -> _Float:
    """Words (..., 4) -> standard normals (..., 4): r cos, r sin of words (0, 1), then (2, 3).

    At most 4 ulp from float64 Box-Muller of the same rounded u and exact angle; |z| <= 6.77.
    """
    words = np.atleast_1d(np.ascontiguousarray(words, np.uint32))
    r, (cos, sin) = _radius(words[..., 0::2]), _cos_sin(words[..., 1::2])
    return np.stack([r * cos, r * sin], axis=-1).reshape(words.shape)


def exp32(x: npt.ArrayLike) -> _Float:
    """exp(x) in float32, in the kernels' order of operations: at most 2 ulp, NaN stays NaN."""
    x = np.atleast_1d(np.asarray(x, np.float32))
    with np.errstate(all="ignore"):
        x = np.where(np.float32(-104) > x, np.float32(-104), x)
        x = np.where(np.float32(89) < x, np.float32(89), x)
        k = fma32(x, _LOG2_E, _ROUND) - np.float32(_ROUND)
        r = fma32(k, -_LN2[1], fma32(k, -_LN2[0], x))
        y = fma32(_horner(_EXP, r), r * r, r) + np.float32(1)
        n = np.where(np.isnan(k), np.float32(0), k).astype(np.int32)
        half = n >> 1  # two factors, so that subnormal results are rounded once
        for part in (half, n - half):
            y = y * ((part + 127) << 23).view(np.float32)
    return y


def randn(
    seed: int | npt.ArrayLike,
    sample_index: npt.ArrayLike,
    step: int,
    shape: Sequence[int],
    stream: int = SAMPLING,
) -> _Float:
    """Standard normals (N, *shape), float32.

    seed: one integer or (N,), taken modulo 2^64. sample_index: (N,), 0 or greater.
    step: 0 .. 2^20 - 1 (0 draws x_T, the steps of a plan are 1..S). stream: see the constants.
    Raises ValueError if one of them is out of range.
    """
    shape = tuple(int(s) for s in shape)
    elements = math.prod(shape)
    index = np.asarray(sample_index)
    if index.ndim != 1 or (index.size and (index.dtype.kind not in "iu" or index.min() < 0)):
        raise ValueError("sample_index must be a list of whole numbers, 0 or greater.")
    if not 0 <= step < MAX_STEP:
        raise ValueError(f"step must be between 0 and {MAX_STEP - 1}, but {step} was given.")
    if not 0 <= stream < MAX_STREAM:
        raise ValueError(f"stream must be between 0 and {MAX_STREAM - 1}, but {stream} was given.")
    if min(shape, default=1) < 0 or elements > MAX_ELEMENTS:
        raise ValueError(f"a sample must have 0 to 2^34 elements, but its shape is {shape}.")
    count = index.size
    seeds = [int(s) & (2**64 - 1) for s in np.atleast_1d(np.asarray(seed, object))]
    if len(seeds) not in (1, count):
        raise ValueError(f"seed must be one number or {count}, but {len(seeds)} were given.")
    index64 = index.astype(np.uint64)
    key = np.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], np.uint64).reshape(-1, 2)
    counter = np.empty((count, (elements + 3) // 4, 4), np.uint64)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = step | stream << 20
    counter[..., 2] = (index64 & _LOW)[:, None]
    counter[..., 3] = (index64 >> np.uint64(32))[:, None]
    normals = box_muller(philox4x32(counter, key[:, None, :]))
    return normals.reshape(count, 4 * counter.shape[1])[:, :elements].reshape(count, *shape)
