"""Threads that each compute on one core, for work that is cut by samples instead of by layers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


@cache
def workers(threads: int) -> ThreadPoolExecutor:
    """As many threads, in each of which torch uses no others."""
    ready = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # sets this thread up, which else happens later and forgets the 1
        ready.wait()

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ddpm_fast")
    try:
        for _ in range(threads):
            pool.submit(begin)
        ready.wait()
    except BaseException:  # else those that did begin would wait for ever, and the exit for them
        ready.abort()
        pool.shutdown()
        raise
    finally:
        # torch keeps a count for each thread, and another for threads to come: put back here.
        torch.set_num_threads(before)
    return pool


def on_a_worker(function: Callable[..., T], *arguments: object) -> T:
    """function(*arguments), in one of the workers; here, once they take no more work.

    Torch's own threads stay asleep then. Woken up for a moment's work, they would wait for more of
    it on the cores on which the workers are to compute: 5 ms, of 60 of a step.
    """
    if is_ending():
        return function(*arguments)
    future = workers(torch.get_num_threads()).submit(function, *arguments)
    try:
        return future.result()
    except BaseException:
        wait([future])  # so that nothing goes on beside a caller that was interrupted
        raise


def is_ending() -> bool:
    """Whether the main thread has come to its end, after which Python lets no worker begin."""
    return not threading.main_thread().is_alive()


os.register_at_fork(after_in_child=workers.cache_clear)
