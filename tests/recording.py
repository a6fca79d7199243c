"""A stand-in for CUDA graphs on the CPU: it records a step's operators, and replays them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_fast.executor import Executor, Replay, Step
from ddpm_fast.graphs import capture_error
from ddpm_fast.sampler import Sampler


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storages(tree: object) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors(tree)}


def without_last(trace: TracebackType) -> TracebackType | None:
    """Without the frame that raised: on CUDA that is not Python's."""
    if trace.tb_next is None:
        return None
    rest = without_last(trace.tb_next)
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


class Recorded(TorchDispatchMode):
    """Every operator with the very tensors that it was given and that it returned.

    A replay has no more than these: a number that the host read, or a tensor that it made anew,
    stays what it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for was, now in zip(tensors(result), tensors(again), strict=True):
                if storages(was) != storages(now):
                    was.copy_(now)


class Recording(Executor):
    """Says in `log` what it was asked for. States are handed over late, as a GPU's are."""

    captures, ahead = True, 2

    def __init__(self, network: object = None) -> None:
        super().__init__(torch.device("cpu"))
        self.log: list[tuple[str, int]] = []
        self.network = network

    def warm_up(self, step: Step, count: int) -> None:
        self.log.append(("warm up", count))
        for _ in range(count):
            step()

    def capture(self, step: Step, count: int) -> Replay:
        self.log.append(("capture", count))
        recorded = Recorded()
        try:
            with recorded:
                for _ in range(count):
                    step()
        except RuntimeError as error:
            error = error.with_traceback(without_last(error.__traceback__))
            raise capture_error(error, self.network) from error

        def replay(times: int) -> None:
            for _ in range(times):
                self.log.append(("replay", count))
                recorded.replay()

        return replay

    def copy_out(self, x: Tensor) -> Callable[[], Tensor]:
        self.log.append(("copy", len(x)))
        copied = x.clone()
        return lambda: copied

    def release(self) -> None:
        self.log.append(("release", 0))

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.log)


class RecordingLoop(Recording):
    """One that can repeat a step in one launch too."""

    def capture_loop(self, step: Step) -> Replay:
        replay = self.capture(step, 1)

        def loop(times: int) -> None:
            self.log.append(("loop", times))
            replay(times)

        return loop


def recorded(sampler: Sampler, executor: Recording | None = None) -> Recording:
    """Let the sampler record its steps, and replay them."""
    sampler.loops.executor = executor or Recording(sampler.network)
    return sampler.loops.executor
