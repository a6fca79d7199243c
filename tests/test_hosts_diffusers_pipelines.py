"""diffusers' pipelines accelerated: the same pictures of the same seeds, the same interface."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import Recording

diffusers = pytest.importorskip("diffusers")
# ruff: noqa: E402, what needs diffusers comes after the look whether it is there

from ddpm_fast import sampler as samplers
from ddpm_fast.backend import BackendError
from ddpm_fast.hosts import diffusers as ours
from ddpm_fast.hosts.diffusers import pipelines
from ddpm_fast.inference import FusedUNet
from ddpm_fast.sampler import Sampler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
STEPS = {"num_inference_steps": 7}


def network(**config) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**(NETWORK | config)).eval()


def ddpm(**config):
    return diffusers.DDPMPipeline(network(**config), diffusers.DDPMScheduler())


def ddim():
    return diffusers.DDIMPipeline(network(), diffusers.DDIMScheduler())


def draw(pipe, seed: int | list[int] = 3, **settings):
    """Images, (N, H, W, C) or what output_type says, and what the generators draw next."""
    pipe.set_progress_bar_config(disable=True)
    made = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
    settings = {"batch_size": 3, "output_type": "np"} | STEPS | settings
    images = pipe(generator=made if isinstance(seed, list) else made[0], **settings).images
    return images, [torch.rand(1, generator=g).item() for g in made]


def same(one, other) -> None:
    """Within 1e-4 of the range of 1, which is 0.03 grey levels."""
    (a, a_next), (b, b_next) = one, other
    assert np.abs(a - b).max() < 1e-4 and a_next == b_next


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


def test_a_change_of_dtype_is_seen(made):
    pipe = ours.accelerate(ddpm())
    draw(pipe)
    pipe.to(torch.bfloat16)
    want = draw(ours.accelerate(ddpm().to(torch.bfloat16)))
    assert np.array_equal(draw(pipe)[0], want[0])
    assert [one.dtype for one in made] == [torch.float32, torch.bfloat16, torch.bfloat16]


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
    monkeypatch.setattr(pipelines, "prepare", lambda unet, device, dtype: unet)  # as on CUDA
    ours.accelerate(pipe, noise=noise)
    got = [draw(pipe, seed=s, **settings) for s in (3, 4)]
    assert executor.log.count(("capture", 1)) == 1 and executor.count("replay") == 14
    for a, b in zip(want, got, strict=True):
        if noise == "pipeline":
            same(a, b)
    assert not np.array_equal(got[0][0], got[1][0])


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
