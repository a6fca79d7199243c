"""diffusers' schedulers on the fused step: the same numbers from the same generator."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from scheduler_cases import SHAPE, generator, pair, same_chains

from ddpm_fast.hosts import diffusers as ours

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
SPACINGS = ("leading", "trailing", "linspace")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_is_diffusers(prediction, variance, spacing, fused_steps):
    config = {"prediction_type": prediction, "variance_type": variance, "timestep_spacing": spacing}
    for steps in (1, 30):
        theirs, mine = pair("DDPMScheduler", **config)
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(steps)
        assert torch.equal(mine.timesteps, theirs.timesteps)
        same_chains(theirs, mine)
    assert len(fused_steps) == 31


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_diffusers(prediction, spacing, eta, clipped, fused_steps):
    """Also with 30 steps of linspace, where diffusers' step does not lead to the next timestep."""
    theirs, mine = pair("DDIMScheduler", prediction_type=prediction, timestep_spacing=spacing)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(30)
    same_chains(theirs, mine, eta=eta, use_clipped_model_output=clipped)
    assert len(fused_steps) == 30


OTHERS = {
    "a cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "its own betas": {"trained_betas": [0.01] * 400 + [0.02] * 100, "num_train_timesteps": 500},
    "another clip": {"clip_sample_range": 0.6},
    "no clip": {"clip_sample": False},
    "an offset": {"steps_offset": 1},
    "no signal at the end": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
}
ONE_KIND = {
    "DDPMScheduler": {
        "a sigmoid": {"beta_schedule": "sigmoid"},
        # Their last step then adds noise.
        "an offset, large": {"steps_offset": 1, "variance_type": "fixed_large"},
        "an offset, learned": {"steps_offset": 3, "variance_type": "learned_range"},
    },
    "DDIMScheduler": {
        "no alpha of 1": {"set_alpha_to_one": False},
        "no alpha of 1, an offset": {"set_alpha_to_one": False, "steps_offset": 1},
    },
}


@pytest.mark.parametrize(
    "kind,config",
    [
        pytest.param(kind, config, id=f"{kind}, {name}")
        for kind, more in ONE_KIND.items()
        for name, config in (OTHERS | more).items()
    ],
)
def test_every_field_of_a_configuration_counts(kind, config, fused_steps):
    theirs, mine = pair(kind, **config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(20)
    same_chains(theirs, mine, **({"eta": 0.5} if kind == "DDIMScheduler" else {}))
    assert len(fused_steps) == 20


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_all_thousand_steps(kind, beta_schedule, fused_steps):
    """The smallest betas are where diffusers' float32 is worst: 3e-4 of a beta of 1e-4."""
    theirs, mine = pair(kind, beta_schedule=beta_schedule)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(1000)
    same_chains(theirs, mine)
    assert len(fused_steps) == 1000
    x, output = torch.randn(2, *SHAPE, generator=generator())
    for t in range(1000):
        draws = [s.step(output, t, x, generator=generator(t)) for s in (theirs, mine)]
        assert (draws[0].prev_sample - draws[1].prev_sample).abs().max() < 2e-6
        a, b = (d.pred_original_sample for d in draws)
        assert (a - b).abs().max() < 1e-4  # before the clip it is up to 157 times as large


def test_ddpm_at_timesteps_of_ones_own_and_at_none(fused_steps):
    theirs, mine = pair("DDPMScheduler", variance_type="fixed_large")
    same_chains(theirs, mine)  # all of them
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(timesteps=[900, 500, 499, 20, 3])
    same_chains(theirs, mine)
    assert len(fused_steps) == 1005


def test_generators_noise_and_tuples():
    theirs, mine = pair("DDIMScheduler")
    x, output, noise = torch.randn(3, *SHAPE, generator=generator())
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    for settings in (
        lambda: {"eta": 1.0, "generator": [generator(1), generator(2)]},
        lambda: {"eta": 0.4, "variance_noise": noise},
        lambda: {"eta": 0.0, "variance_noise": noise, "generator": generator()},
    ):
        want, got = (
            s.step(output, 500, x, **settings(), return_dict=False) for s in (theirs, mine)
        )
        assert isinstance(got, tuple)
        for a, b in zip(want, got, strict=True):
            assert (a - b).abs().max() < 1e-5
    draws = []
    for scheduler in (theirs, mine):
        torch.manual_seed(8)  # no generator: torch's own
        draws.append(scheduler.step(output, torch.tensor(100), x, eta=1.0).prev_sample)
    assert (draws[0] - draws[1]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="both generator and variance_noise"):
        mine.step(output, 500, x, eta=0.5, variance_noise=noise, generator=generator())
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.DDIMScheduler().step(output, 500, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, fused_steps):
    theirs, mine = pair("DDPMScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(50)
    x, output = torch.randn(2, *SHAPE, generator=generator()).to(dtype)
    got = mine.step(output, 500, x, generator=generator())
    want = mine.step(output.float(), 500, x.float(), generator=None)
    assert (
        got.prev_sample.dtype == got.pred_original_sample.dtype == dtype and len(fused_steps) == 2
    )
    assert torch.equal(got.pred_original_sample, want.pred_original_sample.to(dtype))
    # The draws are those of the dtype, as diffusers' are.
    low = theirs.step(output, 500, x, generator=generator()).prev_sample
    assert (got.prev_sample - low).abs().max() < 4 * torch.finfo(dtype).eps * low.abs().max()


LEFT = {
    "thresholding": {"thresholding": True},
    "the variance itself": {"variance_type": "learned"},
    "float64": {"dtype": torch.float64},
    "gradients": {"requires_grad": True},
    "a timestep past its end": {"t": -1},
}


@pytest.mark.parametrize("case", LEFT.values(), ids=LEFT)
def test_what_the_fused_step_has_not_is_diffusers_own(case, fused_steps):
    case = {"dtype": torch.float32, "requires_grad": False, "t": 400} | case
    t, like = case.pop("t"), {k: case.pop(k) for k in ("dtype", "requires_grad")}
    theirs, mine = pair("DDPMScheduler", **case)
    for scheduler in (theirs, mine) if t > 0 else ():
        scheduler.set_timesteps(10)
    x, output = torch.rand(2, *SHAPE, generator=generator())
    if case.get("variance_type"):
        output = torch.cat((output, output), 1)
    x, output = x.to(like["dtype"]), output.to(like["dtype"]).requires_grad_(like["requires_grad"])
    want, got = (s.step(output, t, x, generator=generator()).prev_sample for s in (theirs, mine))
    assert torch.equal(want, got) and got.requires_grad == like["requires_grad"] and not fused_steps


def transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


SHAPES = {
    "another order of memory": (transposed, transposed, 1),
    "a broadcast": (lambda x: x[:1], lambda x: x, 0),
    "a view that repeats": (lambda x: x[:1].expand(3, -1, -1, -1), lambda x: x[:3], 1),
    "no batch": (lambda x: x[0], lambda x: x[0], 1),
}


@pytest.mark.parametrize("state,prediction,steps", SHAPES.values(), ids=SHAPES)
def test_states_of_any_shape_and_order(state, prediction, steps, fused_steps):
    both = pair("DDPMScheduler")
    x, output = torch.randn(2, 3, 2, 4, 5, generator=generator())
    x, output = state(x), prediction(output)
    want, got = (s.step(output, 400, x, generator=generator()) for s in both)
    assert got.prev_sample.shape == want.prev_sample.shape and len(fused_steps) == steps
    assert (got.prev_sample - want.prev_sample).abs().max() < 2e-6


def test_what_is_nan_in_diffusers_is_what_its_name_says():
    _, named = pair("DDPMScheduler", variance_type="fixed_large_log")
    meant, _ = pair("DDPMScheduler", variance_type="fixed_large")
    for scheduler in (named, meant):
        scheduler.set_timesteps(20)
    same_chains(meant, named)


def test_no_signal_and_epsilon_is_left_to_diffusers(fused_steps):
    """A division by zero there; here the fused step has no such row."""
    theirs, mine = pair("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    x, output = torch.randn(2, *SHAPE, generator=generator())
    want, got = (s.step(output, 999, x).prev_sample for s in (theirs, mine))
    assert torch.equal(want, got) and not fused_steps
