"""DDIM's variants, its inversion and DPM-Solver++ 2M: formulas long-hand, and float32 chains.

What DDPM and DDIM share with the published forms of `reference` is in test_plan.py, each
coefficient by itself in test_coefficients.py, the solvers' orders in test_gaussian.py.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddpm_fast import methods as M
from ddpm_fast import reference
from ddpm_fast.plan import make_plan
from ddpm_fast.schedule import NoiseSchedule

PREDICTIONS = ("epsilon", "sample", "v_prediction")
CLIPS = (True, False)
SCHEDULE = NoiseSchedule.linear(100, 1e-3, 0.1)
SHAPE = (3, 2, 5)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def levels(schedule, plan, i):
    """alphas_cumprod of step i's timestep, and of the kept timestep nearer to x_0."""
    kept = sorted(plan.timesteps)
    j = kept.index(plan.timesteps[i])
    ac = schedule.alphas_cumprod
    return float(ac[kept[j]]), float(ac[kept[j - 1]]) if j else 1.0


def split(prediction_type, output, x, ac):
    """(x_0, eps) that the output means for x at the level ac (Salimans & Ho 2022, section 4)."""
    alpha, sigma = math.sqrt(ac), math.sqrt(1 - ac)
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (x - alpha * output) / sigma
    return alpha * x - sigma * output, sigma * x + alpha * output


def clipped(x, clip):
    return x.clamp(-1, 1) if clip else x


def published_ddim(schedule, plan, i, x, output, noise):
    """Song et al. 2020, equations 12 and 16, as diffusers' DDIMScheduler reads them."""
    ac, before = levels(schedule, plan, i)
    x_0, eps = split(plan.prediction_type, output, x, ac)
    x_0 = clipped(x_0, plan.clip_denoised)
    if plan.use_clipped_model_output:
        eps = (x - math.sqrt(ac) * x_0) / math.sqrt(1 - ac)
    sigma = plan.eta * math.sqrt((1 - before) / (1 - ac)) * math.sqrt(1 - ac / before)
    direction = math.sqrt(1 - before - sigma**2)
    return math.sqrt(before) * x_0 + direction * eps + sigma * noise


def published_inverse(schedule, plan, i, x, output):
    """The same with eta 0 from `before` up to `ac`; eps read at the level that was asked for."""
    ac, before = levels(schedule, plan, i)
    _, eps = split(plan.prediction_type, output, x, ac)
    x_0 = clipped((x - math.sqrt(1 - before) * eps) / math.sqrt(before), plan.clip_denoised)
    return math.sqrt(ac) * x_0 + math.sqrt(1 - ac) * eps


def published_dpmpp_2m(schedule, timesteps, outputs, x, prediction_type, clip):
    """Lu et al. 2022 (arXiv:2211.01095), algorithm 2, down to the last timestep; then to x_0.

    t_0 .. t_M are the timesteps and x_theta the prediction of x_0; the paper's line numbers.
    """
    ac = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    alpha, sigma = [math.sqrt(a) for a in ac], [math.sqrt(1 - a) for a in ac]
    lamda = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    h = [math.nan, *(b - a for a, b in pairwise(lamda))]

    def x_theta(i):
        return clipped(split(prediction_type, outputs[i], x, ac[i])[0], clip)

    buffer = [x_theta(0)]  # line 2
    for i in range(1, len(timesteps)):
        if i == 1:  # line 3
            data = buffer[0]
        else:  # lines 6 and 7
            r = h[i - 1] / h[i]
            data = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h[i]) - 1) * data
        buffer.append(x_theta(i))
    return buffer[-1]  # the step to sigma = 0 is of first order: x_0 as it is predicted


def table_chain(plan, outputs, x, noise=None):
    """The plan's steps by `reference.step`, in x's dtype."""
    coefficients = plan.coefficients64 if x.dtype == torch.float64 else plan.coefficients
    previous = torch.zeros_like(x)
    for i in range(plan.num_steps):
        row = torch.full((len(x),), i)
        z = None if noise is None else noise[i]
        x, previous = reference.step(coefficients, plan.index, row, x, outputs[i], z, previous)
    return x


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("use_clipped", [True, False])
def test_ddim_rows(use_clipped, eta, prediction_type, clip):
    options = {"eta": eta, "clip_denoised": clip, "use_clipped_model_output": use_clipped}
    plan = make_plan(SCHEDULE, "ddim", 23, prediction_type=prediction_type, **options)
    for i in range(plan.num_steps):
        x, output, noise = draw(3, *SHAPE, seed=i)
        row = torch.full((3,), i)
        got, _ = reference.step(plan.coefficients64, plan.index, row, x, output, noise)
        wanted = published_ddim(SCHEDULE, plan, i, x, output, noise)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=2e-13)
    assert (plan.coefficients64[:, M.C3] != 0).any().item() == (not use_clipped)


def test_clipped_model_output_matters_where_the_clip_does():
    """Without a clip the two are one update; with it they part."""
    x, output = draw(2, *SHAPE)
    ends = {}
    for clip in CLIPS:
        for use_clipped in (True, False):
            plan = make_plan(
                SCHEDULE,
                "ddim",
                10,
                clip_denoised=clip,
                use_clipped_model_output=use_clipped,
            )
            row = torch.full((3,), 3)
            step = reference.step(plan.coefficients64, plan.index, row, x, output)
            ends[clip, use_clipped] = step[0]
    torch.testing.assert_close(ends[False, True], ends[False, False], rtol=1e-12, atol=1e-12)
    assert (ends[True, True] - ends[True, False]).abs().max() > 0.1


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_inverse_rows(prediction_type, clip):
    options = {"prediction_type": prediction_type, "clip_denoised": clip}
    plan = make_plan(SCHEDULE, "ddim_inverse", 17, **options)
    assert plan.timesteps == sorted(plan.timesteps) and plan.start.tolist() == [[1, 0]]
    for i in range(plan.num_steps):
        x, output = draw(2, *SHAPE, seed=i)
        row = torch.full((3,), i)
        got, _ = reference.step(plan.coefficients64, plan.index, row, x, output)
        wanted = published_inverse(SCHEDULE, plan, i, x, output)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=2e-13)


def test_inverse_undoes_the_sampling_step():
    """Given the same eps, each row and the sampling row of its timestep cancel."""
    back = make_plan(SCHEDULE, "ddim_inverse", 17, clip_denoised=False)
    forth = make_plan(SCHEDULE, "ddim", 17, clip_denoised=False)
    assert back.timesteps == forth.timesteps[::-1]
    x, eps = draw(2, *SHAPE)
    for i in range(17):
        up = (back.coefficients64, back.index, torch.full((3,), i))
        down = (forth.coefficients64, forth.index, torch.full((3,), 16 - i))
        there = reference.step(*up, x, eps)[0]
        torch.testing.assert_close(reference.step(*down, there, eps)[0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 17, None])
def test_dpmpp_2m_chain(steps, prediction_type, clip):
    """From x_T to the last timestep and on to x_0, in float64."""
    options = {"prediction_type": prediction_type, "clip_denoised": clip}
    plan = make_plan(SCHEDULE, "dpmpp_2m", steps, "trailing", **options)
    x, *outputs = draw(plan.num_steps + 1, *SHAPE)
    got = table_chain(plan, outputs, x)
    wanted = published_dpmpp_2m(SCHEDULE, plan.timesteps, outputs, x, prediction_type, clip)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers beside NumPy 2
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_dpmpp_2m_is_diffusers(name, steps, prediction_type):
    """Every state of DPMSolverMultistepScheduler's run, whose tables are float32.

    Its step to sigma 0 is of first order too: below 15 steps by `lower_order_final`, from there on
    by `final_sigmas_type`.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=name,
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(scheduler.config)
    options = {"prediction_type": prediction_type, "clip_denoised": False}
    plan = make_plan(schedule, "dpmpp_2m", steps, "trailing", **options)
    assert plan.timesteps == scheduler.timesteps.tolist()
    theirs = x = draw(*SHAPE)
    previous = torch.zeros_like(x)
    for i, t in enumerate(scheduler.timesteps):
        output = 0.5 * torch.tanh(x) + 0.4 * math.cos(i / 3)
        theirs = scheduler.step(output, t, theirs).prev_sample
        row = torch.full((len(x),), i)
        x, previous = reference.step(
            plan.coefficients64, plan.index, row, x, output, None, previous
        )
        # 3e-7 of the largest value, but 7e-6 from epsilon where nearly no signal is left.
        assert (theirs - x).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "method, options",
    [
        ("ddim", {"use_clipped_model_output": False}),
        ("ddim", {"use_clipped_model_output": False, "eta": 0.6}),
        ("ddim_inverse", {}),
        ("dpmpp_2m", {}),
    ],
    ids=str,
)
def test_chain_in_float32(method, options, prediction_type):
    """Fifty float32 steps of the table against the published chain in float64.

    Both are given the outputs of the float32 run, so its rounding is all that differs.
    """
    plan = make_plan(SCHEDULE, method, 50, prediction_type=prediction_type, **options)
    x_T, noise = draw(*SHAPE), draw(50, *SHAPE, seed=1)

    x, previous, outputs = x_T.float(), torch.zeros(SHAPE), []
    for i in range(50):
        outputs.append(0.5 * torch.tanh(x) + 0.4 * math.cos(i / 9))
        row = torch.full((3,), i)
        arguments = (x, outputs[-1], noise[i].float(), previous)
        x, previous = reference.step(plan.coefficients, plan.index, row, *arguments)
    wanted = x_T
    outputs = [output.double() for output in outputs]
    if method == "dpmpp_2m":
        wanted = published_dpmpp_2m(
            SCHEDULE, plan.timesteps, outputs, x_T, prediction_type, clip=True
        )
    else:
        for i in range(50):
            arguments = (SCHEDULE, plan, i, wanted, outputs[i])
            if method == "ddim":
                wanted = published_ddim(*arguments, noise[i])
            else:
                wanted = published_inverse(*arguments)
    assert x.dtype == torch.float32 and wanted.abs().max() > 0.1
    torch.testing.assert_close(x.double(), wanted, rtol=0, atol=2e-5)


def test_a_last_step_without_signal():
    schedule = NoiseSchedule([0.1, 0.2, 0.5, 1.0])
    for method in ("dpmpp_2m", "ddim_inverse"):
        plan = make_plan(schedule, method, prediction_type="v_prediction")
        assert plan.coefficients64[:, : M.MAX_LOG].isfinite().all()
    plan = make_plan(schedule, "dpmpp_2m", prediction_type="v_prediction")
    assert plan.coefficients64[1, M.C2] == 0  # the step before was infinitely long in lambda
    x_T, eps = torch.zeros(1, 1), torch.ones(1, 1)
    plan = make_plan(schedule, "ddim_inverse")
    row = torch.tensor([3])
    assert reference.step(plan.coefficients, plan.index, row, x_T, eps)[0].item() == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["dpmpp_2m", "ddim_inverse"])
def test_signal_that_ends_early_is_refused(method):
    schedule = NoiseSchedule([0.1, 1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="no signal is left"):
        make_plan(schedule, method, prediction_type="v_prediction")


def test_strength_keeps_the_last_steps():
    """diffusers' img2img: int(S * strength) steps, from q_sample at the first of them."""
    whole = make_plan(SCHEDULE, "dpmpp_2m", 20, "trailing")
    for strength, steps in ((1, 20), (0.5, 10), (0.29, 5), (0.05, 1)):
        plan = make_plan(SCHEDULE, "dpmpp_2m", 20, "trailing", strength=strength)
        assert plan.timesteps == whole.timesteps[20 - steps :]
        ac = SCHEDULE.alphas_cumprod[plan.timesteps[0]]
        assert plan.start.dtype == torch.float32
        assert plan.start.tolist() == pytest.approx(np.float32([[ac**0.5, (1 - ac) ** 0.5]]))
        # The first step has none before it, the others are those of the whole plan.
        assert plan.coefficients64[0, M.C2] == 0
        torch.testing.assert_close(
            plan.coefficients64[1:], whole.coefficients64[21 - steps :], rtol=1e-13, atol=0
        )
        assert plan.describe()["strength"] == strength
    assert whole.start is None and whole.describe()["strength"] is None
