"""Signs of life in the store: a process that was killed says nothing, and somebody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import torch.distributed as dist

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # far more than a busy machine or a slow network keeps a beat back


class Heart:
    """A thread that counts up this process's beats, from `start` until `stop`.

    A thread, because one evaluation of a network may take longer than any silence allowed.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._name = store, _name(rank)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Also waits for the thread: one that is left in the store as Python ends can crash it."""
        self._stopped.set()
        self._thread.join(BEAT_SECONDS)

    def _beat(self) -> None:
        while not self._stopped.is_set():
            try:
                self._store.add(self._name, 1)
            except dist.DistError:  # the process itself will find out, and say so
                return
            self._stopped.wait(BEAT_SECONDS)


class Watch:
    """Who has been silent: by changes and this machine's clock, so old counts mean nothing."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._heard: dict[int, tuple[int, float]] = {}

    def silent(self, ranks: Iterable[int]) -> list[int]:
        """Those not heard of in SILENT_SECONDS, or since they were first asked for here."""
        found = []
        for rank in ranks:
            count, now = self._store.add(_name(rank), 0), time.monotonic()
            before, since = self._heard.get(rank, (None, now))
            if count != before:
                self._heard[rank] = count, now
            elif now - since > SILENT_SECONDS:
                found.append(rank)
        return found


def _name(rank: int) -> str:
    return f"beats/{rank}"
