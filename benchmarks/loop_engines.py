"""The sampling loops that bench_captured.py compares: whole runs of DDPM steps, same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gpu_measure import Bench, Run
from torch import Tensor, nn

from ddpm_fast.backend import BackendError, resolve_backend
from ddpm_fast.checkpoint import Model
from ddpm_fast.executor import ONE_LAUNCH, WHOLE
from ddpm_fast.inference import prepare
from ddpm_fast.plan import make_plan
from ddpm_fast.sampler import Sampler

try:
    from diffusers_peer import to_diffusers

    PEER, PEER_MISSING = "diffusers", ""
except (ImportError, RuntimeError) as error:  # the second, of what it imports lazily
    PEER, PEER_MISSING = "plain PyTorch (stand-in for diffusers)", str(error)

F32, BF16 = torch.float32, torch.bfloat16
EAGER, CAPTURED = "ddpm_fast eager", "ddpm_fast captured"
ONE = f"{CAPTURED}, one launch"
PLAIN = f"{CAPTURED}, network layer by layer"
COMPILED = ("reduce-overhead", "max-autotune")

Engine = Callable[[Bench, Model, int], Run]


def _compiled(bench: Bench, unet: nn.Module, mode: str) -> nn.Module:
    if bench.device.type == "cpu":  # where the benchmark only goes through the motions
        return unet
    torch.compiler.reset()
    return torch.compile(unet, mode=mode, dynamic=False)


def diffusers(bench: Bench, model: Model, n: int, dtype: torch.dtype, mode: str = "") -> Run:
    """DDPMPipeline's loop, without its pictures; `mode` of torch.compile, or none."""
    pipeline = to_diffusers(model)
    unet, scheduler = pipeline.unet.to(bench.device, dtype), pipeline.scheduler
    if bench.device.type == "cuda":
        unet = unet.to(memory_format=torch.channels_last)
    if mode:
        unet = _compiled(bench, unet, mode)
    scheduler.set_timesteps(bench.steps)
    # The network's timesteps lie on its device, which spares a copy; the scheduler reads its own.
    timesteps = list(zip(scheduler.timesteps, scheduler.timesteps.to(bench.device), strict=True))

    def run() -> Tensor:
        x = torch.randn(n, *model.config.sample_shape, device=bench.device, dtype=dtype)
        for t, given in timesteps:
            if mode:
                torch.compiler.cudagraph_mark_step_begin()
            x = scheduler.step(unet(x, given).sample, t, x).prev_sample
        return x

    return run


def stand_in(bench: Bench, model: Model, n: int, dtype: torch.dtype, mode: str = "") -> Run:
    """Where diffusers is absent: our U-Net as it is trained, and the update in plain PyTorch."""
    unet = prepare(model.unet, bench.device, dtype, fused=False)
    if mode:
        unet = _compiled(bench, unet, mode)
    plan = make_plan(model.schedule, "ddpm", bench.steps)
    timesteps = [torch.full((n,), t, device=bench.device) for t in plan.index[:, 0].tolist()]
    rows = list(zip(timesteps, plan.coefficients.tolist(), strict=True))

    def run() -> Tensor:
        x = torch.randn(n, *model.config.sample_shape, device=bench.device, dtype=dtype)
        for t, (a, b, c0, c1, _, _, sigma, *_) in rows:
            if mode:
                torch.compiler.cudagraph_mark_step_begin()
            pred_xstart = (a * x + b * unet(x, t)).clamp(-1, 1)
            x = c0 * pred_xstart + c1 * x + sigma * torch.randn_like(x)
        return x

    return run


def ours(bench: Bench, model: Model, n: int, **settings: object) -> Run:
    if bench.device.type == "cuda":
        settings["backend"] = _backend(bench)
    elif settings.get("graphs"):
        raise BackendError("there is nothing to capture on a CPU")
    settings |= {"device": bench.device, "dtype": BF16, "steps": bench.steps}
    sampler = Sampler.from_model(model, **settings)
    if settings.get("graphs"):
        sampler.capture([n])
    if settings.get("steps_per_graph") == WHOLE and sampler.loops.forms != [ONE_LAUNCH]:
        raise BackendError(f"not here: {sampler.loops.executor.loop_obstacle}")
    return lambda: [None for _ in sampler.batches(range(n), batch_size=n)]


def _backend(bench: Bench) -> str:
    try:
        return resolve_backend(bench.device, "cuda")[0]
    except BackendError:
        return resolve_backend(bench.device, "triton")[0]


peer = diffusers if PEER == "diffusers" else stand_in
# In the order in which they are prepared: what may fail comes last.
ENGINES: dict[str, Engine] = {
    f"{PEER} bfloat16": partial(peer, dtype=BF16),
    EAGER: ours,
    CAPTURED: partial(ours, graphs=True),
    f"{CAPTURED}, 10 steps a launch": partial(ours, graphs=True, steps_per_graph=10),
    PLAIN: partial(ours, graphs=True, fused=False),
    f"{PEER} float32": partial(peer, dtype=F32),
    ONE: partial(ours, graphs=True, steps_per_graph=WHOLE),
}
SLOW_TO_MAKE: dict[str, Engine] = {
    f"{PEER} bfloat16, compiled {mode}": partial(peer, dtype=BF16, mode=mode) for mode in COMPILED
}
