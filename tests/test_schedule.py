"""NoiseSchedule's tables against formulas written out in plain Python."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from ddpm_fast.schedule import NoiseSchedule

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
            "alphas_cumprod_next": ac * (1 - betas[t + 1]) if t < 99 else 0.0,
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
    assert len(tables) == 14
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
