"""The noise contract: words, normals and exponential, and that every CPU level repeats them."""

import numpy as np
import pytest

from ddpm_fast import noise

KNOWN_WORDS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# Bits of the first six normals; a change here is a new contract version.
GOLDEN = [
    (
        (0, 0, 0, noise.SAMPLING),
        [1065204529, -1083394384, -1088545889, -1091120718, -1105374381, 1043933799],
    ),
    (
        (42, 7, 1000, noise.SAMPLING),
        [-1081001038, -1105654768, 1059877310, 1067049040, 1067791627, -1081066325],
    ),
    (
        (2**64 - 1, 2**40 + 3, 2**20 - 1, noise.EDITING),
        [1034277368, 1067899965, 1039206936, -1084469398, -1113355152, -1081732086],
    ),
    (
        (-5, 1, 0, noise.Q_SAMPLE),
        [-1087521619, 1057444958, -1084637085, 1025281533, 1062283855, 1065198270],
    ),
]
EDGE_WORDS = np.array(
    [
        *(0, 1, 2, 127, 128, 129, 2**23, 2**24 + 1, 0x1FFFFFFF, 0x20000000, 0x20000001),
        *(0x3FFFFFFF, 0x40000000, 0x5FFFFFFF, 0x60000000, 0x7FFFFFFF, 0x80000000, 0xA0000000),
        *(0xC0000000, 0xE0000000, 0xFFFFFEFF, 0xFFFFFF00, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFE),
        0xFFFFFFFF,
    ],
    np.uint32,
)


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.int32)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_WORDS)
def test_philox_known_answers(counter, key, words):
    assert noise.philox4x32(counter, key).tolist() == words


def test_philox_broadcasts():
    counters = np.array([[i, 2, 3, 4] for i in range(3)])
    together = noise.philox4x32(counters, [5, 6])
    assert together.shape == (3, 4)
    assert together[1].tolist() == noise.philox4x32([1, 2, 3, 4], [5, 6]).tolist()


def test_fma32_is_the_correctly_rounded_one():
    from fractions import Fraction

    rng = np.random.default_rng(0)
    a, b = (rng.integers(2**23, 2**24, 4000).astype(np.float32) for _ in range(2))
    # Sums whose float64 rounding ends on a tie of float32: where rounding twice goes wrong.
    c = (a.astype(np.float64) * b * 2.0 ** rng.integers(-30, 30, 4000)).astype(np.float32)
    c *= np.where(rng.random(4000) < 0.5, -1, 1).astype(np.float32)
    tiny = np.float32(2.0**-60)
    a = np.concatenate([a, [np.float32(1 + 2**-12)] * 2, [tiny]]).astype(np.float32)
    b = np.concatenate([b, [np.float32(1 + 2**-12)] * 2, [np.float32(1)]]).astype(np.float32)
    c = np.concatenate([c, [tiny, -tiny], [np.float32(1 + 2**-23)]]).astype(np.float32)
    for x, y, z, got in zip(a, b, c, noise.fma32(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [got, np.nextafter(got, np.float32(np.inf)), np.nextafter(got, np.float32(-np.inf))]
        distance = [abs(Fraction(float(v)) - exact) for v in near]
        assert distance[0] <= min(distance[1:])
        if distance[0] in distance[1:]:  # a tie goes to the even one
            assert int(bits([got])[0]) & 1 == 0


def test_fma32_special_values():
    with np.errstate(all="ignore"):
        got = noise.fma32(
            [np.inf, np.inf, 0, 1e38, -0.0], [1, 0, np.inf, 1e10, 1], [1, 1, 1, 0, -0.0]
        )
    assert got[0] == np.inf and np.isnan(got[1]) and np.isnan(got[2]) and got[3] == np.inf
    assert np.signbit(got[4])


def ulp_error(words):
    """Distance from float64 Box-Muller of the rounded u and the exact angle, in float32 ulp."""
    words = words.reshape(-1, 4)
    u = noise.fma32(words[:, 0::2].astype(np.float32), 2.0**-32, 2.0**-33).astype(np.float64)
    turns = words[:, 1::2].astype(np.int64)
    quarter = (turns + 2**29) >> 30 & 3
    rest = ((turns + 2**29) % 2**30 - 2**29) * (np.pi / 2**31)  # exact but for one rounding
    cos, sin = np.cos(rest), np.sin(rest)
    cos, sin = (
        np.choose(quarter, [cos, -sin, -cos, sin]),
        np.choose(quarter, [sin, cos, -sin, -cos]),
    )
    radius = np.sqrt(-2 * np.log(u))
    exact = np.stack([radius * cos, radius * sin], -1).reshape(words.shape)
    return np.abs(noise.box_muller(words) - exact) / np.spacing(np.abs(exact).astype(np.float32))


def test_normals_are_within_4_ulp():
    words = np.random.default_rng(1).integers(0, 2**32, (250_000, 4), dtype=np.uint32)
    assert ulp_error(words).max() <= 4
    near_one = (2**32 - 1 - np.arange(4096, dtype=np.int64) ** 2).astype(np.uint32)
    tiny = np.arange(4096, dtype=np.uint32)
    assert ulp_error(np.stack([near_one, words[:4096, 0], tiny, words[:4096, 1]], 1)).max() <= 4


def test_edge_words_are_finite_and_bounded():
    first, second = (g.ravel() for g in np.meshgrid(EDGE_WORDS, EDGE_WORDS))
    z = noise.box_muller(np.stack([first, second, second, first], 1))
    assert np.isfinite(z).all() and np.abs(z).max() < 6.8
    assert ulp_error(np.stack([first, second, second, first], 1)).max() <= 4


def test_moments():
    z = noise.randn(3, range(16), 5, (3, 100, 100)).astype(np.float64)
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / z.size)


@pytest.mark.parametrize(("arguments", "expected"), GOLDEN)
def test_golden_vectors(arguments, expected):
    seed, index, step, stream = arguments
    assert bits(noise.randn(seed, [index], step, (6,), stream)).ravel().tolist() == expected


def test_a_sample_does_not_depend_on_its_neighbours():
    together = noise.randn([1, 2, 3], [7, 8, 9], 4, (3, 5, 5))
    alone = noise.randn([2], [8], 4, (3, 5, 5))
    assert np.array_equal(together[1:2], alone)
    assert np.array_equal(noise.randn(2, [8], 4, (75,)).ravel(), alone.ravel())


def test_empty_shapes():
    assert noise.randn(0, [], 0, (3, 2)).shape == (0, 3, 2)
    assert noise.randn(0, [1], 0, (3, 0)).shape == (1, 3, 0)
    assert noise.randn(0, [1], 0, ()).shape == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 2**20}, "step must be between"),
        ({"step": -1}, "step must be between"),
        ({"stream": 4096}, "stream must be between"),
        ({"sample_index": [-1]}, "sample_index must be"),
        ({"sample_index": 3}, "sample_index must be"),
        ({"sample_index": [0.5]}, "sample_index must be"),
        ({"shape": (2**20, 2**20)}, "2\\^34 elements"),
        ({"seed": [1, 2, 3]}, "seed must be"),
    ],
)
def test_bad_arguments_are_one_sentence(change, message):
    arguments = {"seed": 0, "sample_index": [0, 1], "step": 0, "shape": (4,), "stream": 0}
    with pytest.raises(ValueError, match=message):
        noise.randn(**{**arguments, **change})


def test_exp32():
    x = np.random.default_rng(2).uniform(-110, 92, 200_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    finite = exact < 3.4028234e38
    error = np.abs(noise.exp32(x)[finite] - exact[finite])
    assert (error / np.spacing(exact[finite].astype(np.float32))).max() <= 2
    assert noise.exp32([0.0, -np.inf, np.inf, 89.0]).tolist() == [1.0, 0.0, np.inf, np.inf]
    assert np.isnan(noise.exp32([np.nan]))[0]


@pytest.mark.parametrize("elements", [0, 1, 3, 4, 5, 63, 64, 65, 255, 1023, 4096, 4097, 20_001])
def test_every_cpu_level_gives_the_same_bits(extension, elements):
    seed = np.array([0, 2**63 - 1, -5])
    index = np.array([0, 2**40 + 1, 3])
    expected = bits(noise.randn(seed, index, 77, (elements,), noise.EDITING))
    for level in extension.cpu_levels_available():
        extension._set_cpu_level(level)
        got = extension.randn(seed, index, elements, 77, noise.EDITING)
        assert np.array_equal(bits(got), expected), level


def test_level_is_refused_where_it_is_not_there(extension):
    with pytest.raises(RuntimeError, match="not available here"):
        extension._set_cpu_level("avx1024")
