"""CUDA-graph capture and replay of one sampling step."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CapturedStep:
    """A function of static buffers, captured once and replayed without the host.

    `step` must read and write only tensors that stay where they are. It runs a few times before
    the capture, so that libraries choose their algorithms outside it: whoever replays sets the
    buffers afresh afterwards.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, warm_up: int = 3) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warm_up):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            try:
                with torch.cuda.graph(self.graph, stream=stream):
                    step()
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise RuntimeError(f"the network cannot be captured: {reason}") from None

    def __call__(self) -> None:
        self.graph.replay()
