"""Captured loops on streams, in threads and beside each other; only with a GPU."""

from __future__ import annotations

import threading

import torch
from step_cases import difference
from test_captured_loop import RUN, make
from test_cuda import needs

pytestmark = needs("cuda")


def test_on_a_stream_of_the_callers(class_model):
    """What he queued before is seen, and what he queues after sees the samples."""
    sampler, stream = make(class_model), torch.cuda.Stream()
    x_T = torch.randn(4, 1, 8, 8)
    want = sampler.sample(4, **RUN, x_T=x_T)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        given = x_T.pin_memory().cuda(non_blocking=True)
        batches = sampler.batches(range(4), **RUN, x_T=given)
        _, x = next(batches)
        assert torch.cuda.current_stream() == stream
        got = (x + 0.0).cpu()
    assert not difference(got, want)


def test_several_threads(class_model):
    """Of one sampler, each with a stream and shapes of its own, while another works on the GPU."""
    sampler = make(class_model)
    jobs = [(seed, size) for seed in range(3) for size in (2, 4)]
    want = {
        job: make(class_model, graphs=False).sample(9, seed=job[0], batch_size=job[1])
        for job in jobs
    }
    got, errors, begun, stop = {}, [], threading.Event(), threading.Event()

    def work(job):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):
                    got[job] = sampler.sample(9, seed=job[0], batch_size=job[1])
        except Exception as error:  # told by the test, not by the thread
            errors.append(error)

    def other_work():
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                a = torch.ones(256, 256, device="cuda")
                (a @ a).sum()
                torch.cuda.current_stream().synchronize()
                begun.set()  # what it is the first to do may synchronise the device

    beside = threading.Thread(target=other_work)
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    beside.start()
    begun.wait()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    beside.join()
    assert not errors
    assert not {job: bad for job in jobs if (bad := difference(got[job], want[job]))}


def test_two_samplers_may_alternate(class_model):
    samplers = [make(class_model, steps=steps) for steps in (20, 15)]
    want = [s.sample(8, **RUN) for s in samplers]
    streams = zip(*(s.batches(range(8), **RUN) for s in samplers), strict=True)
    got = [torch.cat(x).cpu() for x in zip(*([a[1], b[1]] for a, b in streams), strict=True)]
    assert not [*filter(None, map(difference, got, want))]


def test_buckets_share_memory_that_can_be_released(class_model):
    alone, sampler = make(class_model), make(class_model)
    alone.capture([64])
    sampler.capture([8, 64, 1])
    assert alone.loops.executor.memory_held() > 0
    assert sampler.loops.executor.memory_held() <= 1.5 * alone.loops.executor.memory_held()
    want = sampler.sample(5, **RUN)
    reserved = torch.cuda.memory_reserved()
    sampler.release()
    assert sampler.memory_held == 0 and torch.cuda.memory_reserved() < reserved
    assert not difference(sampler.sample(5, **RUN), want)
