"""Who takes the steps of a loop: here the host, one by one; in `graphs` a GPU, from its capture.

What a run asks of an executor is the same for both, so the control is, too: `take_steps`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[], None]
Replay = Callable[[int], None]  # that many times
WHOLE = "all"  # steps a graph: the loop in one launch
ONE_LAUNCH = "the loop as one launch"


class CaptureError(RuntimeError):
    """A step cannot be captured."""


class Executor:
    """Calls each step. Others capture it first, and then take it without the host."""

    captures = False
    ahead = 0  # states that may be on their way to the host while further steps are queued

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, step: Step, count: int) -> None:
        """Take some steps, so that libraries choose their algorithms before a capture."""

    def capture(self, step: Step, count: int) -> Replay:
        """`count` steps as one thing to replay; they are taken by the replays alone.

        `step` reads and writes only tensors that stay where they are. CaptureError if it does what
        cannot be captured.
        """

        def replay(times: int) -> None:
            for _ in range(times * count):
                step()

        return replay

    def capture_loop(self, step: Step) -> Replay | None:
        """A step that one launch repeats; None where the device cannot do that."""
        return None

    def between(self, work: Step) -> None:
        """Call it: what it queues runs after all that was replayed, before what will be."""
        work()

    def join(self) -> None:
        """Put what the caller queues from now on after all that was replayed, and what is replayed
        from now on after all that he has queued.

        Whoever borrows a loop does so first and last: he may queue on another stream than the last.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def copy_out(self, x: Tensor) -> Callable[[], Tensor]:
        """x as it is after the steps so far; the call waits for it, and returns it on the CPU."""
        return x.cpu

    def synchronize(self) -> None:
        """Wait for all that was replayed."""

    def memory_held(self) -> int:
        """Bytes on the device that captures keep for themselves."""
        return 0

    def release(self) -> None:
        """Give them back; whoever called has dropped the replays."""


class Stepper:
    """The captured forms of a step, and any number of steps made up of them.

    Args:
        step, rewind: `rewind` puts back what `step` counts; called before each capture.
        num_steps: the most that are taken without a rewind.
        steps_per_graph: how many a graph holds, or WHOLE; what is left over is taken singly.
    """

    def __init__(
        self,
        executor: Executor,
        step: Step,
        rewind: Step,
        num_steps: int,
        steps_per_graph: int | str = 1,
    ) -> None:
        self._loop: Replay | None = None
        self._captured: list[tuple[int, Replay]] = []
        rewind()
        executor.warm_up(step, min(3, num_steps))
        if steps_per_graph == WHOLE:
            rewind()
            self._loop = executor.capture_loop(step)
            steps_per_graph = 1
        if self._loop is None:
            for count in sorted({1, min(steps_per_graph, num_steps)}, reverse=True):
                rewind()
                self._captured.append((count, executor.capture(step, count)))

    @property
    def form(self) -> str:
        """What one launch does, in words."""
        if self._loop is not None:
            return ONE_LAUNCH
        count = self._captured[0][0]
        return "a step a launch" if count == 1 else f"{count} steps a launch"

    def advance(self, steps: int) -> None:
        if self._loop is not None:
            return self._loop(steps) if steps else None
        for count, replay in self._captured:
            replay(steps // count)
            steps %= count
        return None


def take_steps(
    executor: Executor,
    advance: Callable[[int], None],
    num_steps: int,
    x: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    every: int = 1,
) -> None:
    """The whole run; with a callback, also x before it, after each `every` steps and at its end.

    The callback, (steps done, x on the CPU, which the next step may write), is called while further
    steps run, as far as the executor goes ahead.
    """
    pending: deque[tuple[int, Callable[[], Tensor]]] = deque()

    def hand_over(left: int) -> None:
        while len(pending) > left:
            done, copied = pending.popleft()
            callback(done, copied())

    done = 0
    executor.join()
    try:
        for stop in [*range(0, num_steps, every), num_steps] if callback else [num_steps]:
            advance(stop - done)
            done = stop
            if callback:
                pending.append((done, executor.copy_out(x)))
                hand_over(executor.ahead)
        hand_over(0)
    finally:  # also after a callback that failed
        executor.join()
