"""Signs of life in the store: a process that was killed says nothing, and somebody waits for it."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

BEAT_SECONDS = 5.0
SILENT_LOOKS = 12  # a minute: far more than a busy machine or a slow network keeps a beat back
LATE_LOOKS = 120  # until the first: torch may come from a slow disk, or the model


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
    """Which of the ranks 1 to size - 1 have been silent.

    It goes by changes, since the counts may be older than the processes; and it counts its own
    looks instead of seconds, since whoever was stopped for a while has heard nobody.
    """

    def __init__(self, store: dist.Store, size: int) -> None:
        self._store, self._looked = store, 0.0
        self._counts: list[int | None] = [None] * size
        self._looks, self._limits = [0] * size, [LATE_LOOKS] * size

    def look(self) -> None:
        """Hear everybody, if it is time."""
        if time.monotonic() < self._looked + BEAT_SECONDS:
            return
        self._looked = time.monotonic()
        for rank in range(1, len(self._counts)):
            count = self._store.add(_name(rank), 0)
            if count == self._counts[rank]:
                self._looks[rank] += 1
                continue
            if self._counts[rank] is not None:
                self._limits[rank] = SILENT_LOOKS
            self._counts[rank], self._looks[rank] = count, 0

    def is_lost(self, rank: int) -> bool:
        """Whether it was silent for so many looks that it must be dead."""
        return self._looks[rank] >= self._limits[rank]


def _name(rank: int) -> str:
    return f"beats/{rank}"
