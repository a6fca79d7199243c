"""Plans: every row against the published formulas in float64, the Gaussian case, refusals."""

import json
import math

import numpy as np
import pytest
import torch

from ddpm_fast import methods as M
from ddpm_fast import reference
from ddpm_fast.plan import make_plan
from ddpm_fast.schedule import NoiseSchedule

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
METHODS = [("ddpm", 0, True), ("ddim", 0, True), ("ddim", 0.4, True), ("ddim", 1, True)]
METHODS += [("ddim", 0.4, False)]
STEPS = [(None, None), ("ddim10", None), ("3,4", None), (13, "openai"), (9, "leading")]
STEPS += [(9, "trailing"), (7, "linspace"), (8, "quadratic"), (1, "trailing")]


def published_step(schedule, plan, i, x_t, output, noise):
    """guided-diffusion's step i of the plan, on the respaced schedule."""
    respaced = schedule.respace(sorted(plan.timesteps))
    t = torch.full((len(x_t),), plan.num_steps - 1 - i)
    types = (plan.prediction_type, plan.variance_type, plan.clip_denoised)
    if plan.method == "ddim":
        types += (plan.use_clipped_model_output,)
        return reference.ddim_sample(respaced, output, x_t, t, noise, plan.eta, *types)
    return reference.p_sample(respaced, output, x_t, t, noise, *types)


def check_rows(schedule, plan):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 5)
    channels = 4 if plan.variance_type.startswith("learned") else 2
    for i in range(plan.num_steps):
        x_t, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        output = torch.randn(3, channels, 5, generator=generator, dtype=torch.float64)
        row = torch.full((3,), i)
        got = reference.step(plan.coefficients64, plan.index, row, x_t, output, noise)
        wanted = published_step(schedule, plan, i, x_t, output, noise)
        for g, w in zip(got, wanted, strict=True):
            # atol for sums that cancel; pred_xstart and x_prev unclipped reach 1e2.
            torch.testing.assert_close(g, w, rtol=1e-12, atol=2e-13)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("method, eta, use_clipped", METHODS)
def test_rows_equal_the_published_step(
    method, eta, use_clipped, prediction_type, variance_type, clip
):
    schedule = NoiseSchedule.linear(100, 1e-3, 0.1)
    options = {"method": method, "eta": eta, "clip_denoised": clip}
    options["use_clipped_model_output"] = use_clipped
    plan = make_plan(
        schedule, prediction_type=prediction_type, variance_type=variance_type, **options
    )
    assert plan.num_steps == 100
    check_rows(schedule, plan)


@pytest.mark.parametrize("method, variance_type", [("ddpm", "learned_range"), ("ddim", "learned")])
@pytest.mark.parametrize("steps, spacing", STEPS)
def test_respaced_rows_equal_the_published_step(steps, spacing, method, variance_type):
    schedule = NoiseSchedule.cosine(100)
    check_rows(schedule, make_plan(schedule, method, steps, spacing, variance_type=variance_type))


def test_coefficients_long_hand():
    """Each column against its formula in Python floats, independent of both of our forms."""
    schedule = NoiseSchedule.linear(1000)
    kept = list(range(0, 1000, 20))
    ddpm = make_plan(schedule, "ddpm", "ddim50", variance_type="learned_range")
    small = make_plan(schedule, "ddpm", "ddim50", variance_type="fixed_small")
    large = make_plan(schedule, "ddpm", "ddim50", variance_type="fixed_large")
    ddim = make_plan(schedule, "ddim", "ddim50", eta=0.5)
    assert ddpm.timesteps == kept[::-1]
    variances = []
    for j, t in enumerate(kept):
        ac = schedule.alphas_cumprod[t]
        before = schedule.alphas_cumprod[kept[j - 1]] if j else 1.0
        beta = 1 - ac / before
        variances.append(beta * (1 - before) / (1 - ac))
        i = 49 - j
        row = ddpm.coefficients64[i]
        assert row[M.A].item() == pytest.approx(ac**-0.5, rel=1e-12)
        assert row[M.B].item() == pytest.approx(-math.sqrt((1 - ac) / ac), rel=1e-11)
        assert row[M.C0].item() == pytest.approx(beta * math.sqrt(before) / (1 - ac), rel=1e-12)
        c1 = (1 - before) * math.sqrt(1 - beta) / (1 - ac)
        assert row[M.C1].item() == pytest.approx(c1, rel=1e-12)
        assert row[M.MAX_LOG].item() == pytest.approx(math.log(beta), rel=1e-12)
        sigma = 0.5 * math.sqrt((1 - before) / (1 - ac) * (1 - ac / before))
        k = math.sqrt(1 - before - sigma**2)
        row = ddim.coefficients64[i]
        wanted = [math.sqrt(before) - k * math.sqrt(ac / (1 - ac)), k / math.sqrt(1 - ac), 0, 0]
        got = row[[M.C0, M.C1, M.C2, M.C3]].tolist()
        assert got == pytest.approx(wanted, rel=1e-11, abs=1e-15)
        assert row[M.SIGMA].item() == pytest.approx(sigma, rel=1e-12)
        if j:
            assert small.coefficients64[i, M.SIGMA].item() ** 2 == pytest.approx(variances[j])
            assert large.coefficients64[i, M.SIGMA].item() ** 2 == pytest.approx(beta)
    logs = [math.log(v) for v in [variances[1], *variances[1:]]]
    np.testing.assert_allclose(ddpm.coefficients64[:, M.MIN_LOG].flip(0), logs, rtol=1e-12)
    for plan in (ddpm, small, large, ddim):
        assert plan.coefficients64[-1, M.SIGMA] == 0 and plan.index[-1, M.FLAGS] == 0
    assert (ddpm.index[:-1, M.FLAGS] == M.LEARNED_VARIANCE).all()


def test_shapes_types_and_index():
    plan = make_plan(NoiseSchedule.linear(1000), steps="10,15,20", clip_denoised=False)
    assert plan.coefficients64.shape == (45, 16) and plan.coefficients64.dtype == torch.float64
    assert plan.coefficients.dtype == torch.float32 and plan.index.dtype == torch.int32
    assert (plan.coefficients == plan.coefficients64.float()).all()
    assert plan.index[:, M.TIMESTEP].tolist() == plan.timesteps
    assert plan.index[:, M.NOISE_STEP].tolist() == list(range(1, 46))
    assert plan.timesteps[0] == 999 and plan.timesteps == sorted(plan.timesteps, reverse=True)
    assert plan.coefficients[0, M.CLIP_LO] == -math.inf and plan.coefficients[0, 11:].sum() == 0
    assert plan.to("cpu").timesteps == plan.timesteps
    told = json.loads(json.dumps(plan.describe()))
    assert told["timesteps"] == plan.timesteps and told["spacing"] == "10,15,20"
    assert told["method"] == "ddpm" and told["clip_denoised"] is False


def test_float64_tables_matter():
    """The reason for float64: rounding once keeps 6e-8, a float32 schedule is off by 1e-4."""
    plan = make_plan(NoiseSchedule.linear())
    relative = (plan.coefficients.double() / plan.coefficients64 - 1)[:-1, : M.C1 + 1]
    assert relative.abs().max() < 6e-8


def test_ddim_with_eta_one_has_the_ddpm_variance():
    schedule = NoiseSchedule.cosine(200)
    for steps in (None, 20):
        ddim = make_plan(schedule, "ddim", steps, eta=1.0)
        ddpm = make_plan(schedule, "ddpm", steps)
        for column in (M.C0, M.C1, M.SIGMA):
            # atol: near t = 0, sqrt(before) - k * ... cancels.
            torch.testing.assert_close(
                ddim.coefficients64[:, column],
                ddpm.coefficients64[:, column],
                rtol=1e-9,
                atol=1e-13,
            )


# Gaussian data N(mu, s^2): x_t is Gaussian too, with mean m_t = sqrt(ac) mu and variance
# V_t = ac s^2 + 1 - ac, and E[x_0 | x_t] = mu + sqrt(ac) s^2 / V_t (x_t - m_t), so the exact eps
# is affine in x_t, and a sampling chain keeps x_t Gaussian.


def chain_of_plan(schedule, plan, mu, s):
    """Mean and variance of the plan's last state, from its coefficients and the exact eps."""
    mean, variance = 0.0, 1.0
    for t, row in zip(plan.timesteps, plan.coefficients64.tolist(), strict=True):
        ac = float(schedule.alphas_cumprod[t])
        gain = math.sqrt(ac) * s**2 / (ac * s**2 + 1 - ac)
        # eps = slope * x_t + offset
        slope = (1 - math.sqrt(ac) * gain) / math.sqrt(1 - ac)
        offset = -math.sqrt(ac) * (mu - gain * math.sqrt(ac) * mu) / math.sqrt(1 - ac)
        a, b = row[M.A] + row[M.B] * slope, row[M.B] * offset
        factor, shift = row[M.C0] * a + row[M.C1], row[M.C0] * b
        mean, variance = factor * mean + shift, factor**2 * variance + row[M.SIGMA] ** 2
    return mean, variance


def chain_of_regression(schedule, kept, mu, s, sigma2):
    """The same chain from the joint Gaussian of (x_s, x_t) alone: no posterior coefficients.

    E[x_s | x_t] = m_s + Cov / V_t (x_t - m_t), with Cov = sqrt(ac_t / ac_s) V_s.
    """
    ac = [1.0, *schedule.alphas_cumprod[kept].tolist()]
    mean, variance = 0.0, 1.0
    for j in range(len(kept), 0, -1):
        v_t, v_s = (a * s**2 + 1 - a for a in (ac[j], ac[j - 1]))
        slope = math.sqrt(ac[j] / ac[j - 1]) * v_s / v_t
        mean = math.sqrt(ac[j - 1]) * mu + slope * (mean - math.sqrt(ac[j]) * mu)
        noise = 0.0 if j == 1 else sigma2(ac[j], ac[j - 1])
        variance = slope**2 * variance + noise
    return mean, variance


VARIANCE_RULES = {
    "fixed_small": lambda ac, before: (1 - ac / before) * (1 - before) / (1 - ac),
    "fixed_large": lambda ac, before: 1 - ac / before,
}


@pytest.mark.parametrize("steps", [None, 100])
@pytest.mark.parametrize("variance_type", VARIANCE_RULES)
@pytest.mark.parametrize("mu, s", [(0.3, 0.5), (-0.2, 0.05), (0.0, 1.0)])
def test_gaussian_chain(mu, s, variance_type, steps):
    schedule = NoiseSchedule.linear(1000)
    plan = make_plan(schedule, "ddpm", steps, variance_type=variance_type, clip_denoised=False)
    mean, variance = chain_of_plan(schedule, plan, mu, s)
    kept = sorted(plan.timesteps)
    rule = VARIANCE_RULES[variance_type]
    wanted = chain_of_regression(schedule, kept, mu, s, rule)
    assert (mean, variance) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    if steps is None:
        # x_T starts from mean 0 where sqrt(ac_T) mu = 0.0064 mu is right, and every step
        # contracts that, so the mean is right to well under 0.0064 mu.
        assert abs(mean - mu) <= 0.0064 * abs(mu) + 1e-12
        if variance_type == "fixed_small":
            # The true reverse variance is larger by coef1^2 Var(x_0 | x_t); what step t lacks
            # reaches x_0 times ac_before s^4 / V_before^2. The sum goes as 1 / T.
            lacking = expected_deficit(schedule.alphas_cumprod.tolist(), s)
            assert variance == pytest.approx(s**2 * (1 - lacking), rel=1e-4)
            assert lacking < 0.02 if s >= 0.5 else 0.1 < lacking < 0.2
        elif s == 1.0:
            # Unit variance stays so under fixed_large, to the last step, whose E[x_0 | x_1] has
            # the variance ac_0 = 1 - beta_0.
            assert variance == pytest.approx(1 - 1e-4, rel=1e-12)
        else:
            # Each step adds beta (1 - posterior factor) too much where s < 1: O(1 / T) as well.
            assert 0 < variance / s**2 - 1 < (0.02 if s >= 0.5 else 0.2)


def expected_deficit(ac, s):
    """Share of the variance that fixed_small loses, summed over the steps (see above)."""
    total, before = 0.0, 1.0
    for now in ac:
        v_now, v_before = (a * s**2 + 1 - a for a in (now, before))
        beta = 1 - now / before
        coef1 = beta * math.sqrt(before) / (1 - now)
        missing = coef1**2 * s**2 * (1 - now) / v_now
        total += missing * before * s**4 / v_before**2 / s**2
        before = now
    return total


@pytest.mark.parametrize("mu, s", [(0.3, 0.5), (-0.2, 0.1)])
def test_gaussian_probability_flow(mu, s):
    """DDIM with eta 0 solves an ODE by a first-order method: ten times the steps, a tenth."""
    schedule = NoiseSchedule.linear(1000)
    errors = []
    for steps in (100, 1000):
        plan = make_plan(schedule, "ddim", steps, clip_denoised=False)
        mean, variance = chain_of_plan(schedule, plan, mu, s)
        assert abs(mean - mu) < 0.0064 * abs(mu) + 1e-12
        errors.append(abs(math.sqrt(variance) / s - 1))
    assert errors[1] < 0.02 and errors[1] < 0.2 * errors[0]


def sentence(action, *words):
    with pytest.raises(ValueError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text, text
    for word in words:
        assert word in text, text


def test_a_last_step_without_signal():
    schedule = NoiseSchedule([0.1, 0.2, 0.5, 1.0])
    for method, eta in (("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("ddim", 1)):
        for prediction_type in ("sample", "v_prediction"):
            plan = make_plan(schedule, method, eta=eta, prediction_type=prediction_type)
            assert torch.isfinite(plan.coefficients).all()
            check_rows(schedule, plan)
        refused = ["timestep 3", "epsilon", "v_prediction"]
        sentence(lambda m=method, e=eta: make_plan(schedule, m, eta=e), *refused)


@pytest.mark.filterwarnings("error")
def test_signal_that_ends_early():
    schedule = NoiseSchedule([0.1, 1.0, 0.5, 0.5])
    assert make_plan(schedule, prediction_type="sample").num_steps == 4
    sentence(lambda: make_plan(schedule, "ddim", prediction_type="sample"), "timestep 3")
    sentence(lambda: make_plan(schedule, steps=3), "timestep 2")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "dpm"}, ["ddpm, ddim, dpmpp_2m, ddim_inverse", "'dpm'"]),
        ({"method": "dpmpp_2m", "eta": 1}, ["ddim", "dpmpp_2m", "1.0"]),
        ({"use_clipped_model_output": False}, ["ddim", "ddpm"]),
        ({"use_clipped_model_output": 1}, ["True or False", "1"]),
        ({"method": "ddim_inverse", "strength": 0.5}, ["ddim_inverse", "0.5"]),
        ({"strength": 0}, ["no step", "larger"]),
        ({"strength": 1.5}, ["between 0.0 and 1.0", "1.5"]),
        ({"strength": "a"}, ["'a'"]),
        ({"steps": 3, "strength": 0.3}, ["0.3 of 3 steps", "no step"]),
        ({"steps": 3, "steps_offset": 1}, ["leading", "openai"]),
        ({"method": None}, ["None"]),
        ({"prediction_type": "eps"}, ["epsilon, sample, v_prediction"]),
        ({"variance_type": "fixed"}, ["fixed_small, fixed_large, learned, learned_range"]),
        ({"method": "ddim", "eta": 1.5}, ["between 0.0 and 1.0", "1.5"]),
        ({"method": "ddim", "eta": -0.1}, ["-0.1"]),
        ({"method": "ddim", "eta": math.nan}, ["nan"]),
        ({"method": "ddim", "eta": "a"}, ["'a'"]),
        ({"eta": 0.5}, ["ddim", "0.5"]),
        ({"clip_denoised": 2}, ["True or False"]),
        ({"steps": 0}, ["between 1 and 10"]),
        ({"steps": 11}, ["11"]),
        ({"steps": "ddim6"}, ["exactly 6"]),
        ({"spacing": "x"}, ["leading"]),
    ],
)
def test_refusals(options, words):
    sentence(lambda: make_plan(NoiseSchedule.linear(10), **options), *words)


def test_refuses_what_is_no_schedule():
    sentence(lambda: make_plan([0.1, 0.2]), "NoiseSchedule")
