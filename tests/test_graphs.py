"""What CudaGraphs asks of torch.cuda, and in which order: on a stand-in that notes the calls.

That a GPU then computes the same is shown in test_captured_loop.py.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from cuda_stand_in import CALLER, OWN, POOL, REFUSED, Cuda

from ddpm_fast import graphs, info
from ddpm_fast.executor import ONE_LAUNCH, CaptureError, Stepper, take_steps
from ddpm_fast.graphs import CudaGraphs


@pytest.fixture
def cuda(monkeypatch):
    cuda, empty, zeros = Cuda(), torch.empty, torch.zeros
    for name in dir(cuda):
        if not name.startswith("_") and hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **kw: empty(*a, **kw))
    monkeypatch.setattr(torch, "zeros", lambda *a, device, **kw: zeros(*a, **kw))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release_pool, raising=False)
    return cuda


@pytest.fixture
def executor(cuda):
    return CudaGraphs(torch.device("cuda", 0))


JOIN = [(OWN, "waits for", CALLER), (CALLER, "waits for", OWN)]
CAPTURE = [*JOIN, ("capture", POOL, OWN, "thread_local")]


def test_captures_share_a_pool_and_the_stream(cuda, executor):
    taken = []
    stepper = Stepper(executor, lambda: taken.append(cuda.current.cuda_stream), list, 7, 3)
    assert cuda.log == JOIN * 2 + CAPTURE * 2
    assert taken == [OWN] * (3 + 3 + 1)
    cuda.log.clear()
    stepper.advance(7)
    assert cuda.log == [("replay on", OWN)] * 3 and cuda.current.cuda_stream == CALLER
    assert executor.memory_held() == 11


def test_a_run_comes_between_what_the_caller_queues(cuda, executor):
    replay = executor.capture(list, 1)
    cuda.log.clear()
    take_steps(executor, replay, 3, torch.ones(2), lambda *_: cuda.log.append(("callback",)))
    copy, step = ("event on", OWN), ("replay on", OWN)
    seen = [("host waits for", "event"), ("callback",)]
    queued = [copy, step, copy, step, copy, *seen, step, copy, *seen]  # two states ahead
    assert cuda.log == [*JOIN, *queued, *seen * 2, *JOIN]


def test_a_callback_that_fails_leaves_the_order_right(cuda, executor):
    replay = executor.capture(list, 1)

    def fails(*_):
        raise KeyError

    with pytest.raises(KeyError):
        take_steps(executor, replay, 9, torch.ones(2), fails)
    assert cuda.log[-2:] == JOIN


def test_a_failing_capture_puts_the_stream_back(cuda, executor):
    def fails():
        raise RuntimeError(REFUSED)

    with pytest.raises(CaptureError, match=r"`raise RuntimeError.*: operation not permitted"):
        executor.capture(fails, 1)
    assert cuda.current.cuda_stream == CALLER
    assert cuda.log[: len(CAPTURE)] == CAPTURE
    executor.capture(list, 1)  # and no lock is left held


def test_a_failing_capture_leaves_nothing_capturing(cuda, executor):
    """Else torch's generator draws no more in the process, and nothing else is captured in it."""

    def refused():
        raise RuntimeError(REFUSED)

    def mistaken():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    executor.capture(list, 1)
    taken = [POOL]
    for step in (refused, mistaken, refused):
        cuda.log.clear()
        with pytest.raises(CaptureError):
            executor.capture(step, 1)
        assert not cuda.recording and not cuda.generator_captures
        taken += [entry[1] for entry in cuda.log if entry[0] == "capture"][:1]
    # The first pool is taken again, and no other: an error may hold a tensor of its.
    assert taken[:2] == [POOL] * 2 and len({*taken}) == 3
    # What was refused has no share left; the one that did end gives its own back when it is gone.
    assert [cuda.shares[pool] for pool in taken] == [1, 1, 1, 0]
    executor.capture(list, 1)
    assert executor.memory_held() == 11  # in the pool of the first


@pytest.mark.parametrize("meanwhile", ["capture", "warm_up"])
def test_one_thread_captures_at_a_time(cuda, executor, meanwhile):
    """And none warms up, which may be the first to load a kernel."""
    other, log, inside = CudaGraphs(torch.device("cuda", 0)), [], threading.Event()

    def slow():
        inside.set()
        thread.join(0.2)  # it cannot end before this capture does
        log.append("first")

    thread = threading.Thread(target=lambda: (inside.wait(), second()))

    def second():
        getattr(other, meanwhile)(lambda: log.append("second"), 1)

    thread.start()
    executor.capture(slow, 1)
    thread.join()
    assert log == ["first", "second"]


class Extension:
    """With a loop that notes its launches, or that cannot hold the step."""

    def __init__(self, cuda: Cuda, refuses: bool) -> None:
        self.cuda, self.refuses = cuda, refuses

    def WhileLoop(self, step, remaining):
        if self.refuses:
            raise RuntimeError("operation not supported")
        assert step == 7
        return self

    def launch(self, stream):
        self.cuda.log.append(("loop on", stream))


NO_LOOP = {
    "": "",
    "runtime": "old",
    "node": "operation not supported",
    "generator": "the network draws from torch's generator, which the host advances",
}


@pytest.mark.parametrize("obstacle, why", NO_LOOP.items(), ids=NO_LOOP)
def test_the_loop_as_one_launch_or_the_next_simpler_form(
    cuda, executor, monkeypatch, obstacle, why
):
    monkeypatch.setattr(graphs, "while_loop_obstacle", lambda: "old" * (obstacle == "runtime"))
    monkeypatch.setattr(graphs.backends, "extension", Extension(cuda, obstacle == "node"))

    def step():
        cuda.offset += obstacle == "generator"

    stepper = Stepper(executor, step, list, 7, "all")
    assert stepper.form == (f"a step a launch (not all: {why})" if obstacle else ONE_LAUNCH)
    cuda.log.clear()
    stepper.advance(7)
    assert cuda.log == ([("replay on", OWN)] * 7 if obstacle else [("loop on", OWN)])


class Built:
    """An extension's word on what it was built with, and what the driver has."""

    def __init__(self, cuda_linked: bool = True, has: bool = True) -> None:
        self.build_config = lambda: {"cuda_linked": cuda_linked}
        self.has_while_loops = lambda: has


@pytest.mark.parametrize(
    "extension, knows_raw_graphs, obstacle",
    [
        (None, True, "this build has no CUDA kernels"),
        (Built(cuda_linked=False), True, "this build has no CUDA kernels"),
        (Built(has=False), True, "CUDA 12.4 or newer in the build and in the driver"),
        (Built(), False, "does not give its graphs away"),
        (Built(), True, ""),
    ],
)
def test_info_says_what_one_launch_takes(monkeypatch, extension, knows_raw_graphs, obstacle):
    graph = type("CUDAGraph", (), {"raw_cuda_graph": None} if knows_raw_graphs else {})
    monkeypatch.setattr(graphs.backends, "extension", extension)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert obstacle in graphs.while_loop_obstacle()
    said = info._captured_loop()
    assert f"not: {graphs.while_loop_obstacle()}" in said if obstacle else "asked for by" in said


def test_a_copy_captures_for_itself(cuda, executor):
    executor.capture(list, 1)
    other = copy.deepcopy({"executor": executor})["executor"]
    assert other._stream is not executor._stream and other._pools != executor._pools
    assert other.device == executor.device and other._lock is not executor._lock


def test_release(cuda, executor):
    executor.synchronize()
    executor.release()
    assert cuda.log == [("host waits for", "device"), ("empty cache",)]


def test_memory_without_an_account(executor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: pytest.fail("it has none"))
    assert executor.memory_held() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_caches_nothing_in_a_capture(cuda, executor, enabled):
    before, seen = torch.is_autocast_cache_enabled(), []
    torch.set_autocast_cache_enabled(enabled)
    try:
        executor.warm_up(lambda: seen.append(torch.is_autocast_cache_enabled()), 1)
        executor.capture(lambda: seen.append(torch.is_autocast_cache_enabled()), 1)
        assert seen == [False, False] and torch.is_autocast_cache_enabled() == enabled
    finally:
        torch.set_autocast_cache_enabled(before)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_what_is_asked_for_is_what_captures(cuda, backend):
    device = torch.device("cuda", 0)
    made, obstacle = graphs.make_executor(device, backend, True, None)
    assert isinstance(made, CudaGraphs) and not obstacle
    made, obstacle = graphs.make_executor(device, backend, False, None)
    assert not made.captures and obstacle == "not asked for"
    with pytest.raises(ValueError, match="reference draws its noise on the host"):
        graphs.make_executor(device, "reference", True, None)
    with pytest.warns(UserWarning, match="step by step: the backend reference"):
        made, obstacle = graphs.make_executor(device, "reference", "auto", None)
    assert not made.captures and "cannot be captured" in obstacle


def test_without_kernels_graphs_are_refused(monkeypatch):
    monkeypatch.setattr(graphs.backends, "extension", None)
    monkeypatch.setattr(graphs.backends, "extension_error", "missing (no module)")
    monkeypatch.setattr(graphs.backends, "triton_obstacle", lambda: "triton is not installed")
    monkeypatch.delenv("DDPM_FAST_BACKEND", raising=False)
    graphs.backends._resolve.cache_clear()
    try:
        with pytest.raises(graphs.backends.BackendError, match=r"is missing.*triton is not"):
            graphs.resolve_backend(torch.device("cuda", 0), "auto", True)
    finally:
        graphs.backends._resolve.cache_clear()
