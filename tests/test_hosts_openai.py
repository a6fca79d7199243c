"""OpenAI's diffusion object: what the original computed (fixtures/README.md), ours computes."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai_cases
import pytest
import torch
from openai_cases import BETAS, SHAPE, SPACED, TYPES, Network, draw, together
from torch import Tensor

from ddpm_fast import likelihood, ops
from ddpm_fast.hosts.openai import GaussianDiffusion, SpacedDiffusion, from_openai
from ddpm_fast.noise import randn

CASES = dict(openai_cases.cases())


def make(settings: dict[str, Any]) -> GaussianDiffusion:
    return SpacedDiffusion(**{"use_timesteps": range(len(BETAS)), "betas": BETAS} | settings)


def diffusion(**changes: Any) -> GaussianDiffusion:
    return make(TYPES | {"use_timesteps": SPACED} | changes)


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    return dict(np.load(openai_cases.FIXTURE))


@pytest.fixture
def fused_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each fused step."""
    counted, step = [], ops.p_sample_step
    monkeypatch.setattr(ops, "p_sample_step", lambda *a, **k: counted.append(1) or step(*a, **k))
    return counted


class OnTheReference(SpacedDiffusion):
    """A subclass with a p_mean_variance of its own: nothing is fused that would pass it by."""

    def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().p_mean_variance(*args, **kwargs)


def test_the_fixture_has_every_case(theirs):
    assert set(theirs) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name, theirs):
    """Within 40 roundings of float32; measured: 12. Chains have up to 24 steps.

    The end of each chain is what torch's generator draws next, so the draws are theirs, too.
    """
    got, wanted = together(CASES[name](make)), theirs[name]
    np.testing.assert_array_less(np.abs(got - wanted), 40 * 2.0**-23 * (1 + np.abs(wanted)))


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("dd") and "fn" not in n])
def test_fused_and_reference_agree(name, fused_steps):
    def on_the_reference(settings: dict[str, Any]) -> GaussianDiffusion:
        return OnTheReference(**{"use_timesteps": range(len(BETAS)), "betas": BETAS} | settings)

    fused = together(CASES[name](make))
    assert fused_steps
    fused_steps.clear()
    plain = together(CASES[name](on_the_reference))
    assert not fused_steps
    np.testing.assert_allclose(plain, fused, rtol=5e-6, atol=5e-6)


def test_gradients_go_through_a_step_outside_no_grad(fused_steps):
    x = draw(0).requires_grad_()
    out = diffusion().p_sample(Network(False), x, torch.tensor([1, 2]))
    out["sample"].sum().backward()
    assert x.grad.abs().sum() > 0 and not fused_steps


def test_other_dtypes_take_the_reference():
    x = diffusion().p_sample_loop(Network(False), SHAPE, noise=draw(0).double())
    assert x.dtype == torch.float64
    single = diffusion().p_sample_loop(Network(False), SHAPE, noise=draw(0))
    assert single.dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"method": "ddim", "eta": 0.5}], ids=str)
def test_sampler_is_the_same_chain_with_counter_noise(settings, monkeypatch):
    """The host's loop, given the noise that the sampler draws, makes the sampler's samples."""
    process, low_res = diffusion(rescale_timesteps=True), openai_cases.conditions()["low_res"]
    conditions = {"low_res": low_res, "y": torch.tensor([1, 3])}
    network = Network(False)
    sampler = process.sampler(
        network, SHAPE[1:], conditions={k: v[0] for k, v in conditions.items()}, **settings
    )
    got = sampler.sample(2, seed=11, conditions=conditions)

    steps = iter(range(1, len(SPACED) + 1))
    x_T = torch.from_numpy(randn(11, [0, 1], 0, SHAPE[1:]))
    monkeypatch.setattr(
        torch, "randn_like", lambda x: torch.from_numpy(randn(11, [0, 1], next(steps), x.shape[1:]))
    )
    loop = process.ddim_sample_loop if settings else process.p_sample_loop
    eta = {k: v for k, v in settings.items() if k == "eta"}
    assert torch.equal(got, loop(network, SHAPE, noise=x_T, model_kwargs=conditions, **eta))


class VarType(enum.Enum):
    """A host project's own enum: the members' names are what counts."""

    LEARNED_RANGE = 7


@pytest.mark.parametrize("spaced", [True, False])
def test_from_openai_reads_an_objects_attributes(spaced):
    """An object of theirs is known by its attributes; a spaced one has its own betas already."""
    wanted = diffusion(
        model_var_type="LEARNED_RANGE",
        rescale_timesteps=True,
        use_timesteps=SPACED if spaced else range(len(BETAS)),
    )
    theirs = SimpleNamespace(
        betas=wanted.betas,
        model_mean_type="EPSILON",
        model_var_type=VarType.LEARNED_RANGE,
        loss_type="MSE",
        rescale_timesteps=True,
    )
    if spaced:
        theirs.timestep_map, theirs.original_num_steps = list(SPACED), len(BETAS)
    runs = []
    for process in (wanted, from_openai(theirs)):
        torch.manual_seed(0)
        runs.append(process.p_sample_loop(Network(True), SHAPE))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


def test_progress_and_device(capsys):
    """A callable without parameters is run where its noise is, or on the CPU."""
    x = diffusion().ddim_sample_loop(lambda x, t: 0.5 * x, SHAPE, progress=True)
    assert x.device.type == "cpu" and "6/6" in capsys.readouterr().err


def test_tables_are_float64_and_writable():
    """torch.from_numpy, which code around the object calls on them, warns of read-only arrays."""
    assert diffusion().betas.dtype == np.float64 and diffusion().betas.flags.writeable


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_mean_type": "NOISE"}, "model_mean_type must be one of EPSILON"),
        ({"model_var_type": 3}, "model_var_type must be one of FIXED_SMALL"),
        ({"loss_type": "L1"}, "loss_type must be one of MSE"),
        ({"betas": [0.0, 0.1], "use_timesteps": [0]}, "beta"),
        ({"use_timesteps": [30]}, "timesteps must increase strictly within 0 to 23"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_a_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        diffusion(**changes)


def test_bad_calls_are_refused_in_a_sentence():
    network, t = Network(False), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"eta is 0, but is 0\.5"):
        diffusion().ddim_reverse_sample(network, draw(0), t, eta=0.5)
    with pytest.raises(ValueError, match="eta must be a number between 0"):
        diffusion().ddim_sample_loop(network, SHAPE, eta=2.0)
    with pytest.raises(ValueError, match=r"model_output must have the shape \(2, 6, 4, 4\)"):
        diffusion(model_var_type="LEARNED").p_mean_variance(network, draw(0), t)
    steps = diffusion().p_sample, diffusion().ddim_sample, diffusion().p_mean_variance
    for step in map(torch.no_grad(), steps):  # the fused step, and the reference
        with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4\) .* but has \(2, 6, 4, 4\)"):
            step(lambda x, t: torch.cat((x, x), 1), draw(0), t)
        for wrong in ([0, 24], [-1, 0]):
            with pytest.raises(ValueError, match="t must lie in 0 to 5, but holds"):
                step(network, draw(0), torch.tensor(wrong))
        with pytest.raises(ValueError, match="t must be int64 of shape"):
            step(network, draw(0), t.int())


@pytest.mark.parametrize("method", ["p_sample", "ddim_sample"])
def test_a_state_in_any_order_of_memory(method, fused_steps):
    """Its noise is drawn in that order, too, as theirs is: here by the reference."""
    x = draw(0).transpose(2, 3).contiguous().transpose(2, 3)
    step, found = getattr(diffusion(), method), []
    for gradients in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients):
            found.append(step(Network(False), x, torch.tensor([1, 3]))["sample"])
    assert (found[0] - found[1]).abs().max() < 1e-5 and len(fused_steps) == 1


def test_decoder_likelihoods_sum_to_one():
    """The 256 bins of equation 13 share out the whole of the approximate normal distribution."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -1.0), (-0.98, -2.0), (0.7, -4.0)):
        parameters = torch.full_like(levels, mean), torch.full_like(levels, log_scale)
        logs = likelihood.discretized_gaussian_log_likelihood(levels, *parameters)
        assert logs.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_normal_kl_known_answers():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert likelihood.normal_kl(zero, zero, zero, zero).item() == 0
    assert likelihood.normal_kl(one, zero, zero, zero).item() == pytest.approx(0.5)
    # variances 1 and e: (1 + 1/e - 1) / 2
    assert likelihood.normal_kl(zero, zero, zero, one).item() == pytest.approx(0.5 / np.e)
