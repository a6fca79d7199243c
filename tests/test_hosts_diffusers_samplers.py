"""The samplers under diffusers' accelerated pipelines: which runs they serve, and how."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from recording import Recording

diffusers = pytest.importorskip("diffusers")
# ruff: noqa: E402, what needs diffusers comes after the look whether it is there

from diffusers_cases import STEPS, ddim, ddpm, draw, same

from ddpm_fast import sampler as samplers
from ddpm_fast.fused_cuda import GpuLayers
from ddpm_fast.hosts import diffusers as ours
from ddpm_fast.hosts.diffusers import pipelines
from ddpm_fast.inference import FusedUNet
from ddpm_fast.sampler import Sampler


@pytest.fixture
def made(monkeypatch):
    """The samplers that pipelines have made."""
    found = []

    class Kept(Sampler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(pipelines, "Sampler", Kept)
    return found


def test_a_change_of_dtype_is_seen(made):
    pipe = ours.accelerate(ddpm())
    draw(pipe)
    pipe.to(torch.bfloat16)
    want = draw(ours.accelerate(ddpm().to(torch.bfloat16)))
    assert np.array_equal(draw(pipe)[0], want[0])
    assert [one.dtype for one in made] == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_counter_noise_does_not_know_the_batch(made):
    pipe = ours.accelerate(ddpm(), noise="counter")
    five, after = draw(pipe, batch_size=5)
    two, also_after = draw(pipe, batch_size=2)
    assert np.abs(five[:2] - two).max() < 1e-5 and after == also_after and len(made) == 1
    # A generator that goes on gives other pictures: its draw is the seed.
    generator = torch.Generator().manual_seed(3)
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator.clone_state()))
    pipe.set_progress_bar_config(disable=True)
    for number in range(2):
        images = pipe(batch_size=2, generator=generator, output_type="np", **STEPS).images
        assert np.array_equal(images, two) == (number == 0)
    x = made[0].sample(2, seed=seed)
    want = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(want, two)
    torch.manual_seed(0)
    assert not np.array_equal(*(pipe(output_type="np", **STEPS).images for _ in range(2)))
    with pytest.raises(ValueError, match="takes one generator"):
        draw(pipe, seed=[1, 2, 3])


def test_a_sampler_serves_the_next_run_of_the_same_steps(made):
    pipe = ours.accelerate(ddim())
    for settings in ({}, {"seed": 4}, {"eta": 0.5}, {"eta": 0.5, "batch_size": 2}):
        draw(pipe, **settings)
    assert len(made) == 2 and isinstance(made[0].network, FusedUNet)
    assert made[0].memory_held == 0 < made[1].memory_held  # the first one was released


@pytest.mark.parametrize("noise", pipelines.NOISES)
@pytest.mark.parametrize("make", [ddpm, ddim])
def test_the_loop_under_a_pipeline_is_captured(make, noise, monkeypatch):
    """On a stand-in for CUDA graphs: one capture, replayed for each step of each run."""
    executor = Recording()
    monkeypatch.setattr(samplers, "make_executor", lambda *_: (executor, ""))
    monkeypatch.setattr("ddpm_fast.unet.check_inputs", lambda *_: None)  # which look at labels
    pipe = make()
    settings = {"eta": 0.6} if make is ddim else {}
    want = [draw(pipe, seed=s, **settings) for s in (3, 4)]

    def for_a_gpu(unet, device, dtype, backend):
        return FusedUNet(unet, GpuLayers(device, dtype, "reference"))

    monkeypatch.setattr(pipelines, "prepare", for_a_gpu)
    ours.accelerate(pipe, noise=noise)
    got = [draw(pipe, seed=s, **settings) for s in (3, 4)]
    assert executor.log.count(("capture", 1)) == 1 and executor.count("replay") == 14
    for a, b in zip(want, got, strict=True):
        if noise == "pipeline":
            same(a, b)
    assert not np.array_equal(got[0][0], got[1][0])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_copies_are_accelerated_too(copied, made):
    pipe = ours.accelerate(ddpm())
    want = draw(pipe)
    other = copied(pipe)
    same(draw(other), want)
    assert len(made) == 2 and isinstance(made[1].network, FusedUNet)
    with torch.no_grad():
        other.unet.conv_out.bias += 0.5
    assert np.abs(draw(ours.accelerate(other))[0] - want[0]).max() > 0.01
    same(draw(pipe), want)
