"""The threads that each compute on one core: how they begin, and how they end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from ddpm_fast.workers import on_a_worker, workers


@pytest.fixture
def two_threads():
    """New workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    workers.cache_clear()
    yield
    torch.set_num_threads(threads)
    workers.cache_clear()


def count_of_a_new_thread() -> int:
    counts = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return counts[0]


def test_other_threads_keep_all_cores(two_threads):
    workers(2)
    assert torch.get_num_threads() == count_of_a_new_thread() == 2


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_start_that_fails_leaves_nothing_behind(two_threads, error, monkeypatch):
    """After the first of two."""
    start, started = threading.Thread.start, []

    def fails(thread):
        if started:
            raise error
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(type(error)):
        workers(2)
    monkeypatch.undo()
    started[0].join(timeout=20)
    assert not started[0].is_alive() and count_of_a_new_thread() == 2
    assert on_a_worker(lambda: 7) == 7


def test_an_interrupted_caller_has_waited(two_threads):
    ended = []

    def work():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        ended.append(True)

    # Where a shell starts Python in the background, interrupts are ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            on_a_worker(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_its_own():
    code = """
import os, signal, sys, torch
from ddpm_fast.workers import on_a_worker
torch.set_num_threads(2)
on_a_worker(int)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(on_a_worker(lambda: 7))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7


def test_a_network_may_be_called_as_the_process_ends():
    """When no worker takes work."""
    code = """
import atexit, torch
from ddpm_fast import inference, workers
from ddpm_fast.checkpoint import load_model
workers.SMALLEST_GROUP = 0
torch.set_num_threads(2)
network = inference.prepare(load_model("mnist").unet, torch.device("cpu"), torch.float32)
x, t = torch.zeros(8, 1, 28, 28), torch.full((8,), 5)
print(network.uses_workers(8), network(x, t).shape)
atexit.register(lambda: print(network.uses_workers(8), network(x, t).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    shape = "torch.Size([8, 1, 28, 28])"
    assert done.stdout == f"True {shape}\nFalse {shape}\n", done.stderr


def test_a_thread_may_sample_on_when_the_main_one_has_ended():
    code = """
import threading, torch
from ddpm_fast import inference, workers
from ddpm_fast.checkpoint import load_model
from ddpm_fast.sampler import Sampler
workers.SMALLEST_GROUP = 0
torch.set_num_threads(2)
sampler = Sampler.from_model(load_model("mnist"), steps=3, dtype=torch.float32)
def callback(index, done, x):
    if done == 1:
        print(sampler.network.uses_workers(8))
        begun.set()
        threading.main_thread().join()
def sample():
    x = sampler.sample(8, batch_size=8, callback=callback)
    print(sampler.network.uses_workers(8), x.shape)
begun = threading.Event()
threading.Thread(target=sample).start()
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\nFalse torch.Size([8, 1, 28, 28])\n", done.stderr


def test_each_worker_uses_one_core(two_threads):
    assert set(workers(2).map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == 2
