"""A stand-in for torch.cuda that notes what is asked of it, and in which order."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

POOL, CALLER, OWN = (0, 5), "caller's", "own"
REFUSED = "operation not permitted when stream is capturing"


class Cuda:
    """The parts of torch.cuda that are used. Of the captures that CUDA refuses it has what is nasty
    in torch 2.11: the stream is not put back, the end raises once more, and the allocator and the
    generator still take the process for one that captures.
    """

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.current, self.offset = self.stream_named(CALLER), 0
        self.default_generators = [self]
        self.pools, self.recording, self.shares = 0, set(), Counter()
        self.generator_captures = False

    def get_offset(self) -> int:
        return self.offset

    def stream_named(self, name: str) -> object:
        cuda = self

        class Stream:
            cuda_stream = name

            def wait_stream(self, other):
                cuda.log.append((name, "waits for", other.cuda_stream))

        return Stream()

    def Stream(self, device):  # torch's names, as they are
        assert device.index == 0
        return self.stream_named(OWN)

    def Event(self):
        cuda = self

        class Event:
            def record(self):
                cuda.log.append(("event on", cuda.current.cuda_stream))

            def synchronize(self):
                cuda.log.append(("host waits for", "event"))

        return Event()

    def CUDAGraph(self, keep_graph=False):
        cuda = self

        class Graph:
            ended = False

            def pool(self):
                if not self.ended:
                    raise RuntimeError("without a preceding successful capture")

            def replay(self):
                cuda.log.append(("replay on", cuda.current.cuda_stream))

            def raw_cuda_graph(self):
                assert keep_graph
                return 7

        return Graph()

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append(("capture", pool, stream.cuda_stream, capture_error_mode))
        if pool in self.recording:
            raise RuntimeError("already recording to mempool_id")
        before, self.current = self.current, stream
        self.recording.add(pool)
        self.shares[pool] += 1
        self.generator_captures = True
        try:
            yield
        except RuntimeError as error:
            if REFUSED in str(error):
                raise RuntimeError("failed due to a previous error during capture")  # noqa: B904
            self._end(graph, pool)
            raise
        self._end(graph, pool)
        self.current = before

    def _end(self, graph, pool):
        self.recording.remove(pool)
        graph.ended, self.generator_captures = True, False

    def end_allocate(self, index, pool):
        assert index == 0
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)

    def release_pool(self, index, pool):
        assert index == 0
        self.shares[pool] -= 1

    def graph_pool_handle(self):
        self.pools += 1
        return (0, POOL[1] + self.pools - 1)

    def get_allocator_backend(self):
        return "native"

    def synchronize(self, device):
        self.log.append(("host waits for", "device"))

    def memory_snapshot(self):
        return [
            {"segment_pool_id": pool, "total_size": size}
            for pool, size in ((POOL, 11), ((0, 0), 3))
        ]

    def empty_cache(self):
        self.log.append(("empty cache",))
