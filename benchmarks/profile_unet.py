"""Where an evaluation of a U-Net spends its time, layer kind by layer kind, plain and fused.

    python benchmarks/profile_unet.py [--model cifar10] [--batch-size 16] [--dtype auto]

A layer's time is its own, without the layers in it; the network's own is what lies between them.
For convolutions also the share of the speed of one that is measured in the same run (peers.py).
Goes to results/profile_unet.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import results
import torch
from networks import MODELS, inputs
from peers import CEILING_FLOP, ceiling
from torch import Tensor, nn

from ddpm_fast.device import resolve_dtype
from ddpm_fast.fused import Conv, UpsampleConv
from ddpm_fast.inference import FusedUNet, prepare

CPU = torch.device("cpu")


class Profile:
    """Hooks on every layer; `kinds` has the seconds and the FLOP of the last call by kind."""

    def __init__(self, network: nn.Module) -> None:
        self.kinds: dict[str, dict[str, float]] = {}
        self._inner: list[float] = []  # of each layer that is running, what those in it took
        self._began: list[float] = []
        for module in network.modules():
            if not isinstance(module, nn.ModuleList):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._began:
            self.kinds = defaultdict(lambda: {"seconds": 0.0, "flop": 0.0, "calls": 0})
        self._inner.append(0.0)
        self._began.append(time.perf_counter())

    def _leave(self, module: nn.Module, args: Any, out: Tensor) -> None:
        taken = time.perf_counter() - self._began.pop()
        own = taken - self._inner.pop()
        if self._inner:
            self._inner[-1] += taken
        kind, flop = type(module).__name__, 0.0
        weight = getattr(module, "weight", None)
        is_fused = isinstance(module, Conv | UpsampleConv) and not hasattr(module, "conv")
        shape = module.shape if is_fused else getattr(weight, "shape", ())
        if len(shape) > 2:
            taps = "x".join(map(str, shape[2:]))
            size = "x".join(map(str, out.shape[2:]))
            kind = f"convolution {taps} to {size}"
            flop = 2.0 * out.numel() * shape[1] * shape[2] * shape[3]
        row = self.kinds[kind]
        row["seconds"] += own
        row["flop"] += flop
        row["calls"] += 1


def breakdown(network: nn.Module, x: Tensor, t: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Per kind, the milliseconds of the median round, GFLOP and calls."""
    profile = Profile(network)
    taken = defaultdict(list)
    for done in range(rounds + 1):
        network(x, t)
        for kind, row in profile.kinds.items() if done else ():
            taken[kind].append(row)
    return {
        kind: {
            "ms": 1e3 * statistics.median(row["seconds"] for row in rows),
            "gflop": rows[0]["flop"] / 1e9,
            "calls": rows[0]["calls"],
        }
        for kind, rows in taken.items()
    }


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model", choices=MODELS, default="cifar10")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    model, dtype = MODELS[args.model](), resolve_dtype(args.dtype, CPU)
    x, t = inputs(model, args.batch_size)
    call = ceiling(dtype)
    call()
    times = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    speed = CEILING_FLOP / statistics.median(times)
    figures: dict[str, Any] = {"model": args.model, "batch_size": args.batch_size}
    figures |= {"dtype": str(dtype), "ceiling_gflops": speed / 1e9}
    for name, fused in (("plain", False), ("fused", True)):
        network = prepare(model.unet, CPU, dtype, fused)
        if isinstance(network, FusedUNet):
            network.expect(t.tolist())
            network._group_size = lambda batch_size: 0  # the hooks are for one thread
        rows = figures[name] = breakdown(
            network, x.to(getattr(network, "input_dtype", dtype)), t, args.rounds
        )
        print(f"{name}: {sum(row['ms'] for row in rows.values()):.1f} ms")
        for kind, row in sorted(rows.items(), key=lambda item: -item[1]["ms"]):
            if row["gflop"]:
                row["share"] = 1e12 * row["gflop"] / row["ms"] / speed
            share = f"{100 * row['share']:4.0f} % of the ceiling" if row["gflop"] else ""
            print(f"  {kind:32} {row['ms']:8.2f} ms {row['calls']:4} calls  {share}")
    print(results.write("profile_unet", figures))


if __name__ == "__main__":
    main()
