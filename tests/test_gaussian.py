"""Gaussian data, where the chain of a plan is known exactly: variances, the ODE, solvers' orders.

For data N(mu, s^2), x_t is Gaussian too, with the mean m_t = sqrt(ac) mu and the variance
V_t = ac s^2 + 1 - ac, and E[x_0 | x_t] = mu + sqrt(ac) s^2 / V_t (x_t - m_t): the exact eps is
affine in x_t, and a sampling chain keeps x_t Gaussian.
"""

import math
from itertools import pairwise

import pytest
import torch

from ddpm_fast import methods as M
from ddpm_fast import reference
from ddpm_fast.plan import make_plan
from ddpm_fast.schedule import NoiseSchedule


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


# The probability-flow ODE takes x_T = m_T + sqrt(V_T) z to x_0 = mu + s z.


def exact_eps(schedule, t, x, mu, s):
    ac = float(schedule.alphas_cumprod[t])
    return math.sqrt(1 - ac) * (x - math.sqrt(ac) * mu) / (ac * s**2 + 1 - ac)


def ode(schedule, t, mu, s):
    """(mean, deviation) of x_t."""
    ac = float(schedule.alphas_cumprod[t])
    return math.sqrt(ac) * mu, math.sqrt(ac * s**2 + 1 - ac)


def gaussian_chain(schedule, plan, x, mu, s):
    previous = torch.zeros_like(x)
    for i, t in enumerate(plan.timesteps):
        row = torch.full((len(x),), i)
        arguments = (x, exact_eps(schedule, t, x, mu, s), None, previous)
        x, previous = reference.step(plan.coefficients64, plan.index, row, *arguments)
    return x


@pytest.mark.parametrize(
    "method, fall", [("ddim", (1.9, 2.1)), ("dpmpp_2m", (3.6, 4.4))], ids=["ddim", "dpmpp_2m"]
)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_order_of_the_solver(name, method, fall):
    """Twice the steps: half the error for the first order, a quarter for the second."""
    schedule, mu, s = getattr(NoiseSchedule, name)(), 0.3, 0.5
    errors = []
    for steps in (40, 80, 160):
        plan = make_plan(schedule, method, steps, clip_denoised=False)
        mean, deviation = ode(schedule, plan.timesteps[0], mu, s)
        z = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
        x = gaussian_chain(schedule, plan, mean + deviation * z, mu, s)
        errors.append((x - (mu + s * z)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert fall[0] < coarse / fine < fall[1]


def test_inversion_of_gaussian_data():
    """x_0 = mu + s z becomes x_T = m_T + sqrt(V_T) z, by first order; and back it is x_0 again."""
    schedule, mu, s = NoiseSchedule.cosine(), 0.3, 0.5
    z = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    there, round_trip = [], []
    for steps in (100, 200, 400):
        plan = make_plan(schedule, "ddim_inverse", steps, clip_denoised=False)
        mean, deviation = ode(schedule, plan.timesteps[-1], mu, s)
        x_T = gaussian_chain(schedule, plan, mu + s * z, mu, s)
        there.append((x_T - (mean + deviation * z)).abs().max().item())
        back = make_plan(schedule, "ddim", steps, clip_denoised=False)
        x_0 = gaussian_chain(schedule, back, x_T, mu, s)
        round_trip.append((x_0 - (mu + s * z)).abs().max().item())
    for errors in (there, round_trip):
        assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]
    assert there[2] < 0.01 and round_trip[2] < 0.01
