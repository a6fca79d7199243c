"""Every coefficient of every method against its published formula, in decimals of 50 digits.

The formulas are written for alpha = alphas_cumprod at a step's timestep and `before`, that of the
kept timestep nearer to x_0. The float64 table may be off by 1e-12 of a coefficient's value.
"""

from collections.abc import Iterator
from decimal import Context, Decimal, localcontext
from itertools import pairwise

import pytest

from ddpm_fast import methods as M
from ddpm_fast.plan import Plan, make_plan
from ddpm_fast.schedule import NoiseSchedule

ONE = Decimal(1)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
# All steps of the cosine schedule are left out: 1 - alpha / before, which the schedule's own betas
# stand for there, is known to 1.2e-12 only from the rounded alphas_cumprod of its first steps.
SCHEDULES = [("linear", None), ("linear", "ddim50"), ("cosine", "ddim50")]
over_schedules = pytest.mark.parametrize("name, steps", SCHEDULES, ids=str)

Row = dict[int, Decimal]


@pytest.fixture(autouse=True)
def fifty_digits() -> Iterator[None]:
    with localcontext(Context(prec=50)):
        yield


def plan_and_levels(
    name: str, steps: str | None, method: str, **options
) -> tuple[Plan, list[tuple[Decimal, Decimal]]]:
    """The plan, and (alpha, before) of its steps."""
    schedule = getattr(NoiseSchedule, name)()
    plan = make_plan(schedule, method, steps, **options)
    kept = sorted(plan.timesteps)
    alpha = {t: Decimal(float(schedule.alphas_cumprod[t])) for t in kept}
    before = {t: alpha[s] for s, t in pairwise(kept)} | {kept[0]: ONE}
    return plan, [(alpha[t], before[t]) for t in plan.timesteps]


def check(plan: Plan, rows: list[Row], absolute: str = "0") -> None:
    """rows: of each step, the columns up to the clip that are not 0."""
    for got, row in zip(plan.coefficients64.tolist(), rows, strict=True):
        for column in range(M.CLIP_LO):
            wanted = row.get(column, Decimal(0))
            error = abs(Decimal(got[column]) - wanted)
            bound = max(abs(wanted) * Decimal("1e-12"), Decimal(absolute))
            assert error <= bound, (column, got[column], wanted)


def predict(prediction_type: str, alpha: Decimal) -> Row:
    """x_0 of x_t and the output: Ho et al. 2020, eq. 4; Salimans & Ho 2022, appendix D."""
    if prediction_type == "epsilon":
        return {M.A: ONE / alpha.sqrt(), M.B: -((ONE - alpha) / alpha).sqrt()}
    if prediction_type == "sample":
        return {M.B: ONE}
    return {M.A: alpha.sqrt(), M.B: -(ONE - alpha).sqrt()}


def eps(prediction_type: str, alpha: Decimal) -> tuple[Decimal, Decimal]:
    """(p, q) of eps = p x_t + q output: (x_t - sqrt(alpha) x_0) / sqrt(1 - alpha)."""
    if prediction_type == "epsilon":
        return Decimal(0), ONE
    if prediction_type == "sample":
        return ONE / (ONE - alpha).sqrt(), -(alpha / (ONE - alpha)).sqrt()
    return (ONE - alpha).sqrt(), alpha.sqrt()


def posterior_variance(alpha: Decimal, before: Decimal) -> Decimal:
    """Ho et al. 2020, equation 7."""
    return (ONE - alpha / before) * (ONE - before) / (ONE - alpha)


def ddpm_variance(variance_type: str, levels: list[tuple[Decimal, Decimal]]) -> list[Row]:
    """Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, equation 15. No noise to x_0."""
    rows = []
    for alpha, before in levels:
        small, large = posterior_variance(alpha, before), ONE - alpha / before
        rows.append(
            {
                "fixed_small": {M.SIGMA: small.sqrt()},
                "fixed_large": {M.SIGMA: large.sqrt() if before != 1 else Decimal(0)},
                "learned": {M.MIN_LOG: -ONE, M.MAX_LOG: ONE},
                # Of the last step the variance is 0: its log is that of the step before.
                "learned_range": {
                    M.MIN_LOG: small.ln() if before != 1 else posterior_variance(*levels[-2]).ln(),
                    M.MAX_LOG: large.ln(),
                },
            }[variance_type]
        )
    return rows


@over_schedules
@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"]
)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddpm(prediction_type, variance_type, name, steps):
    """Ho et al. 2020, equation 7."""
    options = {"prediction_type": prediction_type, "variance_type": variance_type}
    plan, levels = plan_and_levels(name, steps, "ddpm", **options)
    rows = ddpm_variance(variance_type, levels)
    for row, (alpha, before) in zip(rows, levels, strict=True):
        beta = ONE - alpha / before
        row[M.C0] = beta * before.sqrt() / (ONE - alpha)
        row[M.C1] = (ONE - before) * (ONE - beta).sqrt() / (ONE - alpha)
        row |= predict(prediction_type, alpha)
    check(plan, rows)
    learned = M.LEARNED_VARIANCE if variance_type.startswith("learned") else 0
    assert plan.index[:, M.FLAGS].tolist() == [learned] * (plan.num_steps - 1) + [0]


@over_schedules
@pytest.mark.parametrize("use_clipped", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim(prediction_type, eta, use_clipped, name, steps):
    """Song et al. 2020, equations 12 and 16."""
    options = {"eta": eta, "use_clipped_model_output": use_clipped}
    options["prediction_type"] = prediction_type
    plan, levels = plan_and_levels(name, steps, "ddim", **options)
    rows = []
    for alpha, before in levels:
        sigma = Decimal(eta) * posterior_variance(alpha, before).sqrt()
        direction = (ONE - before - sigma**2).sqrt()
        row = {M.C0: before.sqrt(), M.SIGMA: sigma, **predict(prediction_type, alpha)}
        if use_clipped:
            row[M.C0] -= direction * (alpha / (ONE - alpha)).sqrt()
            row[M.C1] = direction / (ONE - alpha).sqrt()
        else:
            p, q = eps(prediction_type, alpha)
            row |= {M.C1: direction * p, M.C3: direction * q}
        rows.append(row)
    check(plan, rows)


@over_schedules
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_inverse(prediction_type, name, steps):
    """The same without noise from `before` to alpha, with the eps of alpha's timestep."""
    plan, levels = plan_and_levels(name, steps, "ddim_inverse", prediction_type=prediction_type)
    rows = []
    for alpha, before in levels:
        p, q = eps(prediction_type, alpha)
        here, there = (ONE - before).sqrt(), (ONE - alpha).sqrt()
        row = {M.A: (ONE - here * p) / before.sqrt(), M.B: -here * q / before.sqrt()}
        rows.append(row | {M.C0: alpha.sqrt(), M.C1: there * p, M.C3: there * q})
    # Towards x_T, A is the difference of two numbers up to 1e6 times as large.
    check(plan, rows, absolute="1e-13")


@over_schedules
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_dpmpp_2m(prediction_type, name, steps):
    """Lu et al. 2022 (arXiv:2211.01095), algorithm 2: lambda, h and r as there; then to x_0."""
    plan, levels = plan_and_levels(name, steps, "dpmpp_2m", prediction_type=prediction_type)
    lamda = [(alpha / (ONE - alpha)).ln() / 2 for alpha, _ in levels]
    rows = []
    for i, (alpha, before) in enumerate(levels[:-1]):
        h = lamda[i + 1] - lamda[i]
        gain, weight = before.sqrt() * (ONE - (-h).exp()), Decimal(0)
        if i:
            weight = h / (lamda[i] - lamda[i - 1]) / 2  # 1 / (2 r)
        ratio = ((ONE - before) / (ONE - alpha)).sqrt()
        rows.append({M.C0: gain * (1 + weight), M.C1: ratio, M.C2: -gain * weight})
    rows.append({M.C0: ONE})
    check(
        plan,
        [
            row | predict(prediction_type, alpha)
            for row, (alpha, _) in zip(rows, levels, strict=True)
        ],
    )
    assert plan.multistep
