"""CUDA graphs: the steps of a loop captured once, and replayed without the host."""

from __future__ import annotations

import linecache
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import backend as backends
from .arguments import shown
from .executor import CaptureError, Executor, Replay, Step

CAPTURABLE = ("cuda", "triton")  # backends

_TORCH = os.path.dirname(torch.__file__)

# torch.cuda.graph synchronises the device, which would break another thread's capture.
_one_capture = threading.Lock()


class CudaGraphs(Executor):
    """Captures in one memory pool, replayed on a stream of its own.

    The graphs of a pool use the same memory, so no two may run at once: all are replayed on the one
    stream, which is also that of the warm-up and the capture, and nothing is queued there while a
    thread captures. For the few milliseconds of a capture no other thread may synchronise the
    device, draw from its torch generator, or capture with torch's default error mode, "global".

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
        self._pool = torch.cuda.graph_pool_handle()

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
        with self._queueing(), _no_autocast_cache():
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
        if while_loop_obstacle() or self._draws(step):
            return None
        graph = self._captured(step, 1, keep_graph=True)
        remaining = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            with torch.cuda.device(self.device):
                loop = backends.extension.WhileLoop(graph.raw_cuda_graph(), remaining.data_ptr())
        except RuntimeError:  # a node that a loop may not hold, as a cooperative launch
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
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    for _ in range(count):
                        step()
            except RuntimeError as error:
                raise capture_error(error, self._network) from error
        return graph

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
        self._stream.synchronize()

    def memory_held(self) -> int:
        segments = torch.cuda.memory_snapshot()
        mine = (s for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))
        return sum(s["total_size"] for s in mine)

    def release(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
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
    if graphs not in (True, False, "auto"):
        raise ValueError(f'graphs must be True, False or "auto", but {shown(graphs)} was given.')
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
