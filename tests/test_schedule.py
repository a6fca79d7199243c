"""NoiseSchedule's tables against formulas written out in plain Python; timestep spacing."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from ddpm_fast.schedule import NoiseSchedule, space_timesteps, spaced, timesteps_for

LONG_HAND = {
    "linear": lambda t, T: 1e-4 + (0.02 - 1e-4) * t / (T - 1),
    "scaled_linear": lambda t, T: (
        (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / (T - 1)) ** 2
    ),
    "cosine": lambda t, T: min(
        1
        - math.cos(((t + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        / math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2,
        0.999,
    ),
    "sigmoid": lambda t, T: 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * t / (T - 1))),
}


def sentence(action, *words):
    """The one-sentence ValueError that `action` must raise, naming each of `words`."""
    with pytest.raises(ValueError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text and len(text) < 300, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("num_timesteps", [10, 1000])
@pytest.mark.parametrize("name", LONG_HAND)
def test_betas(name, num_timesteps):
    wanted = [LONG_HAND[name](t, num_timesteps) for t in range(num_timesteps)]
    schedule = getattr(NoiseSchedule, name)(num_timesteps)
    # atol: 1 - cos^2/cos^2 cancels, so the cosine's betas carry 1e-16 absolute.
    np.testing.assert_allclose(schedule.betas, wanted, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", LONG_HAND)
def test_tables_long_hand(name):
    schedule = getattr(NoiseSchedule, name)(100)
    betas = schedule.betas.tolist()
    ac_prev = 1.0
    posterior = []
    for t, beta in enumerate(betas):
        ac = ac_prev * (1 - beta)
        posterior.append(beta * (1 - ac_prev) / (1 - ac))
        wanted = {
            "alphas": 1 - beta,
            "alphas_cumprod": ac,
            "alphas_cumprod_prev": ac_prev,
            "sqrt_alphas_cumprod": math.sqrt(ac),
            "sqrt_one_minus_alphas_cumprod": math.sqrt(1 - ac),
            "log_one_minus_alphas_cumprod": math.log(1 - ac),
            "sqrt_recip_alphas_cumprod": 1 / math.sqrt(ac),
            "sqrt_recipm1_alphas_cumprod": math.sqrt((1 - ac) / ac),
            "posterior_variance": posterior[t],
            "posterior_mean_coef1": beta * math.sqrt(ac_prev) / (1 - ac),
            "posterior_mean_coef2": (1 - ac_prev) * math.sqrt(1 - beta) / (1 - ac),
        }
        for key, value in wanted.items():
            # 1 / ac - 1 cancels near ac = 1: its relative error is eps / (1 - ac).
            rtol = 1e-12 if key != "sqrt_recipm1_alphas_cumprod" else 1e-15 / (1 - ac) + 1e-14
            assert getattr(schedule, key)[t] == pytest.approx(value, rel=rtol, abs=0), (key, t)
        ac_prev = ac
    clipped = [math.log(v) for v in [posterior[1], *posterior[1:]]]
    np.testing.assert_allclose(schedule.posterior_log_variance_clipped, clipped, rtol=1e-12)


def test_tables_are_float64_and_read_only():
    tables = [v for v in vars(NoiseSchedule.linear(5)).values() if isinstance(v, np.ndarray)]
    assert len(tables) == 13
    for table in tables:
        assert table.dtype == np.float64 and table.shape == (5,)
        with pytest.raises(ValueError):
            table[0] = 0


def test_given_betas_are_copied():
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[0] = 0.5
    assert schedule.betas.tolist() == [0.1, 0.2]
    assert NoiseSchedule(torch.tensor([0.1, 0.2], dtype=torch.float64)).betas[1] == 0.2


def test_beta_of_one_is_allowed_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = NoiseSchedule([0.1, 0.5, 1.0])
        assert NoiseSchedule([1.0]).num_timesteps == 1
        NoiseSchedule([1.0, 0.5])
    assert np.isinf(schedule.sqrt_recip_alphas_cumprod[2])
    assert np.isfinite(schedule.posterior_mean_coef1).all()
    assert schedule.posterior_mean_coef2[2] == 0


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(37, 1e-3, 0.3),
        NoiseSchedule.scaled_linear(),
        NoiseSchedule.cosine(50),
        NoiseSchedule.cosine(50, s=0.02),
        NoiseSchedule.sigmoid(20),
        NoiseSchedule([0.1, 0.2, 1.0]),
    ],
)
def test_config_round_trip(schedule):
    config = json.loads(json.dumps(schedule.config()))
    assert config["num_train_timesteps"] == schedule.num_timesteps
    assert NoiseSchedule.from_config(config).betas.tobytes() == schedule.betas.tobytes()


def test_config_of_diffusers():
    theirs = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    assert (NoiseSchedule.from_config(theirs).betas == NoiseSchedule.linear().betas).all()
    assert (NoiseSchedule.from_config({}).betas == NoiseSchedule.linear().betas).all()


@pytest.mark.parametrize(
    "action, words",
    [
        (lambda: NoiseSchedule([0.1, 0.0]), ["(0, 1]", "timestep 1"]),
        (lambda: NoiseSchedule([-0.1]), ["-0.1"]),
        (lambda: NoiseSchedule([1.5]), ["1.5"]),
        (lambda: NoiseSchedule([1e-17]), ["1e-17"]),
        (lambda: NoiseSchedule([0.1, math.nan]), ["nan"]),
        (lambda: NoiseSchedule([]), ["(0,)"]),
        (lambda: NoiseSchedule([[0.1]]), ["(1, 1)"]),
        (lambda: NoiseSchedule(0.1), ["one-dimensional"]),
        (lambda: NoiseSchedule(["a"]), ["real numbers"]),
        (lambda: NoiseSchedule([0.1, [0.2]]), ["real numbers"]),
        (lambda: NoiseSchedule(None), ["NoneType"]),
        (lambda: NoiseSchedule([True]), ["real numbers"]),
        (lambda: NoiseSchedule.linear(0), ["between 1 and"]),
        (lambda: NoiseSchedule.linear(10**12), ["between 1 and"]),
        (lambda: NoiseSchedule.linear(2.5), ["whole number"]),
        (lambda: NoiseSchedule.linear(10, 1e-4, math.inf), ["finite"]),
        (lambda: NoiseSchedule.linear(10, "a"), ["beta_start", "'a'"]),
        (lambda: NoiseSchedule.scaled_linear(10, -1.0), ["beta_start"]),
        (lambda: NoiseSchedule.cosine(10, s=-1), ["s must be"]),
        (lambda: NoiseSchedule.cosine(10, max_beta=2), ["max_beta"]),
        (lambda: NoiseSchedule.from_config({"beta_schedule": "x"}), ["linear", "'x'"]),
        (lambda: NoiseSchedule.from_config([1]), ["dict"]),
        (lambda: NoiseSchedule.from_config({"rescale_betas_zero_snr": True}), ["trained_betas"]),
        (lambda: NoiseSchedule.from_config({"num_train_timesteps": "9"}), ["whole number"]),
        (lambda: NoiseSchedule.linear(10).respace([]), ["at least one"]),
        (lambda: NoiseSchedule.linear(10).respace([3, 3]), ["strictly"]),
        (lambda: NoiseSchedule.linear(10).respace([3, 10]), ["0 to 9"]),
        (lambda: NoiseSchedule([0.1, 1, 0.1, 0.1]).respace([0, 1, 3]), ["timestep 1"]),
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
    ],
)
def test_refusals(action, words):
    sentence(action, *words)


def test_respace():
    schedule = NoiseSchedule.linear(100)
    kept = [0, 30, 31, 99]
    respaced = schedule.respace(kept)
    assert (respaced.alphas_cumprod == schedule.alphas_cumprod[kept]).all()
    product = 1.0
    for beta, t in zip(respaced.betas, kept, strict=True):
        product *= 1 - beta
        assert product == pytest.approx(schedule.alphas_cumprod[t], rel=1e-14)
    assert schedule.respace(range(100)) is schedule


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


def test_quadratic_spacing():
    # ermongroup/ddim's int(linspace(0, sqrt(0.8 T), S) ** 2), where that has no repetition
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
