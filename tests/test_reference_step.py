"""The table's step: each operation rounded as it is written, guidance, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from test_reference import SCHEDULE, draw, sentence

from ddpm_fast import methods as M
from ddpm_fast import reference
from ddpm_fast.plan import make_plan


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


X, ROW = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
PLAN = make_plan(SCHEDULE)
LEARNED = make_plan(SCHEDULE, variance_type="learned")


def table_step(plan=PLAN, row=ROW, x_t=X, output=X, noise=X, **rest):
    return reference.step(plan.coefficients, plan.index, row, x_t, output, noise, **rest)


@pytest.mark.parametrize(
    "action, words",
    [
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
