"""Plans: DDPM's and DDIM's rows and chains against `reference`'s published forms, refusals.

Each coefficient by itself is in test_coefficients.py, the other methods' rows in test_methods.py.
"""

import json
import math

import pytest
import torch
from test_reference import sentence

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


def published_step(schedule, plan, row, x_t, output, noise):
    """guided-diffusion's steps `row` (N,) of the plan, on the respaced schedule."""
    respaced = schedule.respace(sorted(plan.timesteps))
    t = plan.num_steps - 1 - row
    types = (plan.prediction_type, plan.variance_type, plan.clip_denoised)
    if plan.method == "ddim":
        types += (plan.use_clipped_model_output,)
        return reference.ddim_sample(respaced, output, x_t, t, noise, plan.eta, *types)
    return reference.p_sample(respaced, output, x_t, t, noise, *types)


def check_rows(schedule, plan):
    """Three samples at each row, all at once."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(plan.num_steps).repeat(3)
    channels = 4 if plan.variance_type.startswith("learned") else 2
    x_t, noise = torch.randn(2, len(row), 2, 5, generator=generator, dtype=torch.float64)
    output = torch.randn(len(row), channels, 5, generator=generator, dtype=torch.float64)
    got = reference.step(plan.coefficients64, plan.index, row, x_t, output, noise)
    wanted = published_step(schedule, plan, row, x_t, output, noise)
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


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("method, eta, use_clipped", METHODS)
def test_rows_of_previous_x_equal_the_published_step(method, eta, use_clipped, clip):
    """OpenAI's PREVIOUS_X: the network predicts the mean of x_{t-1}."""
    schedule = NoiseSchedule.linear(100, 1e-3, 0.1)
    types = {"prediction_type": "previous_x", "variance_type": "learned_range"}
    options = {"clip_denoised": clip, "use_clipped_model_output": use_clipped}
    check_rows(schedule, make_plan(schedule, method, eta=eta, **types, **options))


@pytest.mark.parametrize("method", M.METHODS)
def test_previous_x_says_what_epsilon_says(method):
    """The mean that an eps stands for, predicted in its place, takes every method the same way."""
    schedule = NoiseSchedule.linear(50, 1e-3, 0.2)
    generator = torch.Generator().manual_seed(0)
    plans = {
        name: make_plan(schedule, method, prediction_type=name, clip_denoised=False)
        for name in ("epsilon", "previous_x")
    }
    for i, timestep in enumerate(plans["epsilon"].timesteps):
        x, eps, noise, before = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
        row, t = torch.full((3,), i), torch.full((3,), timestep)
        out = reference.p_mean_variance(schedule, eps, x, t, clip_denoised=False)
        steps = [
            reference.step(plan.coefficients64, plan.index, row, x, output, noise, before)
            for plan, output in zip(plans.values(), (eps, out.mean), strict=True)
        ]
        for got, wanted in zip(*steps, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("method, variance_type", [("ddpm", "learned_range"), ("ddim", "learned")])
@pytest.mark.parametrize("steps, spacing", STEPS)
def test_respaced_rows_equal_the_published_step(steps, spacing, method, variance_type):
    schedule = NoiseSchedule.cosine(100)
    check_rows(schedule, make_plan(schedule, method, steps, spacing, variance_type=variance_type))


CHAINS = [("ddpm", {"variance_type": variance_type}) for variance_type in VARIANCES]
CHAINS += [("ddim", {}), ("ddim", {"eta": 0.6})]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("method, options", CHAINS, ids=str)
def test_chain_in_float32(method, options, prediction_type):
    """Fifty steps of the float32 table against the published steps, in float32 and in float64.

    All are given the outputs of the table's run, so that they differ by rounding alone.
    """
    schedule = NoiseSchedule.linear(100, 1e-3, 0.1)
    plan = make_plan(schedule, method, 50, prediction_type=prediction_type, **options)
    x, *noise = torch.randn(51, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    single, double = x, x.double()
    for i, z in enumerate(noise):
        output = 0.5 * torch.tanh(x) + 0.4 * math.cos(i / 9)
        if plan.variance_type.startswith("learned"):
            log_variance = torch.sin(3 * x) - (4 if plan.variance_type == "learned" else 0)
            output = torch.cat([output, log_variance], dim=1)
        row = torch.full((3,), i)
        x, _ = reference.step(plan.coefficients, plan.index, row, x, output, z)
        single = published_step(schedule, plan, row, single, output, z).sample
        double = published_step(schedule, plan, row, double, output.double(), z.double()).sample
        assert x.dtype == single.dtype == torch.float32
        torch.testing.assert_close(x.double(), double, rtol=0, atol=3e-6)
        torch.testing.assert_close(x, single, rtol=0, atol=3e-6)
    assert double.abs().max() > 0.1


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
    schedule = NoiseSchedule.linear()
    plan = make_plan(schedule)
    relative = (plan.coefficients.double() / plan.coefficients64 - 1)[:-1, : M.C1 + 1]
    assert relative.abs().max() < 6e-8
    betas = torch.linspace(1e-4, 0.02, 1000)
    ac = (1 - betas).cumprod(0)
    coef2 = (1 - ac[:-1]) * (1 - betas[1:]).sqrt() / (1 - ac[1:])
    relative = coef2.double().numpy() / schedule.posterior_mean_coef2[1:] - 1
    assert abs(relative).max() > 1e-4


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
    for method in M.METHODS:
        previous = {"prediction_type": "previous_x"}
        sentence(lambda m=method, p=previous: make_plan(schedule, m, **p), "previous_x", "v_pred")


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
