"""The reference: the published forms, the table's step, the loops, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from ddpm_fast import methods as M
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


def scalar_step(plan, i, x_t, output, noise, previous):
    """The table's formula for one float32 number, each operation rounded on its own."""
    f = np.float32
    c = plan.coefficients[i].numpy()
    total = f(0)
    for coefficient, value in ((c[M.A], x_t), (c[M.B], output)):
        total = f(total + f(coefficient * value)) if coefficient != 0 else total
    pred = min(max(total, c[M.CLIP_LO]), c[M.CLIP_HI])
    total = f(0)
    values = (pred, x_t, previous, output, noise)
    for column, value in zip((M.C0, M.C1, M.C2, M.C3, M.SIGMA), values, strict=True):
        total = f(total + f(c[column] * value)) if c[column] != 0 else total
    return total, pred


def test_step_rounds_as_written():
    """Bit for bit in float32, with every term in use and each sample at its own row."""
    plan = make_plan(SCHEDULE, "ddim", 9, eta=0.7)
    plan.coefficients[:, M.C2], plan.coefficients[:, M.C3] = 0.123, -0.0371
    row = torch.arange(9)
    x_t, output, noise, previous = (draw(9, 40, seed=s, dtype=torch.float32) for s in range(4))
    got, pred = reference.step(plan.coefficients, plan.index, row, x_t, output, noise, previous)
    for n, i in np.ndindex(9, 40):
        values = (v[n, i].numpy() for v in (x_t, output, noise, previous))
        wanted = scalar_step(plan, n, *values)
        assert (got[n, i].item(), pred[n, i].item()) == tuple(float(w) for w in wanted)


def test_skipped_terms_do_no_harm_and_nan_passes_the_clip():
    plan = make_plan(SCHEDULE, prediction_type="sample")
    x_t = torch.full((1, 1), math.inf)  # A is 0 here, and C1 is 0 in the last row
    output = torch.full((1, 1), 0.25)
    row = torch.tensor([59])
    got, pred = reference.step(plan.coefficients, plan.index, row, x_t, output, x_t * math.nan)
    assert got.item() == pytest.approx(0.25) and pred.item() == 0.25
    got, pred = reference.step(plan.coefficients, plan.index, row, x_t, output * math.nan)
    assert got.isnan().all() and pred.isnan().all()


def test_guidance():
    plan = make_plan(SCHEDULE)
    x_t, z, c, u = (draw(2, 3, seed=s) for s in range(4))
    row = torch.tensor([5, 30])
    table = (plan.coefficients64, plan.index, row, x_t)
    for scale in (3.0, torch.tensor([0.5, 2.0], dtype=torch.float64)):
        w = scale if isinstance(scale, float) else scale[:, None]
        got = reference.step(*table, torch.cat([c, u]), z, guidance_scale=scale)
        wanted = reference.step(*table, u + w * (c - u), z)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    # The variance channels are not guided: they are the conditional half's.
    plan = make_plan(SCHEDULE, variance_type="learned_range")
    extra = draw(4, 3, seed=9)
    table = (plan.coefficients64, plan.index, row, x_t)
    both = torch.cat([torch.cat([c, u]), extra], dim=1)
    got = reference.step(*table, both, z, guidance_scale=2.0)[0]
    single = torch.cat([u + 2.0 * (c - u), extra[:2]], dim=1)
    assert torch.equal(got, reference.step(*table, single, z)[0])


def test_learned_variance_in_float32():
    """The contract's polynomial against float64; the last row takes no noise."""
    plan = make_plan(SCHEDULE, variance_type="learned_range")
    x_t, z, row = draw(60, 8), draw(60, 8, seed=1), torch.arange(60)
    output = draw(60, 16, seed=2)
    exact, _ = reference.step(plan.coefficients64, plan.index, row, x_t, output, z)
    single, _ = reference.step(
        plan.coefficients, plan.index, row, x_t.float(), output.float(), z.float()
    )
    assert single.dtype == torch.float32
    # 1e-5: float32 sums of pred_xstart's two terms, up to 20 before the clip
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)
    last = row[59:]
    a = reference.step(plan.coefficients64, plan.index, last, x_t[59:], output[59:])[0]
    assert torch.equal(a, exact[59:])


def affine_model(x, t):
    """The exact eps for data N(0.3, 0.25) at SCHEDULE's timestep t (see test_plan)."""
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
    for step in range(59, -1, -1):  # the regression of x_{t-1} on x_t, as in test_plan
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


X, T, ROW = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
PLAN = make_plan(SCHEDULE)
LEARNED = make_plan(SCHEDULE, variance_type="learned")


def table_step(plan=PLAN, row=ROW, x_t=X, output=X, noise=X, **rest):
    return reference.step(plan.coefficients, plan.index, row, x_t, output, noise, **rest)


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
        (lambda: table_step(x_t=X[0]), ["x_t"]),
        (lambda: table_step(row=ROW.int()), ["row", "int32"]),
        (lambda: table_step(row=ROW + 60), ["0 to 59", "60"]),
        (lambda: table_step(row=ROW - 1), ["-1"]),
        (lambda: table_step(output=X[:, :2]), ["model_output", "(2, 2)"]),
        (lambda: table_step(noise=None), ["noise"]),
        (lambda: table_step(noise=X[:1]), ["noise", "(1, 3)"]),
        (lambda: table_step(LEARNED), ["(2, 6)"]),
        (lambda: table_step(guidance_scale=2.0), ["guidance", "(4, 3)"]),
        (
            lambda: table_step(output=torch.zeros(4, 3), guidance_scale=torch.ones(3)),
            ["guidance_scale", "(3,)"],
        ),
        (lambda: reference.step(PLAN.index, PLAN.index, ROW, X, X), ["(S, 16)"]),
    ],
)
def test_refusals(action, words):
    sentence(action, *words)


def test_previous_is_asked_for_where_used():
    plan = make_plan(SCHEDULE)
    plan.coefficients[0, M.C2] = 0.5
    sentence(lambda: table_step(plan), "previous_pred_xstart")
    table_step(plan, row=ROW + 1)
