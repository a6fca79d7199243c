"""diffusers' schedulers on the fused step, as objects: files, copies, changes between two steps."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

from scheduler_cases import SHAPE, generator, pair, same_chains

from ddpm_fast.hosts import diffusers as ours


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_configurations_and_files_are_diffusers_own(kind, tmp_path):
    values = {
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    theirs, mine = pair(kind, **values)
    assert isinstance(mine, type(theirs)) and dict(mine.config) == dict(theirs.config)
    mine.save_pretrained(tmp_path)
    for cls in (type(mine), type(theirs)):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls and loaded.config.beta_schedule == "scaled_linear"
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == kind
    other = "DDIMScheduler" if kind == "DDPMScheduler" else "DDPMScheduler"
    assert getattr(ours, other).from_config(mine.config).config.timestep_spacing == "trailing"
    assert type(theirs) in mine.compatibles and len(mine) == 1000 and mine.order == 1
    x, noise = torch.randn(2, *SHAPE, generator=generator())
    t = torch.tensor([3, 900])
    assert torch.equal(mine.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    assert torch.equal(mine.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t))
    assert mine.scale_model_input(x, 3) is x and mine.init_noise_sigma == 1.0


CHANGES = {
    "other timesteps": lambda s: setattr(s, "timesteps", s.timesteps[::2].clone()),
    "timesteps written in place": lambda s: s.timesteps[1:-1].sub_(7),
    "another schedule": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2),
    "a schedule written in place": lambda s: s.alphas_cumprod.pow_(2),
    "another configuration": lambda s: s.register_to_config(clip_sample=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_steps_is_seen(change, fused_steps):
    both = pair("DDPMScheduler")
    x, output = 3 * torch.randn(2, *SHAPE, generator=generator())
    for scheduler in both:
        scheduler.set_timesteps(10)
        scheduler.step(output, 900, x)
        change(scheduler)
    t = int(both[0].timesteps[1])
    want, got = (s.step(output, t, x, generator=generator()).prev_sample for s in both)
    assert (got - want).abs().max() < 1e-5 and len(fused_steps) == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_copies_in_use(copied, fused_steps):
    theirs, mine = pair("DDIMScheduler")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    same_chains(theirs, mine)
    same_chains(theirs, copied(mine))
    assert len(fused_steps) == 20


def test_set_timesteps_makes_other_steps():
    """A scheduler that serves several runs keeps no step of the one before."""
    theirs, mine = pair("DDIMScheduler")
    for steps in (10, 20, 10):
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(steps)
        same_chains(theirs, mine)
