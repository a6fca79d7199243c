"""The choice of timesteps: known answers, the formulas in exact fractions, refusals."""

from fractions import Fraction

import numpy as np
import pytest

from ddpm_fast.spacing import space_timesteps, spaced, timesteps_for


def test_openai_spacing_known_answers():
    # Worked out by hand from the loop of guided-diffusion's respace.py (22e0df8).
    assert space_timesteps(300, [10, 15, 20])[:10].tolist() == [
        0,
        11,
        22,
        33,
        44,
        55,
        66,
        77,
        88,
        99,
    ]
    sections = space_timesteps(300, "10,15,20")
    assert len(sections) == 45 and sections[10] == 100 and sections[24] == 199
    assert sections[25] == 200 and sections[-1] == 299
    assert space_timesteps(1000, "ddim50").tolist() == list(range(0, 1000, 20))
    assert space_timesteps(10, "4").tolist() == [0, 3, 6, 9]
    assert space_timesteps(6, 3).tolist() == [0, 2, 5]  # 2.5 rounds to even
    assert space_timesteps(11, "2,2,2").tolist() == [0, 3, 4, 7, 8, 10]  # sections of 4, 4, 3
    assert space_timesteps(10, "0,1").tolist() == [5]
    two_fifty = space_timesteps(1000, "250")
    assert len(two_fifty) == 250 and two_fifty[0] == 0 and two_fifty[-1] == 999


def test_diffusers_spacing_known_answers():
    assert spaced(1000, 4, "leading").tolist() == [0, 250, 500, 750]
    assert spaced(1000, 3, "leading").tolist() == [0, 333, 666]
    assert spaced(1000, 4, "trailing").tolist() == [249, 499, 749, 999]
    assert spaced(1000, 3, "trailing").tolist() == [332, 666, 999]
    assert spaced(1000, 10, "linspace").tolist() == list(range(0, 1000, 111))
    assert spaced(1000, 1, "trailing").tolist() == [999]
    assert spaced(1000, 4, "leading", steps_offset=1).tolist() == [1, 251, 501, 751]
    assert spaced(10, 4, "trailing").tolist() == [1, 4, 7, 9]  # 2.5 and 7.5 round to even


@pytest.mark.parametrize("total", [7, 60, 100, 1000, 4000])
def test_diffusers_spacing_long_hand(total):
    """Table 2 of Lin et al. 2023 in exact fractions; a tie may go to either side."""

    def rounds_to(exact: Fraction, number: int) -> bool:
        return abs(exact - number) <= Fraction(1, 2)

    for steps in (s for s in range(1, total + 1) if total <= 100 or s % 37 == 0 or s == total):
        stride = total // steps
        assert spaced(total, steps, "leading").tolist() == [i * stride for i in range(steps)]
        if (steps - 1) * stride + 1 < total:
            shifted = spaced(total, steps, "leading", steps_offset=1)
            assert shifted.tolist() == [i * stride + 1 for i in range(steps)]
        for i, t in enumerate(spaced(total, steps, "trailing")[::-1].tolist()):
            assert rounds_to(total - Fraction(i * total, steps) - 1, t)
        for i, t in enumerate(spaced(total, steps, "linspace").tolist()):
            assert rounds_to(Fraction(i * (total - 1), max(1, steps - 1)), t)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_spacing_is_diffusers(name, spacing):
    """Of every count. Where diffusers' trailing yields one too many (-1, no timestep), we cut it.

    That is where T / (T / S) comes out above S in float64, as for 61 of 1000 steps.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    for total, offset in ((10, 0), (50, 0), (100, 1), (1000, 1)):
        offset = offset if spacing == "leading" else 0
        options = {"timestep_spacing": spacing, "steps_offset": offset}
        scheduler = getattr(diffusers, name)(num_train_timesteps=total, **options)
        for steps in range(1, total + 1 - offset):  # with the offset, the last has no room
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.tolist()
            assert spaced(total, steps, spacing, offset)[::-1].tolist() == theirs[:steps]
            assert theirs[steps:] in ([], [-1] if spacing == "trailing" else [])


def test_quadratic_spacing():
    """ermongroup/ddim's int(linspace(0, sqrt(0.8 T), S) ** 2), where that has no repetition."""
    for steps in (2, 3, 5, 10, 20):
        exact = [Fraction(800 * i * i, (steps - 1) ** 2) for i in range(steps)]
        for wanted, got in zip(exact, spaced(1000, steps, "quadratic").tolist(), strict=True):
            assert got <= wanted + Fraction(1, 10**9) and wanted < got + 1
    assert spaced(1000, 5, "quadratic").tolist() == [0, 50, 200, 450, 800]
    assert spaced(1000, 50, "quadratic")[:4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("spacing", ["openai", "leading", "trailing", "linspace", "quadratic"])
def test_every_spacing_of_every_count(spacing):
    for total in (*range(1, 24), 1000):
        for steps in range(1, total + 1) if total < 1000 else (1, 7, 48, 150, 501, 999, 1000):
            kept = spaced(total, steps, spacing)
            assert kept.dtype == np.int64 and len(kept) == steps
            assert kept[0] >= 0 and kept[-1] < total and (np.diff(kept) > 0).all()


def test_timesteps_for():
    assert timesteps_for(7).tolist() == list(range(7))
    assert timesteps_for(7, None, "trailing").tolist() == list(range(7))
    assert timesteps_for(10, 4).tolist() == timesteps_for(10, "4").tolist() == [0, 3, 6, 9]
    assert timesteps_for(10, "4", "openai").tolist() == [0, 3, 6, 9]
    assert timesteps_for(10, 2, "trailing").tolist() == [4, 9]
    assert timesteps_for(10, np.int64(2)).tolist() == [0, 9]


@pytest.mark.parametrize(
    "action, words",
    [
        (lambda: space_timesteps(10, "a"), ["ddim50"]),
        (lambda: space_timesteps(10, "ddim3,4"), ["ddim50"]),
        (lambda: space_timesteps(10, "-1"), ["'-1'"]),
        (lambda: space_timesteps(10, "0"), ["at least 1"]),
        (lambda: space_timesteps(10, "3,9"), ["section 2 of 2", "5 of the 10", "9 steps"]),
        (lambda: space_timesteps(1000, "ddim7000"), ["7000"]),
        (lambda: space_timesteps(1000, "ddim999"), ["999"]),
        (lambda: space_timesteps(10, 11), ["between 0 and 10"]),
        (lambda: space_timesteps(10, np.ones((5, 90))), ["whole number"]),
        (lambda: timesteps_for(10, 0), ["between 1 and 10"]),
        (lambda: timesteps_for(10, 11), ["11"]),
        (lambda: timesteps_for(10, 1.5), ["whole number"]),
        (lambda: timesteps_for(10, True), ["whole number"]),
        (lambda: timesteps_for(10, "5", "trailing"), ["trailing"]),
        (lambda: timesteps_for(10, 5, "even"), ["leading", "quadratic", "'even'"]),
        (lambda: timesteps_for(10, None, "even"), ["'even'"]),
        (lambda: timesteps_for(10, 10, "leading", 1), ["to 10", "past 9"]),
        (lambda: timesteps_for(10, 5, "trailing", 1), ["leading", "trailing"]),
        (lambda: timesteps_for(10, 5, None, 1), ["leading", "openai"]),
        (lambda: timesteps_for(10, None, "leading", 1), ["leading", "None"]),
        (lambda: timesteps_for(10, "5", None, 1), ["leading", "'5'"]),
        (lambda: timesteps_for(10, 5, "leading", -1), ["steps_offset", "-1"]),
        (lambda: timesteps_for(10, 5, "leading", 0.5), ["whole number"]),
    ],
)
def test_refusals(action, words):
    """One sentence, naming each of `words`."""
    with pytest.raises(ValueError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text and len(text) < 300, text
    for word in words:
        assert word in text, text
