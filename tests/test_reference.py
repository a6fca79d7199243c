"""The published forms: the formulas, the loops, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from ddpm_fast import reference
from ddpm_fast.plan import make_plan
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.spacing import timesteps_for

SCHEDULE = NoiseSchedule.linear(60, 1e-3, 0.15)
SHAPES = [(3, 1), (2, 3, 7), (2, 3, 4, 5), (2, 1, 3, 4, 2)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sentence(action, *words):
    with pytest.raises(ValueError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text, text
    for word in words:
        assert word in text, text


def test_forward_long_hand():
    x, z = draw(3, 2, 2), draw(3, 2, 2, seed=1)
    t = torch.tensor([0, 17, 59])
    sampled, stepped = reference.q_sample(SCHEDULE, x, t, z), reference.q_step(SCHEDULE, x, t, z)
    for n, last in enumerate(t.tolist()):
        ac = math.prod(1 - beta for beta in SCHEDULE.betas[: last + 1].tolist())
        beta = float(SCHEDULE.betas[last])
        for i in np.ndindex(2, 2):
            value, noise = x[(n, *i)].item(), z[(n, *i)].item()
            wanted = math.sqrt(ac) * value + math.sqrt(1 - ac) * noise
            assert sampled[(n, *i)].item() == pytest.approx(wanted, rel=1e-12, abs=1e-14)
            wanted = math.sqrt(1 - beta) * value + math.sqrt(beta) * noise
            assert stepped[(n, *i)].item() == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_chained_forward_steps_have_the_distribution_of_q_sample():
    """Both are linear in x and the noises, so their gains give mean and variance exactly."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, variance = one, 0.0
    for step in range(60):
        t = torch.tensor([step])
        gain = reference.q_step(SCHEDULE, one, t, zero).item()
        variance = gain**2 * variance + reference.q_step(SCHEDULE, zero, t, one).item() ** 2
        mean = reference.q_step(SCHEDULE, mean, t, zero)
        wanted = reference.q_sample(SCHEDULE, one, t, zero).item()
        assert mean.item() == pytest.approx(wanted, rel=1e-13)
        wanted = reference.q_sample(SCHEDULE, zero, t, one).item() ** 2
        assert variance == pytest.approx(wanted, rel=1e-12)


def test_posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) from the product of two Gaussians, without the published formula."""
    x_start, x_t, t = draw(60, 1), draw(60, 1, seed=1), torch.arange(60)
    mean, variance, log_variance = reference.q_posterior_mean_variance(SCHEDULE, x_start, x_t, t)
    for step in range(1, 60):
        before, beta = float(SCHEDULE.alphas_cumprod_prev[step]), float(SCHEDULE.betas[step])
        precision = 1 / (1 - before) + (1 - beta) / beta
        centre = math.sqrt(before) * x_start[step].item() / (1 - before)
        centre += math.sqrt(1 - beta) * x_t[step].item() / beta
        assert variance[step].item() == pytest.approx(1 / precision, rel=1e-12)
        assert log_variance[step].item() == pytest.approx(-math.log(precision), rel=1e-12)
        assert mean[step].item() == pytest.approx(centre / precision, rel=1e-11, abs=1e-13)
    assert variance[0] == 0 and mean[0].item() == pytest.approx(x_start[0].item(), rel=1e-11)


def test_predict_xstart_recovers_x_start():
    x, z, t = draw(60, 2), draw(60, 2, seed=1), torch.arange(60)
    x_t = reference.q_sample(SCHEDULE, x, t, z)
    root = torch.from_numpy(SCHEDULE.alphas_cumprod.copy()).sqrt()[:, None]
    v = root * z - (1 - root**2).sqrt() * x  # Salimans & Ho 2022
    for prediction_type, output in (("epsilon", z), ("sample", x), ("v_prediction", v)):
        got = reference.predict_xstart(SCHEDULE, output, x_t, t, prediction_type)
        torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)


def test_variances_long_hand():
    x_t, extra, t = draw(60, 1), draw(60, 1, seed=1), torch.arange(60)
    output = torch.cat([draw(60, 1, seed=2), extra], dim=1)
    betas, small = SCHEDULE.betas, SCHEDULE.posterior_variance
    for variance_type in ("fixed_small", "fixed_large", "learned", "learned_range"):
        mo = output if variance_type.startswith("learned") else output[:, :1]
        out = reference.p_mean_variance(SCHEDULE, mo, x_t, t, variance_type=variance_type)
        for step in range(1, 60):
            value, low, high = extra[step].item(), math.log(small[step]), math.log(betas[step])
            wanted = {
                "fixed_small": low,
                "fixed_large": high,
                "learned": value,
                "learned_range": (value + 1) / 2 * high + (1 - value) / 2 * low,
            }[variance_type]
            assert out.log_variance[step].item() == pytest.approx(wanted, rel=1e-12)
            assert out.variance[step].item() == pytest.approx(math.exp(wanted), rel=1e-11)
        assert out.mean.shape == out.variance.shape == out.pred_xstart.shape == x_t.shape
        assert out.pred_xstart.abs().max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank(shape):
    x, z, t = draw(*shape), draw(*shape, seed=1), torch.full(shape[:1], 30)
    flat = torch.Size((shape[0], math.prod(shape[1:])))
    noisy = reference.q_sample(SCHEDULE, x, t, z)
    wanted = reference.q_sample(SCHEDULE, x.reshape(flat), t, z.reshape(flat))
    assert torch.equal(noisy.reshape(flat), wanted)
    plan = make_plan(SCHEDULE)
    got, _ = reference.step(plan.coefficients64, plan.index, t, noisy, z, x)
    wanted = reference.p_sample(SCHEDULE, z, noisy, 59 - t, x).sample
    assert got.shape == shape
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def affine_model(x, t):
    """The exact eps for data N(0.3, 0.25) at SCHEDULE's timestep t (see test_gaussian)."""
    ac = torch.from_numpy(SCHEDULE.alphas_cumprod.copy())[t].to(x.dtype)[:, None]
    start = 0.3 + ac.sqrt() * 0.25 / (ac * 0.25 + 1 - ac) * (x - ac.sqrt() * 0.3)
    return (x - ac.sqrt() * start) / (1 - ac).sqrt()


@pytest.mark.parametrize(
    "method, options",
    [
        ("ddpm", {}),
        ("ddim", {}),
        ("ddim", {"eta": 0.6}),
        ("ddim", {"eta": 0.6, "use_clipped_model_output": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [None, 12])
def test_loop_equals_the_plan(method, options, steps):
    """The published loop and the table's, on the same noise, over all the steps."""
    kept = timesteps_for(60, steps)
    noises = [draw(5, 1, seed=i) for i in range(len(kept) + 1)]
    plan = make_plan(SCHEDULE, method, steps, **options)
    options = {"method": method, "timesteps": kept, "noise": noises[0], **options}
    options.update(step_noise=noises.__getitem__, dtype=torch.float64)
    states = list(reference.p_sample_loop_progressive(affine_model, (5, 1), SCHEDULE, **options))
    assert len(states) == len(kept) + 1 and torch.equal(states[0], noises[0])
    whole = reference.p_sample_loop(affine_model, (5, 1), SCHEDULE, **options)
    assert torch.equal(states[-1], whole)
    x_t = noises[0]
    for i, (timestep, state) in enumerate(zip(plan.timesteps, states[1:], strict=True)):
        output = affine_model(x_t, torch.full((5,), timestep))
        row = torch.full((5,), i)
        x_t, _ = reference.step(plan.coefficients64, plan.index, row, x_t, output, noises[i + 1])
        torch.testing.assert_close(x_t, state, rtol=1e-11, atol=1e-12)


def test_monte_carlo_gaussian():
    """40,000 samples: mean and variance within 5 standard errors of the chain's exact ones."""
    n = 40_000
    mean, variance = 0.0, 1.0
    for step in range(59, -1, -1):  # the regression of x_{t-1} on x_t, as in test_gaussian
        ac, before = SCHEDULE.alphas_cumprod[step], SCHEDULE.alphas_cumprod_prev[step]
        v_t, v_s = ac * 0.25 + 1 - ac, before * 0.25 + 1 - before
        slope = math.sqrt(ac / before) * v_s / v_t
        mean = math.sqrt(before) * 0.3 + slope * (mean - math.sqrt(ac) * 0.3)
        variance = slope**2 * variance + SCHEDULE.posterior_variance[step]
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "clip_denoised": False, "dtype": torch.float64}
    x = reference.p_sample_loop(affine_model, (n, 1), SCHEDULE, **options)
    assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) < 5 * variance * math.sqrt(2 / n)
    assert abs(mean - 0.3) < 0.01 and abs(variance / 0.25 - 1) < 0.2


def test_loop_leaves_the_gradient_mode_alone():
    layer = torch.nn.Linear(1, 1)
    states = reference.p_sample_loop_progressive(lambda x, t: layer(x), (2, 1), SCHEDULE)
    next(states)  # x_T
    assert not next(states).requires_grad and torch.is_grad_enabled()


def test_beta_of_one():
    schedule = NoiseSchedule([0.1, 0.4, 1.0])
    x, t = draw(2, 1), torch.tensor([1, 2])
    for prediction_type in ("sample", "v_prediction"):
        out = reference.p_mean_variance(schedule, x, x, t, prediction_type)
        assert all(torch.isfinite(part).all() for part in out)
        for eta in (0.0, 1.0):
            out = reference.ddim_sample(schedule, x, x, t, x, eta, prediction_type)
            assert torch.isfinite(out.sample).all()
    sentence(lambda: reference.p_mean_variance(schedule, x, x, t), "timestep 2", "epsilon")
    assert torch.isfinite(reference.p_mean_variance(schedule, x, x, t - 1).mean).all()


X, T = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "action, words",
    [
        (lambda: reference.q_sample(SCHEDULE, X, T, X[:1]), ["noise", "(2, 3)", "(1, 3)"]),
        (lambda: reference.q_step(SCHEDULE, X, T, X[:1]), ["noise"]),
        (lambda: reference.q_sample(SCHEDULE, X, T[:1], X), ["int64", "(1,)"]),
        (lambda: reference.q_sample(SCHEDULE, X, T.int(), X), ["int32"]),
        (lambda: reference.q_sample(SCHEDULE, X, T + 60, X), ["0 to 59", "60"]),
        (lambda: reference.q_sample(SCHEDULE, X, T - 1, X), ["-1"]),
        (lambda: reference.q_sample(SCHEDULE, X[0], T, X[0]), ["(N, C, ...)"]),
        (lambda: reference.q_sample(SCHEDULE, X.int(), T, X.int()), ["int32"]),
        (lambda: reference.p_mean_variance(SCHEDULE, X, X, T, "eps"), ["v_prediction"]),
        (lambda: reference.p_mean_variance(SCHEDULE, X, X, T, variance_type="x"), ["learned"]),
        (
            lambda: reference.p_mean_variance(SCHEDULE, X, X, T, variance_type="learned"),
            ["(2, 6)", "(2, 3)"],
        ),
        (lambda: reference.p_sample(SCHEDULE, X, X, T, X[:, :1]), ["noise"]),
        (lambda: reference.ddim_sample(SCHEDULE, X, X, T, X, 2.0), ["eta"]),
        (lambda: reference.p_sample_loop(None, (2, 3), SCHEDULE, method="x"), ["ddpm, ddim"]),
        (lambda: reference.p_sample_loop(None, (2, 3), SCHEDULE, noise=X[:1]), ["(1, 3)"]),
    ],
)
def test_refusals(action, words):
    sentence(action, *words)
