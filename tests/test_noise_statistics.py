"""The kernel's normals as a random sample: 1e8 draws for the shape, 2e9 for the far tails.

Everything is drawn from fixed seeds, so a test here passes always or never. Each bound is what a
correct generator exceeds less than once in 1.7 million tries (5 standard errors, two-sided), and
each check is shown a generator that it must refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_fast import ops

pytestmark = pytest.mark.usefixtures("extension")

ERRORS = 5.0  # standard errors
CHANCE = math.erfc(ERRORS / math.sqrt(2))  # that a normal variable is so far out: 5.7e-7

# A chunk of draws, (steps, seeds, samples, elements): neighbours in each differ by one.
CHUNK = (2, 2, 4, 1 << 14)
CHUNKS = 400  # of 262,144 draws: 1.05e8
AXES = {"steps": (0, 1), "seeds": (1, 1), "samples": (2, 1)}
# The other half of a Box-Muller pair, the other pair of a counter's four, the next counter.
AXES |= {f"elements {lag} apart": (3, lag) for lag in (1, 2, 4)}
# Moments of a standard normal, and the variances of one draw's powers: E z^2k - (E z^k)^2.
MOMENTS = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
BINS_PER_UNIT, REACH = 1024, 8  # of the histogram, from -REACH to REACH

Draw = Callable[[int], Tensor]


def kernel(chunk: int) -> Tensor:
    """The chunk's draws: its own two seeds, two steps and four samples, float64."""
    steps, seeds, samples, elements = CHUNK
    seed = (seeds * chunk + torch.arange(seeds)).repeat_interleave(samples)
    index = (samples * chunk + torch.arange(samples)).repeat(seeds)
    z = [
        ops.randn(seed, index, [elements], step=steps * chunk + step, backend="cpu")
        for step in range(steps)
    ]
    return torch.stack(z).reshape(CHUNK).double()


def neighbours(z: Tensor, axis: int, lag: int) -> tuple[Tensor, Tensor]:
    length = z.shape[axis] - lag
    return z.narrow(axis, 0, length), z.narrow(axis, lag, length)


def tail(x: float) -> float:
    """P(|z| > x) of a standard normal."""
    return math.erfc(x / math.sqrt(2))


def kolmogorov_smirnov(histogram: Tensor) -> float:
    """The p value of the largest distance between the distribution functions at the bins' edges.

    A bin holds at most 4e-4 of the draws, so between edges the distance changes by 2e-6 with 1e8
    draws, and it is 1.4e-4 where p is 5 %.
    """
    count = histogram.sum().item()
    edges = torch.arange(1, len(histogram) + 1, dtype=torch.float64) / BINS_PER_UNIT - REACH
    exact = torch.special.ndtr(edges)
    distance = (histogram.cumsum(0) / count - exact).abs().max().item() * math.sqrt(count)
    if distance < 0.3:  # the series below needs many terms there, and p is 1 to 1e-5
        return 1.0
    terms = ((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 100))
    return 2 * sum(terms)


def poisson(count: int, mean: float) -> float:
    """The chance of a count as far out, on its side: the p value of a number of rare events."""

    def upto(last: int) -> float:
        logs = (k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(last + 1))
        return sum(map(math.exp, logs))

    return 2 * min(upto(count), 1 - upto(count - 1) if count else 1.0)


def failures(draw: Draw, chunks: int) -> set[str]:
    """The names of the checks that `chunks` chunks of draws fail."""
    powers = torch.zeros(len(MOMENTS), dtype=torch.float64)
    histogram = torch.zeros(2 * REACH * BINS_PER_UNIT, dtype=torch.int64)
    products = {name: torch.zeros(2, dtype=torch.float64) for name in AXES}
    beyond = {4: 0, 5: 0}
    for chunk in range(chunks):
        z = draw(chunk)
        square = z * z
        powers += torch.stack([z.sum(), square.sum(), (z * square).sum(), (square**2).sum()])
        bins = ((z + REACH) * BINS_PER_UNIT).long().flatten()
        histogram += torch.bincount(bins, minlength=len(histogram))
        for x in beyond:
            beyond[x] += int((square > x * x).sum())
        square -= 1
        for name, place in AXES.items():
            for i, values in enumerate((z, square)):
                a, b = neighbours(values, *place)
                products[name][i] += (a * b).sum()
    count, failed = chunks * math.prod(CHUNK), set()
    for power, total in zip(MOMENTS, powers.tolist(), strict=True):
        mean, variance = MOMENTS[power]
        if abs(total / count - mean) > ERRORS * math.sqrt(variance / count):
            failed.add(f"moment {power}")
    if kolmogorov_smirnov(histogram) < CHANCE:
        failed.add("distribution")
    failed |= {f"beyond {x}" for x, n in beyond.items() if poisson(n, count * tail(x)) < CHANCE}
    for name, (axis, lag) in AXES.items():
        pairs = count * (CHUNK[axis] - lag) / CHUNK[axis]
        # The product of two independent values has the product of their variances.
        for kind, total, deviation in zip(("", " squared"), products[name], (1, 2), strict=True):
            if abs(total) > ERRORS * deviation * math.sqrt(pairs):
                failed.add(name + kind)
    return failed


def test_the_kernel_draws_standard_normals():
    """Moments to the fourth, Kolmogorov-Smirnov, tails, and correlations of z and of z^2."""
    assert failures(kernel, CHUNKS) == set()


def repeated(axis: int, lag: int, sign: bool) -> Draw:
    """A generator that draws every second number over again, but perhaps for its sign."""

    def draw(chunk: int) -> Tensor:
        z = kernel(chunk)
        first, second = z.unflatten(axis, (-1, 2, lag)).unbind(axis + 1)
        second.copy_(first * second.sign() if sign else first)
        return z

    return draw


def heavy(chunk: int) -> Tensor:
    z = kernel(chunk)
    return torch.where(z.abs() > 4, 1.3 * z, z)


BROKEN = {
    "shifted": (lambda i: kernel(i) + 0.006, {"moment 1", "distribution"}),
    "too wide": (lambda i: kernel(i) * 1.01, {"moment 2", "moment 4", "distribution"}),
    "skewed": (lambda i: kernel(i).square().sub(1).mul(0.006) + kernel(i), {"moment 3"}),
    "cut off": (lambda i: kernel(i).clamp(-3.9, 3.9), {"beyond 4"}),
    "heavy tails": (heavy, {"beyond 5"}),
}
for name, place in AXES.items():
    BROKEN[f"one number for {name}"] = (repeated(*place, sign=False), {name, f"{name} squared"})
    BROKEN[f"one size for {name}"] = (repeated(*place, sign=True), {f"{name} squared"})


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_generator_is_refused(case):
    """A fortieth of the draws shows it."""
    draw, expected = BROKEN[case]
    assert expected <= failures(draw, CHUNKS // 40)


FAR_TAILS = (5.5, 5.77, 6.0)
FAR_CHUNKS = 1 << 11  # of 2^20 draws: 2.1e9


def test_far_tails():
    """Beyond 5.77 lie 17 of 2.1e9; where uniforms have 24 bits, as in float32, there is none.

    The count beyond 6 is 4 on average, so only too many would show.
    """
    count, beyond = FAR_CHUNKS << 20, dict.fromkeys(FAR_TAILS, 0)
    index = torch.arange(64)
    for chunk in range(FAR_CHUNKS):
        seed = torch.full_like(index, -1 - chunk)
        z = ops.randn(seed, index, [1 << 14], step=chunk, backend="cpu")
        if max(map(abs, torch.aminmax(z))) > FAR_TAILS[0]:
            for x in beyond:
                beyond[x] += int((z.abs() > x).sum())
    for x, found in beyond.items():
        assert poisson(found, count * tail(x)) > CHANCE, (x, found, count * tail(x))
    assert math.sqrt(-2 * math.log(2**-24)) < 5.77 and poisson(0, count * tail(5.77)) < CHANCE


def test_p_values_known_answers():
    assert poisson(0, 17) == pytest.approx(2 * math.exp(-17))
    assert poisson(3, 1.0) == pytest.approx(2 * (1 - 2.5 * math.exp(-1)))
    edges = torch.arange(2 * REACH * BINS_PER_UNIT + 1, dtype=torch.float64) / BINS_PER_UNIT
    exact = torch.special.ndtr(edges - REACH).diff() * 1e6
    assert kolmogorov_smirnov(exact) == 1.0
    moved = exact.clone()  # 1.36 / sqrt(1e6) of the draws at the far left: p = 5 %
    moved[0] += 1360
    moved[len(moved) // 2 :] *= 1 - 1360 / moved[len(moved) // 2 :].sum()
    assert kolmogorov_smirnov(moved) == pytest.approx(0.0491, abs=1e-3)
