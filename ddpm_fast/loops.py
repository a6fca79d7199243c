"""The loops of a sampler, made once per batch size and kept, with the captures of their steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .executor import CaptureError, Executor, Stepper, take_steps
from .loop import Loop

if TYPE_CHECKING:
    from .sampler import Sampler


class KeptLoop:
    """A batch's buffers, and what advances them."""

    def __init__(self, loop: Loop, executor: Executor, steps_per_graph: int | str) -> None:
        self.loop, self.executor = loop, executor
        steps = loop.sampler.plan.num_steps
        self.stepper = Stepper(executor, loop.step, loop.rewind, steps, steps_per_graph)

    def start(self, *state: object) -> None:
        """As of `Loop`."""
        self.executor.join()
        self.loop.start(*state)

    def run(
        self,
        x: Tensor,
        callback: Callable[[int, Tensor], None] | None,
        callback_every: int,
        noise: Callable[[int], Tensor | None] | None = None,
    ) -> None:
        """All steps of what the loop was started with; see `take_steps`, `Loop.check_result`."""
        steps = self.loop.sampler.plan.num_steps
        advance = self.stepper.advance if noise is None else self._with_noise(noise)
        take_steps(self.executor, advance, steps, x, callback, callback_every)
        self.loop.check_result()

    def _with_noise(self, noise: Callable[[int], Tensor | None]) -> Callable[[int], None]:
        """What advances the loop step by step, each with the noise that is drawn before it."""
        numbers = count(1)

        def advance(steps: int) -> None:
            for _ in range(steps):
                self.executor.between(lambda: self.loop.take_noise(noise(next(numbers))))
                self.stepper.advance(1)

        return advance


class Loops:
    """Each is lent to one run at a time; runs in other threads, or within each other, get more.

    Args:
        executor: may be replaced before the first loop.
        automatic: after a capture that fails, go on step by step, with one warning.
    """

    def __init__(self, executor: Executor, steps_per_graph: int | str, automatic: bool) -> None:
        self.executor, self.capture_seconds = executor, 0.0
        self._steps_per_graph, self._automatic = steps_per_graph, automatic
        self._kept: dict[tuple[int, bool], list[KeptLoop]] = {}  # by batch size, and given_noise

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a sampler makes its own: a step is bound to the buffers that it has."""
        return self.__dict__ | {"_kept": {}}

    @property
    def forms(self) -> list[str]:
        """What a launch does, in words, in the captures that are kept."""
        return sorted({one.stepper.form for one in self._all() if one.executor.captures})

    def memory_held(self) -> int:
        """Bytes on the device of the buffers and captures that are kept."""
        return sum(one.loop.nbytes for one in self._all()) + self.executor.memory_held()

    def _all(self) -> list[KeptLoop]:
        return [one for kept in list(self._kept.values()) for one in kept]

    def release(self) -> None:
        self.executor.synchronize()
        self._kept.clear()
        self.executor.release()

    def _make(self, sampler: Sampler, size: int, given_noise: bool) -> KeptLoop:
        # Buffers made in inference mode could not be written outside it by a later run.
        with torch.inference_mode(False):
            loop = Loop(sampler, size, given_noise)
        began = time.perf_counter()
        try:
            return KeptLoop(loop, self.executor, self._steps_per_graph)
        except CaptureError as error:
            if not self._automatic:
                raise
            warnings.warn(f"ddpm_fast samples step by step: {error}.", stacklevel=6)
            self.executor = Executor(sampler.device)
            return KeptLoop(loop, self.executor, self._steps_per_graph)
        finally:
            if self.executor.captures:
                self.capture_seconds += time.perf_counter() - began

    @contextmanager
    def borrowed(
        self, sampler: Sampler, size: int, given_noise: bool = False
    ) -> Iterator[KeptLoop]:
        """Made if none is free, and kept for the next run."""
        free = self._kept.setdefault((size, given_noise), [])
        try:
            one = free.pop()
        except IndexError:
            one = self._make(sampler, size, given_noise)
        try:
            yield one
        finally:
            one.executor.join()
            free.append(one)
