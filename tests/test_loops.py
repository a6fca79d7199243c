"""What controls a captured loop, on a recording stand-in: buffers, captures, buckets, callbacks."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from loop_cases import METHODS, Network, reading
from recording import RecordingLoop, recorded, storages, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.executor import ONE_LAUNCH, CaptureError
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule


@pytest.fixture(autouse=True)
def labels_are_not_read(monkeypatch):
    """As on CUDA: on a CPU the U-Net looks at its labels."""
    monkeypatch.setattr("ddpm_fast.unet.check_inputs", lambda *_: None)


RUN = {"seed": 3, "classes": [2, 0, 1]}


def make(model, **settings):
    """As on CUDA, where the network is not the CPU's fused one."""
    settings = {"steps": 7, "backend": "cpu", "fused": False} | settings
    return Sampler.from_model(model, **settings)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_replays_equal_the_eager_loop(class_model, settings):
    """One capture serves other seeds, indices and labels, a padded batch and another scale."""
    eager, sampler = (make(class_model, **settings) for _ in range(2))
    executor = recorded(sampler)
    runs = [{"num_samples": 6, "start": 5}, {"num_samples": 3, "seed": 2**63 + 1, "classes": [1]}]
    for run in runs * 2:
        run = {"batch_size": 4} | RUN | run
        assert torch.equal(sampler.sample(**run), eager.sample(**run))
    assert executor.log.count(("capture", 1)) == 1
    assert executor.count("replay") == 7 * (2 + 1) * 2
    if sampler.guided:
        before = sampler.sample(2, batch_size=4, **RUN)
        for one in (sampler, eager):
            one.guidance_scale = 0.5
        after = sampler.sample(2, batch_size=4, **RUN)
        assert torch.equal(after, eager.sample(2, batch_size=4, **RUN))
        assert not torch.equal(before, after) and executor.count("capture") == 1


@pytest.mark.parametrize("per_graph", [1, 2, 3, 7, 50, "all"])
@pytest.mark.parametrize("steps", [1, 6, 7, 8])
def test_graphs_of_several_steps_add_up(class_model, steps, per_graph):
    sampler = make(class_model, steps=steps, steps_per_graph=per_graph)
    executor = recorded(sampler)
    got = sampler.sample(2, **RUN)
    assert torch.equal(got, make(class_model, steps=steps).sample(2, **RUN))
    count = min(per_graph, steps) if per_graph != "all" else 1  # the stand-in has no loops
    assert executor.log.count(("replay", count)) == steps // count
    assert sum(n for what, n in executor.log if what == "replay") == steps
    assert {n for what, n in executor.log if what == "capture"} == {1, count}


def test_the_loop_as_one_launch(class_model):
    sampler = make(class_model, steps_per_graph="all")
    executor = recorded(sampler, RecordingLoop())
    seen = []
    got = sampler.sample(2, **RUN, callback=lambda i, done, x: seen.append(done), callback_every=3)
    assert torch.equal(got, make(class_model).sample(2, **RUN))
    assert [n for what, n in executor.log if what == "loop"] == [3, 3, 1]
    assert seen == [0, 3, 6, 7] and sampler.loops.forms == [ONE_LAUNCH]


@pytest.mark.parametrize("per_graph", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_callbacks_do_not_undo_the_capture(class_model, every, per_graph):
    """Each state is the eager loop's at that step, handed over while later ones are queued."""
    runs = []
    sampler = make(class_model, steps_per_graph=per_graph)
    executor = recorded(sampler)
    for one in (sampler, make(class_model)):
        seen = []

        def callback(index, done, x, seen=seen):
            assert x.device.type == "cpu"
            seen.append((index.tolist(), done, x.clone()))

        settings = {"callback": callback, "callback_every": every}
        x = one.sample(3, batch_size=2, **RUN, **settings)
        runs.append(seen)
        assert torch.equal(x[2:], seen[-1][2])
    stops = sorted({*range(0, 7, every), 7})
    assert [done for _, done, _ in runs[0]] == stops * 2
    for captured, eager in zip(*runs, strict=True):
        assert captured[:2] == eager[:2] and torch.equal(captured[2], eager[2])
    assert executor.count("capture") == len({1, per_graph})
    assert sum(n for what, n in executor.log if what == "replay") == 14
    assert [n for what, n in executor.log if what == "copy"] == [2] * len(stops) + [1] * len(stops)


def test_bad_callback_strides_are_refused(class_model):
    with pytest.raises(ValueError, match="callback_every"):
        make(class_model).sample(1, callback_every=0)


def test_captures_are_kept_by_shape(class_model):
    sampler = make(class_model)
    executor = recorded(sampler)
    want = {size: sampler.sample(size, **RUN) for size in (1, 3, 2)}
    sampler.sample(2)  # without a class, which is a label too
    before = executor.count("capture")
    for size in (2, 1, 3):
        assert torch.equal(sampler.sample(size, **RUN), want[size])
    assert before == executor.count("capture") == 3


def test_the_largest_bucket_is_captured_first(class_model):
    sampler = make(class_model)
    executor, sizes = recorded(sampler), []
    capture = executor.capture

    def noted(step, count):
        sizes.append(step.__self__.batch_size)
        return capture(step, count)

    executor.capture = noted
    sampler.capture([2, 8, 4])
    assert sizes == [8, 4, 2]
    wanted = {1: 2, 2: 2, 3: 4, 8: 8, 20: 8}
    assert {n: sampler.default_batch_size(range(n)) for n in wanted} == wanted
    assert sampler.default_batch_size(iter(range(3))) == 8
    sampler.sample(3, **RUN)
    sampler.sample(20, **RUN)
    assert sizes == [8, 4, 2]
    with pytest.raises(ValueError, match="batch size"):
        sampler.capture([0])


def test_memory_is_reported_and_released(class_model):
    sampler = make(class_model, guidance_scale=2.0, method="dpmpp_2m")
    executor = recorded(sampler)
    assert sampler.memory_held == 0
    want = sampler.sample(4, **RUN)
    held, image = sampler.memory_held, 4 * 8 * 8 * 4
    # x_t, the previous pred_xstart and two halves of input; four int64 of two halves or less.
    assert 4 * image < held < 4 * image + 8 * 5 * 2 * 4
    sampler.sample(2, **RUN)
    assert sampler.memory_held > held
    sampler.release()
    assert sampler.memory_held == 0 and executor.log[-1] == ("release", 0)
    assert torch.equal(sampler.sample(4, **RUN), want)
    assert executor.count("capture") == 3


def test_runs_in_several_threads_have_buffers_of_their_own(class_model):
    sampler, got = make(class_model), {}
    recorded(sampler)
    want = {seed: make(class_model).sample(5, seed=seed, batch_size=2) for seed in range(3)}

    def run(seed):
        got[seed] = sampler.sample(5, seed=seed, batch_size=2)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], want[seed]) for seed in want)


@pytest.mark.parametrize(
    "network, message",
    [
        (Network(), r"module blocks\.1 \(Reads\), at `return x \* 2 if x\.max\(\) > 3 else x`"),
        (reading, r"capture the network, at `return x \* float\(x\.mean\(\)\)`"),
    ],
    ids=["module", "function"],
)
def test_what_cannot_be_captured_is_named(network, message):
    sampler = Sampler(network, NoiseSchedule.linear(20), (1, 2, 2), backend="cpu")
    recorded(sampler)
    with pytest.raises(CaptureError, match=message) as error:
        sampler.sample(1)
    assert "not permitted when stream is capturing" in str(error.value)
    assert "\n" not in str(error.value)


def test_auto_falls_back_with_one_warning():
    settings = {"schedule": NoiseSchedule.linear(20), "sample_shape": (1, 2, 2), "backend": "cpu"}
    sampler = Sampler(reading, **settings, graphs="auto")
    recorded(sampler)
    assert sampler.graphs
    with pytest.warns(UserWarning, match="step by step: a CUDA graph cannot capture the network"):
        got = sampler.sample(3, batch_size=2)
    assert not sampler.graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(1)
    assert torch.equal(got, Sampler(reading, **settings).sample(3, batch_size=2))


@pytest.mark.parametrize("graphs", [True, "auto"])
def test_on_a_cpu_there_is_nothing_to_capture(class_model, graphs, recwarn):
    sampler = make(class_model, graphs=graphs)
    assert not sampler.graphs and sampler.graphs_obstacle == "nothing to capture on a CPU"
    assert sampler.sample(1).isfinite().all() and sampler.capture_seconds == 0
    assert not recwarn.list


@pytest.mark.parametrize("settings", [{"graphs": "yes"}, {"steps_per_graph": 0}], ids=str)
def test_bad_settings_are_refused(class_model, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make(class_model, **settings)


class NoHostWork(TorchDispatchMode):
    """Fails on what makes the host wait, and on memory that our own code takes."""

    def __init__(self):
        super().__init__()
        self.in_network, self.calls = False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        assert func is not torch.ops.aten._to_copy.default or "device" not in kwargs
        given = tensors((args, kwargs))
        assert len({t.device for t in given}) <= 1, f"{func} copies to another device"
        result = func(*args, **kwargs)
        self.calls += not self.in_network
        if not self.in_network:
            assert storages(result) <= storages(given), f"{func} allocates"
        return result


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_step_does_no_host_work(class_model, settings):
    sampler, guard = make(class_model, **settings), NoHostWork()
    network = sampler.network

    def watched(x, t, **conditions):
        guard.in_network = True
        try:
            return network(x, t, **conditions)
        finally:
            guard.in_network = False

    sampler.network = watched
    sampler.sample(2, **RUN)
    with sampler.loops.borrowed(sampler, 2) as lent, torch.no_grad():
        lent.loop.rewind()
        with guard:
            for _ in range(sampler.plan.num_steps):
                lent.loop.step()
    # The timesteps, the fused step and the count.
    assert guard.calls == 3 * sampler.plan.num_steps


def test_a_step_takes_no_memory_at_all():
    """Also where dispatch does not look: with a network that takes none either."""
    out = torch.zeros(4, 3, 5, 7)
    sampler = Sampler(
        lambda x, t: torch.neg(x, out=out),
        NoiseSchedule.linear(20),
        (3, 5, 7),
        backend="cpu",
        method="dpmpp_2m",
    )
    sampler.sample(4)
    with sampler.loops.borrowed(sampler, 4) as lent, torch.no_grad():
        lent.loop.rewind()
        with torch.profiler.profile(profile_memory=True) as profile:
            for _ in range(5):
                lent.loop.step()
    names = {e.key: e.count for e in profile.key_averages()}
    assert names["ddpm_fast::p_sample_step_"] == 5
    # What `add_` counts by is wrapped in a tensor of 8 bytes, on the CPU everywhere.
    assert not [e.name for e in profile.events() if e.cpu_memory_usage > 8]
