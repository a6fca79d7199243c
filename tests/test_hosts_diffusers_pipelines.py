"""diffusers' pipelines accelerated: the same pictures of the same seeds, the same interface."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
# ruff: noqa: E402, what needs diffusers comes after the look whether it is there

from diffusers_cases import NETWORK, STEPS, ddim, ddpm, draw, network, same

from ddpm_fast.backend import BackendError
from ddpm_fast.hosts import diffusers as ours

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


CALLS = {
    "DDPM": (ddpm, {}),
    "a generator each": (ddpm, {"seed": [4, 5, 6]}),
    "one image": (ddpm, {"batch_size": 1}),
    "DDIM": (ddim, {}),
    "DDIM with noise": (ddim, {"eta": 0.7}),
    "DDIM, clipped": (ddim, {"eta": 0.7, "use_clipped_model_output": True}),
}


@pytest.mark.parametrize("make,settings", CALLS.values(), ids=CALLS)
def test_seeds_keep_their_pictures(make, settings):
    """In one pipeline twice: the second run's buffers are the first's."""
    pipe = make()
    want = draw(pipe, **settings), draw(pipe, **{"seed": 9} | settings)
    assert ours.accelerate(pipe) is pipe
    got = draw(pipe, **settings), draw(pipe, **{"seed": 9} | settings)
    for a, b in zip(want, got, strict=True):
        same(a, b)


def test_what_a_call_returns():
    pipe = ours.accelerate(ddpm())
    assert isinstance(pipe, diffusers.DDPMPipeline)
    images, _ = draw(pipe, output_type="pil")
    assert [i.size for i in images] == [(8, 8)] * 3
    arrays, _ = draw(pipe)
    want = (arrays[..., 0] * 255).round().astype(np.uint8)
    assert (np.stack([np.asarray(i) for i in images]) == want).all()
    tensor, _ = draw(pipe, output_type="pt")
    assert tensor.shape == (3, 1, 8, 8) and tensor.min() >= 0 and tensor.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), arrays)
    assert isinstance(pipe(return_dict=False, **STEPS), tuple)


def test_no_generator_is_torch_s_own():
    pipe, pictures = ddpm(), []
    for _ in range(2):
        torch.manual_seed(11)
        pictures.append(pipe(output_type="np", **STEPS).images)
        ours.accelerate(pipe)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4


def test_the_progress_bar_counts_the_steps(capsys):
    pipe = ours.accelerate(ddpm())
    pipe.set_progress_bar_config(mininterval=0)
    pipe(**STEPS)
    assert "7/7" in capsys.readouterr().err


def test_the_scheduler_is_read_at_each_call():
    """It can be replaced, also by the other one or by ours."""
    pipe = ddpm()
    fast = ours.accelerate(copy.copy(pipe))
    for cls in (diffusers.DDIMScheduler, ours.DDPMScheduler):
        pipe.scheduler = cls.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        fast.scheduler = cls.from_config(pipe.scheduler.config)
        same(draw(pipe), draw(fast))


def test_another_network_is_taken_and_so_are_changed_weights_when_told():
    pipe = ddpm()
    fast = ours.accelerate(copy.copy(pipe))
    before = draw(fast)
    pipe.unet = fast.unet = network(norm_eps=1e-2)
    same(draw(pipe), draw(fast))
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.5
    same(draw(pipe), draw(ours.accelerate(fast)))
    assert np.abs(draw(fast)[0] - before[0]).max() > 0.01


def test_pipelines_that_diffusers_makes_of_ours(tmp_path):
    """By their class they are accelerated, with the defaults."""
    pipe = ours.accelerate(ddpm())
    want = draw(pipe)
    pipe.save_pretrained(tmp_path)
    for made in (type(pipe).from_pretrained(tmp_path), type(pipe).from_pipe(pipe)):
        same(draw(made), want)
        assert type(made) is ours.DDPMPipeline and made._accelerated is not pipe._accelerated


def test_what_is_saved_is_the_pipeline(tmp_path):
    pipe = ddpm()
    want = draw(pipe)
    ours.accelerate(pipe).save_pretrained(tmp_path / "accelerated")
    same(draw(diffusers.DDPMPipeline.from_pretrained(tmp_path / "accelerated")), want)
    index = (tmp_path / "accelerated" / "model_index.json").read_text()
    assert "ddpm_fast" not in index
    pipe.scheduler = ours.DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "ours")
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert type(loaded.scheduler) is ours.DDPMScheduler
    same(draw(loaded), want)
    given = ours.DDPMScheduler.from_pretrained(tmp_path / "accelerated", subfolder="scheduler")
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "accelerated", scheduler=given)
    assert loaded.scheduler is given
    same(draw(loaded), want)


class Doubled(diffusers.UNet2DModel):
    """A user's own: the configuration does not tell what it computes."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.sample *= 0.5
        return output


def with_more() -> torch.nn.Module:
    unet = network()
    unet.conv_in.register_buffer("scale", torch.ones(1))
    return unet


AS_THEY_ARE = {
    "a layer of another kind": (lambda: network(act_fn="gelu"), "act_fn='gelu'"),
    "a class of its own": (lambda: Doubled(**NETWORK).eval(), "it is a Doubled"),
    "weights of its own": (with_more, "conv_in.scale"),
}


@pytest.mark.parametrize("make,reason", AS_THEY_ARE.values(), ids=AS_THEY_ARE)
def test_a_network_that_ours_is_not_runs_as_it_is(make, reason):
    pipe = diffusers.DDPMPipeline(make(), diffusers.DDPMScheduler())
    want = draw(pipe)
    with pytest.warns(UserWarning, match=f"takes the pipeline's U-Net as it is: .*{reason}"):
        ours.accelerate(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(draw(pipe), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_of_the_network(dtype):
    """The state stays float32, and so does what comes out."""
    pipe = ddpm()
    want, want_next = draw(pipe)
    got, got_next = draw(ours.accelerate(pipe, dtype=dtype))
    assert got_next == want_next and got.dtype == np.float32
    assert 0 < np.abs(got - want).max() < 0.1


def test_what_is_no_such_pipeline():
    class Mine(diffusers.DDPMPipeline):
        pass

    with pytest.raises(ValueError, match="pipe must be a DDPMPipeline or a DDIMPipeline"):
        ours.accelerate(Mine(network(), diffusers.DDPMScheduler()))
    pipe = ddpm()
    for config, match in (
        ({"thresholding": True}, "thresholding=True"),
        ({"variance_type": "learned"}, "variance_type must be one of"),
        ({"prediction_type": "flow"}, "prediction_type must be one of"),
    ):
        pipe.scheduler = diffusers.DDPMScheduler(**config)
        with pytest.raises(ValueError, match=match):
            ours.accelerate(pipe)
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="must be a DDPMScheduler or a DDIMScheduler"):
        ours.accelerate(pipe)
    pipe.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match="noise must be one of pipeline, counter"):
        ours.accelerate(pipe, noise="torch")
    with pytest.raises(ValueError, match="graphs must be True, False or"):
        ours.accelerate(pipe, graphs="maybe")
    with pytest.raises(BackendError, match="the backend must be one of auto, cpu"):
        ours.accelerate(pipe, backend="fast")
    for dtype in (torch.int8, torch.float64, "bfloat16"):
        with pytest.raises(ValueError, match="must run in float32, bfloat16 or float16, but"):
            ours.accelerate(pipe, dtype=dtype)
    with pytest.raises(ValueError, match=r"but torch\.float64 was asked for"):
        draw(ours.accelerate(ddpm()).to(torch.float64))
    assert type(pipe) is diffusers.DDPMPipeline
    with pytest.raises(ValueError, match="one for each of the 3 samples, but it has 2"):
        draw(ours.accelerate(pipe), seed=[1, 2])
    with pytest.raises(ValueError, match="eta must be a number between 0"):
        draw(ours.accelerate(ddim()), eta=1.5)
    spaced = diffusers.DDPMScheduler(timestep_spacing="linspace")
    with pytest.raises(ValueError, match=r"timesteps must be some of 0 to 999, but are \[\]"):
        draw(ours.accelerate(diffusers.DDPMPipeline(network(), spaced)), num_inference_steps=0)


def test_without_diffusers_there_is_one_sentence():
    code = "import sys; sys.modules['diffusers'] = None; import ddpm_fast.hosts.diffusers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: ddpm_fast.hosts.diffusers needs diffusers: pip install 'ddpm_fast[diffusers]'"
    )


def test_the_example_keeps_the_digits(capsys):
    import diffusers_pipelines

    assert max(diffusers_pipelines.main(num_images=2, steps=12)) <= 1
    assert "largest difference in grey levels" in capsys.readouterr().out
