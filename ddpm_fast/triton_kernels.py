"""The operators' kernels in Triton: the arithmetic of noise.py and reference_step.py, bit for bit.

A launch must pass enable_fp_fusion=False: a fused multiply-add stands only where there is `tl.fma`.
A program takes EACH times BLOCK elements of one sample, in logical order; `chunks` is how many
BLOCKs a sample has. Strides are in elements, and tensors that are not given are None. TOGETHER: in
every tensor a sample's elements lie one after another. LARGE: places in a sample take 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import noise

_LOG, _SIN, _COS, _EXP, _HALF_PI, _LN2 = (
    tl.constexpr(tuple(values))
    for values in (noise._LOG, noise._SIN, noise._COS, noise._EXP, noise._HALF_PI, noise._LN2)
)
_LOG2_E = tl.constexpr(noise._LOG2_E)
_ROUND = tl.constexpr(noise._ROUND)
_TWO_THIRDS_BITS = tl.constexpr(int(noise._TWO_THIRDS_BITS))
_COLUMNS = tl.constexpr(16)  # of a plan's coefficients
_INDEX_COLUMNS = tl.constexpr(4)
_MAX_STEP = tl.constexpr(noise.MAX_STEP)
_BAD_ROW = tl.constexpr(1)
_NOT_FINITE = tl.constexpr(2)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 words."""
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c1, c3 = high1 ^ c1 ^ k0, high0 ^ c3 ^ k1
        c0, c2 = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c1, c2, c3 = c1, c0, c3, c2
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _horner(COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr, x):
    value = tl.full(x.shape, COEFFICIENTS[DEGREE], tl.float32)
    for i in tl.static_range(DEGREE):
        value = tl.fma(value, x, COEFFICIENTS[DEGREE - 1 - i])
    return value


@triton.jit
def _radius(word):
    u = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    bits = u.to(tl.int32, bitcast=True) - _TWO_THIRDS_BITS
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _TWO_THIRDS_BITS).to(tl.float32, bitcast=True) - 1.0
    y = tl.fma(_horner(_LOG, 7, f), f, 1.0)
    t = tl.fma(f * f, y, -2.0 * f)
    return tl.sqrt_rn(tl.fma(exponent, -2.0 * _LN2[0], t))


@triton.jit
def _cos_sin(word):
    a = word + 0x20000000
    x = ((a & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 2.0**-30
    z = x * x
    sin = tl.fma(x, _HALF_PI[0], x * tl.fma(_horner(_SIN, 2, z), z, _HALF_PI[1]))
    cos = tl.fma(_horner(_COS, 3, z), z, 1.0)
    odd = (a & 0x40000000) != 0
    first = tl.where(odd, sin, cos).to(tl.uint32, bitcast=True)
    second = tl.where(odd, cos, sin).to(tl.uint32, bitcast=True)
    first ^= (a + 0x40000000) & 0x80000000
    second ^= a & 0x80000000
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _normals(seed, sample_index, counter, chunk, BLOCK: tl.constexpr):
    """The normals of elements BLOCK * chunk to BLOCK * (chunk + 1) - 1 of a sample.

    counter: step | stream << 20.
    """
    quads = tl.arange(0, BLOCK // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        tl.cast(chunk, tl.uint32) * (BLOCK // 4) + quads,
        tl.cast(counter, tl.uint32),
        sample_index.to(tl.uint32),
        (sample_index >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    r0, r2 = _radius(w0), _radius(w2)
    cos0, sin0 = _cos_sin(w1)
    cos2, sin2 = _cos_sin(w3)
    even, odd = tl.interleave(r0 * cos0, r2 * cos2), tl.interleave(r0 * sin0, r2 * sin2)
    return tl.interleave(even, odd)


@triton.jit
def _exponential(x):
    x = tl.where(x < -104.0, -104.0, x)
    x = tl.where(x > 89.0, 89.0, x)
    k = tl.fma(x, _LOG2_E, _ROUND) - _ROUND
    r = tl.fma(k, -_LN2[1], tl.fma(k, -_LN2[0], x))
    y = tl.fma(_horner(_EXP, 4, r), r * r, r) + 1.0
    n = k.to(tl.int32)
    half = n >> 1
    y = y * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return y * ((n - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _share(chunks, EACH: tl.constexpr, LARGE: tl.constexpr):
    """This program's sample, and the first of its EACH chunks."""
    shares = (chunks + EACH - 1) // EACH
    program = tl.program_id(0)
    first = program % shares * EACH
    if LARGE:
        first = first.to(tl.int64)
    return (program // shares).to(tl.int64), first


@triton.jit
def _places(tensor, sample, element, layout, pixels, TOGETHER: tl.constexpr):
    """Pointers to a sample's elements. layout: the strides of (sample, channel, pixel)."""
    first = tensor + sample * layout[0]
    if TOGETHER:
        return first + element
    if element.dtype == tl.int32:  # a division without signs is shorter
        channel = (element.to(tl.uint32) // tl.cast(pixels, tl.uint32)).to(tl.int32)
    else:
        channel = element // pixels
    pixel = element - channel * pixels
    return first + (channel * layout[1] + pixel * layout[2])


@triton.jit
def randn_kernel(
    out, seed, sample_index, elements, chunks, counter,
    BLOCK: tl.constexpr, EACH: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """out: float32 (samples, elements), contiguous."""
    sample, first = _share(chunks, EACH, LARGE)
    key = tl.load(seed + sample), tl.load(sample_index + sample)
    for chunk in range(first, first + EACH):
        element = chunk * BLOCK + tl.arange(0, BLOCK)
        z = _normals(key[0], key[1], counter, chunk, BLOCK)
        tl.store(out + sample * elements + element, z, mask=element < elements)


@triton.jit
def q_sample_kernel(
    x_t, noise_out, x_start, noise, coefficients, timesteps, seed, sample_index,
    layout, elements, pixels, chunks, table_rows, counter,
    TOGETHER: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """One layout for the four tensors of x_start's shape; a bad timestep makes its sample NaN."""
    sample, first = _share(chunks, EACH, LARGE)
    timestep = tl.load(timesteps + sample)
    known = (timestep >= 0) & (timestep < table_rows)
    c0 = tl.load(coefficients + 2 * timestep, mask=known, other=float("nan"))
    c1 = tl.load(coefficients + 2 * timestep + 1, mask=known, other=float("nan"))
    key = tl.load(seed + sample), tl.load(sample_index + sample)
    for chunk in range(first, first + EACH):
        element = chunk * BLOCK + tl.arange(0, BLOCK)
        present = element < elements
        x = tl.load(_places(x_start, sample, element, layout, pixels, TOGETHER), mask=present)
        if noise is not None:
            z = tl.load(_places(noise, sample, element, layout, pixels, TOGETHER), mask=present)
        else:
            z = _normals(key[0], key[1], counter, chunk, BLOCK)
            tl.store(_places(noise_out, sample, element, layout, pixels, TOGETHER), z, mask=present)
        x = c0 * x + c1 * z
        tl.store(_places(x_t, sample, element, layout, pixels, TOGETHER), x, mask=present)


@triton.jit
def _add_term(total, coefficient, x):
    """Rounded twice; a term whose coefficient is 0 is skipped."""
    if coefficient != 0.0:
        total = total + coefficient * x
    return total


@triton.jit
def _report(status, code, row, sample):
    """The first report stays."""
    if tl.atomic_cas(status, 0, code) == 0:
        tl.store(status + 1, row.to(tl.int32))
        tl.store(status + 2, sample.to(tl.int32))


@triton.jit
def step_kernel(
    out, x_t, model_output, noise, previous, next_input, guidance_scale,
    coefficients, index, row, seed, sample_index, status,
    out_layout, x_layout, model_layout, noise_layout, previous_layout, next_layout,
    unconditional, variance, next_copy, elements, pixels, chunks, table_rows,
    LEARNED: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr, EACH: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """out may be x_t. LEARNED: model_output has the variance's channels.

    unconditional, variance: where these parts of model_output begin. next_copy: where next_input's
    second half does, under guidance.
    """
    sample, first = _share(chunks, EACH, LARGE)
    at = tl.load(row + sample)
    inside = (at >= 0) & (at < table_rows)
    c = coefficients + at * _COLUMNS
    a = tl.load(c, mask=inside, other=0.0)
    b = tl.load(c + 1, mask=inside, other=0.0)
    c0 = tl.load(c + 2, mask=inside, other=0.0)
    c1 = tl.load(c + 3, mask=inside, other=0.0)
    c2 = tl.load(c + 4, mask=inside, other=0.0)
    c3 = tl.load(c + 5, mask=inside, other=0.0)
    sigma = tl.load(c + 6, mask=inside, other=0.0)
    min_log = tl.load(c + 7, mask=inside, other=0.0)
    max_log = tl.load(c + 8, mask=inside, other=0.0)
    low = tl.load(c + 9, mask=inside, other=0.0)
    high = tl.load(c + 10, mask=inside, other=0.0)
    noise_step = tl.load(index + at * _INDEX_COLUMNS + 1, mask=inside, other=0)
    flags = tl.load(index + at * _INDEX_COLUMNS + 2, mask=inside, other=0)
    learned = (flags & 1) != 0
    noisy = learned | (sigma != 0.0)
    usable = inside & (noise_step >= 0) & (noise_step < _MAX_STEP)
    if not LEARNED:
        usable = usable & ((flags & 1) == 0)
    if previous is None:
        usable = usable & (c2 == 0.0)
    key = tl.load(seed + sample), tl.load(sample_index + sample)
    not_finite = tl.zeros((BLOCK,), tl.int1)

    for chunk in range(first, first + EACH):
        element = chunk * BLOCK + tl.arange(0, BLOCK)
        present = element < elements
        places = _places(x_t, sample, element, x_layout, pixels, TOGETHER)
        x = tl.load(places, mask=present, other=0.0)
        outputs = _places(model_output, sample, element, model_layout, pixels, TOGETHER)
        model = tl.load(outputs, mask=present, other=0.0).to(tl.float32)
        if guidance_scale is not None:
            other = tl.load(outputs + unconditional, mask=present, other=0.0).to(tl.float32)
            model = other + tl.load(guidance_scale) * (model - other)

        pred_xstart = _add_term(tl.zeros((BLOCK,), tl.float32), a, x)
        pred_xstart = _add_term(pred_xstart, b, model)
        pred_xstart = tl.where(pred_xstart < low, low, pred_xstart)  # a NaN stays
        pred_xstart = tl.where(pred_xstart > high, high, pred_xstart)
        total = _add_term(tl.zeros((BLOCK,), tl.float32), c0, pred_xstart)
        total = _add_term(total, c1, x)
        if previous is not None:
            places = _places(previous, sample, element, previous_layout, pixels, TOGETHER)
            total = _add_term(total, c2, tl.load(places, mask=present, other=0.0))
            tl.store(places, pred_xstart, mask=element < tl.where(usable, elements, 0))
        total = _add_term(total, c3, model)

        if noisy:
            if noise is not None:
                places = _places(noise, sample, element, noise_layout, pixels, TOGETHER)
                z = tl.load(places, mask=present, other=0.0)
            else:
                z = _normals(key[0], key[1], noise_step, chunk, BLOCK)
            if LEARNED:
                extra = tl.load(outputs + variance, mask=present, other=0.0).to(tl.float32)
                fraction = (extra + 1.0) * 0.5
                log_variance = fraction * max_log + (1.0 - fraction) * min_log
                z = tl.where(learned, _exponential(0.5 * log_variance), sigma) * z
            else:
                z = sigma * z
            total = total + z

        x = tl.where(usable, total, x)
        places = _places(out, sample, element, out_layout, pixels, TOGETHER)
        tl.store(places, x, mask=present)
        if next_input is not None:
            places = _places(next_input, sample, element, next_layout, pixels, TOGETHER)
            rounded = x.to(next_input.dtype.element_ty)
            tl.store(places, rounded, mask=present)
            if guidance_scale is not None:
                tl.store(places + next_copy, rounded, mask=present)
        not_finite = not_finite | (present & (tl.abs(x) >= float("inf"))) | (present & (x != x))

    if status is not None:
        code = tl.where(usable, tl.max(not_finite.to(tl.int32), axis=0) * _NOT_FINITE, _BAD_ROW)
        if code != 0:
            _report(status, code, at, sample)
