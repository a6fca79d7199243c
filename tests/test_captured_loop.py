"""The captured loop against the eager one, bit for bit; only with a GPU.

What controls it is tested without one in test_loops.py.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from loop_cases import METHODS, Network, reading
from sampling import run
from step_cases import difference
from test_cuda import needs

from ddpm_fast.executor import ONE_LAUNCH, WHOLE, CaptureError
from ddpm_fast.graphs import while_loop_obstacle
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

pytestmark = needs("cuda")

RUN = {"batch_size": 4, "classes": [2, 0, 1]}
FORMS = [
    1,
    3,
    pytest.param(
        WHOLE, marks=pytest.mark.skipif(bool(while_loop_obstacle()), reason=while_loop_obstacle())
    ),
]


@pytest.fixture
def captures(monkeypatch):
    """The CUDA graphs made in the test."""
    made, graph = [], torch.cuda.CUDAGraph

    class Counted(graph):
        def __new__(cls, *args, **kwargs):
            made.append(super().__new__(cls, *args, **kwargs))
            return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    return made


def make(class_model, **settings):
    settings = {"device": "cuda", "backend": "cuda", "graphs": True, "steps": 20} | settings
    sampler = Sampler.from_model(class_model, **settings)
    assert sampler.graphs == bool(settings["graphs"])
    return sampler


def check_captured(class_model, captures, **settings):
    """The captured loop comes first, so that the eager one prepares nothing for it."""
    runs = []
    samplers = [make(class_model, graphs=graphs, **settings) for graphs in (True, False)]
    for sampler in samplers:
        runs.append(
            [
                sampler.sample(7, seed=seed, start=start, **RUN)
                for seed, start in ((0, 0), (2**63 + 5, 1000))
            ]
        )
    for captured, eager in zip(*runs, strict=True):
        assert eager.isfinite().all()
        assert not difference(captured, eager)
    assert not torch.equal(*runs[0])
    why = samplers[0].loops.executor.loop_obstacle
    assert len(captures) == (2 if settings.get("steps_per_graph") == 3 else 1), why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 20])
def test_captured_loop_equals_the_eager_one(class_model, captures, steps, guidance, dtype):
    check_captured(class_model, captures, steps=steps, guidance_scale=guidance, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_for_every_method_and_form(class_model, captures, settings, form):
    check_captured(class_model, captures, steps_per_graph=form, **settings)


@needs("triton")
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_with_triton_kernels(class_model, captures, settings):
    check_captured(class_model, captures, backend="triton", **settings)


@pytest.mark.skipif(bool(while_loop_obstacle()), reason=while_loop_obstacle())
def test_the_loop_is_one_launch(class_model):
    sampler = make(class_model, steps_per_graph=WHOLE)
    sampler.sample(4, **RUN)
    assert sampler.loops.forms == [ONE_LAUNCH], sampler.loops.executor.loop_obstacle


def test_replays_repeat_and_differ_as_their_seeds_do(class_model, captures):
    sampler = make(class_model)
    first = sampler.sample(4, **RUN)
    for size in (1, 2, 9):  # other shapes in between
        sampler.sample(size, seed=8, batch_size=size, classes=[1])
    assert not difference(sampler.sample(4, **RUN), first)
    assert not torch.equal(sampler.sample(4, seed=1, **RUN), first)
    shifted = sampler.sample(4, start=1, **RUN)
    assert not difference(shifted[:3], first[1:])
    assert not torch.equal(shifted[3], first[3])
    assert not torch.equal(sampler.sample(4, batch_size=4, classes=[1]), first)
    assert len(captures) == 4


def test_the_guidance_scale_may_change(class_model, captures):
    sampler, eager = (make(class_model, graphs=g, guidance_scale=3.0) for g in (True, False))
    sampler.sample(4, **RUN)
    sampler.guidance_scale = eager.guidance_scale = 0.5
    assert not difference(sampler.sample(4, **RUN), eager.sample(4, **RUN))
    assert len(captures) == 1


def test_conditions_and_noise_of_ones_own(captures):
    """New values of both in the same capture."""
    masks, drawn = torch.rand(2, 5, 1, 4, 4), torch.randn(2, 20, 5, 1, 4, 4)
    runs = []
    for graphs in (True, False):
        sampler = Sampler(
            lambda x, t, mask: 0.1 * x * mask,
            NoiseSchedule.linear(20),
            (1, 4, 4),
            device="cuda",
            backend="cuda",
            graphs=graphs,
            conditions={"mask": torch.ones(1, 4, 4)},
        )
        for mask, noise in zip(masks, drawn, strict=True):
            settings = {"batch_size": 2, "conditions": {"mask": mask}}
            runs.append(sampler.sample(5, **settings))
            runs.append(sampler.sample(5, **settings, noise=lambda i, k, z=noise: z[k - 1][i]))
    for captured, eager in zip(runs[:4], runs[4:], strict=True):
        assert not difference(captured, eager)
    assert not torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])
    assert len(captures) == 2  # with noise that is given, and without


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [1, 3, 100])
def test_callbacks_see_the_eager_states(class_model, every, form):
    runs = []
    for graphs in (True, False):
        seen = []

        def callback(index, done, x, seen=seen):
            seen.append((index.tolist(), done, x.clone()))

        sampler = make(class_model, graphs=graphs, steps_per_graph=form)
        sampler.sample(6, **RUN, callback=callback, callback_every=every)
        runs.append(seen)
    for captured, eager in zip(*runs, strict=True):
        assert captured[:2] == eager[:2]
        assert not difference(captured[2], eager[2])


def test_under_autocast(class_model):
    """The casts are in the graph: nothing of the cache that ends with the context."""
    model_input = {"device": "cuda", "backend": "cuda", "steps": 20}
    unet = class_model.unet.__class__(class_model.config).cuda().eval()
    settings = (unet, class_model.schedule, class_model.config.sample_shape)
    runs = []
    for graphs in (True, False):
        sampler = Sampler(*settings, **model_input, graphs=graphs)
        with torch.autocast("cuda", torch.bfloat16):
            runs.append(sampler.sample(4, batch_size=4))
        torch.cuda.empty_cache()
        with torch.autocast("cuda", torch.bfloat16):
            runs.append(sampler.sample(4, batch_size=4))
    assert not [bad for run in runs if (bad := difference(run, runs[0]))]


@pytest.mark.parametrize("graphs", [False, True])
def test_values_that_are_not_finite_are_named(graphs):
    third = torch.arange(4, device="cuda").view(-1, 1, 1, 1) == 2
    sampler = Sampler(
        lambda x, t: x.masked_fill((t.view(-1, 1, 1, 1) < 30) & third, torch.nan),
        NoiseSchedule.linear(50),
        (1, 4, 4),
        device="cuda",
        backend="cuda",
        graphs=graphs,
    )
    with pytest.raises(RuntimeError, match="sample 7 has a value that is not finite after step 21"):
        sampler.sample(4, start=5, batch_size=4)


def small(x, t):
    return 0.1 * x


def foreign(network, graphs):
    settings = {"device": "cuda", "backend": "cuda", "graphs": graphs}
    return Sampler(network, NoiseSchedule.linear(20), (1, 2, 2), **settings)


@pytest.mark.parametrize(
    "network, name", [(Network(), r"module blocks\.1 \(Reads\)"), (reading, r"x\.mean\(\)")]
)
def test_what_cannot_be_captured_is_named(network, name):
    before, good = torch.cuda.current_stream(), foreign(small, True)
    want = good.sample(4)
    sampler = foreign(network, True)
    for _ in range(2):  # the second time as the first
        with pytest.raises(CaptureError, match=name):
            sampler.sample(1)
    assert torch.cuda.current_stream() == before
    # Neither torch's generator nor its allocators take the process for one that captures.
    assert torch.randn(3, device="cuda").isfinite().all()
    assert torch.empty(3, pin_memory=True).is_pinned()
    torch.cuda.empty_cache()
    assert not difference(good.sample(4), want)
    assert not difference(foreign(small, True).sample(4), want)


def test_auto_falls_back_with_one_warning():
    sampler = foreign(reading, "auto")
    with pytest.warns(UserWarning, match="step by step"):
        got = sampler.sample(3, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not difference(sampler.sample(3, batch_size=2), got)
    assert not sampler.graphs
    assert not difference(foreign(reading, False).sample(3, batch_size=2), got)


def test_the_reference_cannot_be_captured(class_model):
    with pytest.raises(ValueError, match="reference draws its noise on the host"):
        Sampler.from_model(class_model, device="cuda", backend="reference", graphs=True)


def test_the_command(class_model_file, tmp_path, capsys):
    """--graphs draws the same pictures, and says that it was captured."""
    common = ["--model", class_model_file, "--device", "cuda", "--backend", "cuda", "--gif"]
    common += ["--num-samples", 5, "--batch-size", 2, "--steps", 20, "--class", "0,1"]
    pictures = []
    for graphs in (["--graphs"], []):
        out = tmp_path / ("captured" if graphs else "eager")
        status, said, errors = run(capsys, *common, *graphs, "--guidance", 2, "--out", out)
        assert status == 0, errors
        assert ("captured, a step a launch: " in said) == bool(graphs), said
        record = json.loads((out / "run.json").read_text())
        assert record["environment"]["graphs"] == bool(graphs)
        pictures.append([path.read_bytes() for path in sorted(out.rglob("*.png"))])
    assert len(pictures[0]) == 5 + 1 and pictures[0] == pictures[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
def test_the_second_gpu(class_model, captures):
    """The sampler's device counts, not the current one."""
    check_captured(class_model, captures, device="cuda:1", guidance_scale=3.0)
    assert torch.cuda.current_device() == 0
