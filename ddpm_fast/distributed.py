"""The processes of one run: who does which batch, through the store of torch's rendezvous.

There is nothing to reduce, so no process group is made: a counter in the store hands out the
batches, and no process waits for another before the end. torchrun restarts all processes when one
is lost, and its store outlives them; hence the names that make sure nobody reads what is stale.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch.distributed as dist

from .heartbeat import Heart, Watch

POLL_SECONDS = 0.05  # not a blocking wait, because signals would wait with it
LEFT, FAILED = 1, 2  # how a process ended


class OthersGoneError(RuntimeError):
    """Others have ended before the run has: the store does not answer, or they said so."""


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except dist.DistError:
        raise OthersGoneError("the other processes are gone") from None


class World:
    """This process among those of its run. A run of one process is a world of size one.

    While it is entered (`with`), the leader can tell that this process lives.
    rank, size, local_rank, local_size: as torchrun counts them.
    """

    def __init__(self) -> None:
        self.rank, self.size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
        self.local_rank = _environment("LOCAL_RANK", 0)
        self.local_size = _environment("LOCAL_WORLD_SIZE", 1)
        self._run = uuid.uuid4().hex
        self._knows_run = self.leads
        self._answer = b""
        self._answered = 0
        if self.size == 1:
            self._store: dist.Store = dist.HashStore()
        else:
            self._store, _, _ = next(dist.rendezvous("env://"))
        self._heart = None if self.leads else Heart(self._store, self.rank)
        self._watch = Watch(self._store, self.size)
        self._waiting = [*range(1, self.size)]  # of the leader: who has not ended yet
        self._failed: list[int] = []
        self._lost: list[int] = []

    def __enter__(self) -> World:
        if self._heart:
            self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._heart:
            self._heart.stop()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def publish(self, plan: bytes) -> None:
        """Of the leader: what the others are to know before they begin."""
        self._answer = self._run.encode() + plan
        self._answer_newcomers()

    @_asking()
    def receive(self) -> bytes:
        """Of the others: what the leader published, once it has."""
        newcomer = self._store.add("newcomers", 1)
        while not self._store.check([f"answer/{newcomer}"]):
            time.sleep(POLL_SECONDS)
        answer = self._store.get(f"answer/{newcomer}")
        self._run, self._knows_run = answer[: len(self._run)].decode(), True
        return answer[len(self._run) :]

    def claims(self, indices: np.ndarray, batch_size: int) -> Iterator[int]:
        """The indices of this process's batches: each batch is claimed as its first is asked for.

        All processes must give the same sorted `indices` and batch size.
        """
        while (first := (self._count("claimed", 1) - 1) * batch_size) < len(indices):
            yield from indices[first : first + batch_size].tolist()

    def count_steps(self, steps: int) -> int:
        """Add to the steps that all have done; returns their sum."""
        if self.leads:
            self._look_after_others()
        return self._count("steps", steps)

    def others_left(self) -> bool:
        """Of the leader: whether all others have called `leave`.

        Raises OthersGoneError once all have ended, if some of them failed or give no sign of life
        any more: what they had claimed is not written.
        """
        self._look_after_others()
        while self._waiting:
            rank = self._waiting[0]
            end = self._count(f"ended/{rank}", 0)
            if not end and not self._watch.is_lost(rank):
                return False
            self._waiting.pop(0)
            if end != LEFT:
                (self._failed if end else self._lost).append(rank)
        gone = []
        if self._failed:
            gone.append(f"{len(self._failed)} of {self.size} processes failed")
        if self._lost:
            ranks = ", ".join(map(str, self._lost))
            gone.append(f"{len(self._lost)} of {self.size} give no sign of life (rank {ranks})")
        if gone:
            raise OthersGoneError("; ".join(gone))
        return True

    def leave(self) -> None:
        """Of the others: all that this process claimed is written."""
        self._count(f"ended/{self.rank}", LEFT)

    @contextmanager
    def telling_failure(self) -> Iterator[None]:
        """Of the others: an error in the block is told to the leader, which waits for them.

        torchrun sees to that on one machine, but not always on several. A signal comes to all.
        """
        try:
            yield
        except OthersGoneError:
            raise
        except Exception:
            if not self.leads:
                with suppress(OthersGoneError):
                    if not self._knows_run:
                        self.receive()
                    self._count(f"ended/{self.rank}", FAILED)
            raise

    @_asking()
    def _count(self, name: str, amount: int) -> int:
        return self._store.add(f"{self._run}/{name}", amount)

    @_asking()
    def _look_after_others(self) -> None:
        self._answer_newcomers()
        self._watch.look()

    @_asking()
    def _answer_newcomers(self) -> None:
        """Their numbers are new in every start; a number whose process has died does no harm."""
        while self._answered < self._store.add("newcomers", 0):
            self._answered += 1
            self._store.set(f"answer/{self._answered}", self._answer)


def _environment(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise ValueError(
            f"{name} is set to {os.environ[name]!r}, and torchrun would set it to a number"
        ) from None
