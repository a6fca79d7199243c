"""Threads that each compute on one core, for work that is cut by samples instead of by layers."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
# How a batch is shared out, by the bytes of its first layer; measured on two cores with 1 MiB of
# second-level cache each. Where a batch is small, cores wait for each other longer than they work;
# where a group is large, what one layer writes leaves the cache before the next reads it.
LARGEST_OF_ONE_CORE, LARGEST_GROUP = 2**17, 2**22
# With our own convolutions, in which cores wait less. Each core keeps its group's layers in memory:
# above BEST_GROUP, in values, a group is little faster; worth it up to this share of the batch.
SMALLEST_GROUP, BEST_GROUP, BEST_SHARE = 2**18, 2**20, 1 / 8
FEWEST_IN_A_GROUP = 2
MOST_WORKERS = 8  # more were not measured; layers that Python calls would wait for its lock


@lru_cache
def group_size(batch_size: int, bytes_each: int, itemsize: int, threads: int, is_own: bool) -> int:
    """How many samples one of several cores takes at once; 0: all cores share each layer.

    All groups of a batch have this size, so that a sample's bits do not depend on its place.
    bytes_each: of a sample's first layer; is_own: whether convolutions are our own.
    """
    if not is_own and batch_size * bytes_each <= LARGEST_OF_ONE_CORE:
        return batch_size
    if threads > MOST_WORKERS:
        return 0
    best = LARGEST_GROUP
    if is_own:
        best = max(BEST_GROUP * itemsize, BEST_SHARE * batch_size * bytes_each)
    sizes = []
    for groups in range(threads, batch_size // FEWEST_IN_A_GROUP + 1, threads):
        size = batch_size // groups
        if is_own and size * bytes_each < SMALLEST_GROUP:
            break
        small = size == FEWEST_IN_A_GROUP or size * bytes_each <= LARGEST_GROUP
        if batch_size % groups == 0 and small:
            sizes.append(size)
    return min(sizes, key=lambda size: abs(math.log(size * bytes_each / best)), default=0)


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
