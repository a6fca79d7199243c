"""CUDA graphs: the steps of a loop captured once, and replayed without the host."""

from __future__ import annotations

import linecache
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from . import backend as backends
from .arguments import shown
from .executor import CaptureError, Executor, Replay, Step

CAPTURABLE = ("cuda", "triton")  # backends

_TORCH = os.path.dirname(torch.__file__)

# torch.cuda.graph synchronises the device, which would break another thread's capture, and so may
# what a warm-up is the first to do: create a library's handle, load a kernel.
_one_capture = threading.Lock()

# Graphs whose capture failed: torch's allocator of pinned memory may go on asking them.
_abandoned: list[torch.cuda.CUDAGraph] = []


class CudaGraphs(Executor):
    """Captures in one memory pool, replayed on a stream of its own.

    The graphs of a pool use the same memory, so no two may run at once: all are replayed on the one
    stream, which is also that of the warm-up and the capture, and nothing is queued there while a
    thread captures. For the few milliseconds of a capture no other thread may synchronise the
    device, draw from its torch generator, capture with torch's default error mode, "global", or use
    the same one of the 32 streams that torch hands out in turn.

    Args:
        device: with its index.
        network: what the step calls, to name the module that cannot be captured.
    """

    captures, ahead = True, 2

    def __init__(self, device: torch.device, network: object = None) -> None:
        super().__init__(device)
        self._network = network
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.RLock()
        self._pools = [torch.cuda.graph_pool_handle()]  # the last takes what is captured next
        self._refused: torch.cuda.CUDAGraph | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a stream and memory of its own."""
        return type(self), (self.device, self._network)

    @contextmanager
    def _queueing(self) -> Iterator[None]:
        with self._lock, torch.cuda.stream(self._stream):
            yield

    def between(self, work: Step) -> None:
        with self._queueing():
            work()

    def join(self) -> None:
        caller = torch.cuda.current_stream(self.device)
        with self._lock:
            self._stream.wait_stream(caller)
            caller.wait_stream(self._stream)

    def warm_up(self, step: Step, count: int) -> None:
        self.join()
        with self._queueing(), _one_capture, _no_autocast_cache():
            for _ in range(count):
                step()
        self.join()

    def capture(self, step: Step, count: int) -> Replay:
        graph = self._captured(step, count)

        def replay(times: int) -> None:
            with self._queueing():
                for _ in range(times):
                    graph.replay()

        return replay

    def capture_loop(self, step: Step) -> Replay | None:
        self.loop_obstacle = while_loop_obstacle()
        if not self.loop_obstacle and self._draws(step):
            self.loop_obstacle = "the network draws from torch's generator, which the host advances"
        if self.loop_obstacle:
            return None
        graph = self._captured(step, 1, keep_graph=True)
        remaining = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            with torch.cuda.device(self.device):
                loop = backends.extension.WhileLoop(graph.raw_cuda_graph(), remaining.data_ptr())
        except RuntimeError as error:  # a node that a loop may not hold, as a call of the host
            self.loop_obstacle = str(error)
            self._refused = graph  # for the same reason as in `_abandon`
            return None

        def replay(times: int, graph: torch.cuda.CUDAGraph = graph) -> None:  # its memory is used
            with self._queueing():
                remaining.fill_(times)
                loop.launch(self._stream.cuda_stream)

        return replay

    def _captured(self, step: Step, count: int, **settings: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph(**settings)
        self.join()
        # The outer context puts the stream back where the inner one, failing, does not.
        with self._queueing(), _one_capture, _no_autocast_cache():
            begun = False
            try:
                with self._capturing(graph, self._pools[-1]):
                    begun = True
                    for _ in range(count):
                        step()
            except RuntimeError as error:
                if begun:
                    self._abandon(graph)
                raise capture_error(error, self._network) from error
        return graph

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> torch.cuda.graph:
        mode = "thread_local"
        return torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End what torch leaves begun where CUDA has refused a capture.

        Else, up to torch 2.12, its allocator and its generator would take the process for one that
        captures, for good (pytorch/pytorch, 180395 and 171263), and the pool would never be freed.
        """
        # Torch takes no pool again that has lost its last graph and still has a tensor, which the
        # error's traceback may hold.
        pool = self._pools[-1]
        self._pools.append(torch.cuda.graph_pool_handle())
        with suppress(RuntimeError):
            graph.pool()
            return  # it did end: the step failed by itself
        _abandoned.append(graph)
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):  # newer ones have done it
                end(self.device.index, pool)
        # A capture that ends well ends the generator's, too.
        other = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        with suppress(RuntimeError), self._capturing(*other):
            torch.zeros(1, device=self.device)

    def _draws(self, step: Step) -> bool:
        """Whether a step uses torch's generator, which a graph's replay advances and a loop not."""
        generator = torch.cuda.default_generators[self.device.index]
        before = generator.get_offset()
        self.warm_up(step, 1)
        return generator.get_offset() != before

    def copy_out(self, x: Tensor) -> Callable[[], Tensor]:
        copied, event = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
        with self._queueing():
            copied.copy_(x, non_blocking=True)
            event.record()

        def wait() -> Tensor:
            event.synchronize()
            return copied

        return wait

    def synchronize(self) -> None:
        with self._lock, _one_capture:
            torch.cuda.synchronize(self.device)

    def memory_held(self) -> int:
        if torch.cuda.get_allocator_backend() != "native":
            return 0  # cudaMallocAsync keeps no account of pools
        pools = {tuple(pool) for pool in self._pools}
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) in pools)

    def release(self) -> None:
        self._pools, self._refused = [torch.cuda.graph_pool_handle()], None
        torch.cuda.empty_cache()


def while_loop_obstacle() -> str:
    """Why a whole loop cannot be one launch; empty where it can."""
    if backends.extension is None or not backends.extension.build_config()["cuda_linked"]:
        return "this build has no CUDA kernels"
    if not backends.extension.has_while_loops():
        return "it needs CUDA 12.4 or newer in the build and in the driver"
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return f"torch {torch.__version__} does not give its graphs away"
    return ""


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A host project's autocast casts inside the graph; its cached weights would be freed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def capture_error(error: RuntimeError, network: object) -> CaptureError:
    """What could not be captured, in a sentence: the module and the line that the traceback names.

    error: of the capture. Where its end failed too, what is told is the failure before.
    """
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    names = {}
    if isinstance(network, nn.Module):
        names = {module: name for name, module in network.named_modules()}
    what, line, trace = "the network", "", error.__traceback__
    while trace is not None:
        code, module = trace.tb_frame.f_code, trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(module):
            what = f"the network's module {names[module]} ({type(module).__name__})"
        if not code.co_filename.startswith(_TORCH):
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
        trace = trace.tb_next
    reason = " ".join(str(error).split("\n")[0].split())[:200]
    at = f", at `{line}`" if line else ""
    return CaptureError(
        f'a CUDA graph cannot capture {what}{at}: {reason}; leave graphs off, or ask for "auto"'
    )


def resolve_backend(device: torch.device, backend: str, graphs: bool | str) -> tuple[str, str]:
    """The step's backend. Asking for graphs on a GPU asks for the kernels that can be captured."""
    if graphs not in (True, False, "auto"):
        raise ValueError(f'graphs must be True, False or "auto", but {shown(graphs)} was given.')
    chosen = backend != "auto" or backends.is_overridden()
    if graphs is not True or device.type != "cuda" or chosen:
        return backends.resolve_backend(device, backend)
    errors = []
    for name in CAPTURABLE:
        try:
            return backends.resolve_backend(device, name)
        except backends.BackendError as error:
            errors.append(str(error))
    raise backends.BackendError(f"graphs need a backend that can be captured: {' '.join(errors)}")


def make_executor(
    device: torch.device, backend: str, graphs: bool | str, network: object
) -> tuple[Executor, str]:
    """What takes the steps, and what stands in the way of capturing them; empty if nothing."""
    if not graphs:
        return Executor(device), "not asked for"
    if device.type != "cuda":
        return Executor(device), "nothing to capture on a CPU"
    if backend in CAPTURABLE:
        return CudaGraphs(device, network), ""
    obstacle = f"the backend {backend} draws its noise on the host, so it cannot be captured"
    if graphs is True:
        raise ValueError(f"{obstacle}: ask for {' or '.join(CAPTURABLE)}, or leave graphs off")
    warnings.warn(f"ddpm_fast samples step by step: {obstacle}.", stacklevel=3)
    return Executor(device), obstacle
