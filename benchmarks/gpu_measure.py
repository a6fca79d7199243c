"""How a whole run on a GPU is measured: seconds, launches, time that the GPU is busy, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Run = Callable[[], object]  # of all steps of a batch
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass
class Bench:
    """What every measurement shares, and what it finds."""

    device: torch.device
    steps: int
    deadline: float  # of time.time()
    rounds: int = 5
    peak_flops: float = 0.0  # of a bfloat16 matrix product
    left_out: dict[str, str] = field(default_factory=dict)  # engine or cell: why
    figures: dict[str, dict] = field(default_factory=dict)  # by model, batch and engine
    save: Callable[[], None] = lambda: None  # puts all this on the disk

    def left(self) -> float:
        return self.deadline - time.time()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gpu_is_lost(self) -> bool:
        """Whether an error has left nothing to be done on it in this process."""
        try:
            self.wait()
        except RuntimeError:
            return True
        return False

    def seconds(self, run: Run) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def launches(self, run: Run) -> dict[str, float]:
        """Calls that give the GPU work, kernels, and milliseconds that it is busy, each a step."""
        if self.device.type != "cuda":
            return {}
        # This one activity has the calls too, and not the many operators that slow a run down.
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            self.wait()
        events = profile.events()
        calls = sum(e.name.startswith(LAUNCHES) for e in events)
        on_gpu = torch.autograd.DeviceType.CUDA
        kernels = [e for e in events if e.device_type == on_gpu and not e.is_user_annotation]
        busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e3
        return {
            "launches": calls / self.steps,
            "kernels": len(kernels) / self.steps,
            "busy_ms": busy / self.steps,
        }

    def prepared(
        self, make: Callable[[], Run], profiled: bool = True
    ) -> tuple[Run, dict[str, float]]:
        """A run that has had its compiling or capturing, and the figures of that."""
        before = self._reserved_anew()
        began = time.perf_counter()
        run = make()
        run()
        self.wait()
        row = {"prepared_seconds": time.perf_counter() - began}
        self.seconds(run)
        if self.device.type == "cuda":
            row["peak_mib"] = (torch.cuda.max_memory_reserved(self.device) - before) / 2**20
        return run, row | (self.launches(run) if profiled else {})

    def _reserved_anew(self) -> int:
        """Bytes that others keep; the peak is counted from there."""
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_reserved(self.device)

    def matmul_peak(self) -> float:
        """FLOP/s of a bfloat16 product of random 8192 x 8192 matrices."""
        if self.device.type != "cuda":
            return 0.0
        a, b = (torch.randn(2, 8192, 8192, device=self.device)).bfloat16()
        for _ in range(3):
            a @ b
        return 2 * 8192**3 / min(self.seconds(lambda: a @ b) for _ in range(10))
