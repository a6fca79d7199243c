"""run.json: what decides a run's pictures, and what can change a last bit of them."""

from __future__ import annotations

import json
import platform
from typing import Any

import numpy as np
import torch

from . import __version__, backend, noise
from .checkpoint import Model
from .device import device_name
from .inference import FusedUNet, convolutions
from .sampler import Sampler

NAME = "run.json"


def make_record(
    model: Model,
    sampler: Sampler,
    indices: range,
    settings: dict[str, Any],
    init: dict[str, str] | None,
) -> dict[str, Any]:
    """The record of a run of the samples `indices`.

    settings: of `Sampler.batches`. init: checksums of the images that the samples start from.
    Two runs whose "decides" is equal draw the same samples. "environment" may differ between them,
    and with it last bits of the network's sums.
    """
    decides = {
        "model_sha256": model.sha256,
        "conventions": model.conventions,
        "schedule": model.schedule.config(),
        **sampler.plan.describe(),
        "init": init,
        "classes": settings["classes"],
        "guidance": sampler.guidance_scale,
        "seed": settings["seed"],
        "noise_contract": noise.VERSION,
        "dtype": str(sampler.dtype).removeprefix("torch."),
    }
    is_fused = isinstance(sampler.network, FusedUNet)
    on_cpu = sampler.device.type == "cpu"
    environment = {
        "batch_size": settings["batch_size"],
        "backend": sampler.backend,
        "backend_reason": sampler.backend_reason,
        "graphs": sampler.graphs,
        "fused_network": is_fused,
        "convolutions": convolutions(sampler.dtype) if is_fused and on_cpu else None,
        "cpu_level": backend.extension.cpu_level() if sampler.backend == "cpu" else None,
        "device": sampler.device.type,
        "device_name": device_name(sampler.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "ddpm_fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    samples = {"model": model.name, "start": indices.start, "num_samples": len(indices)}
    record = {"decides": decides, "samples": samples, "environment": environment}
    return json.loads(json.dumps(record))  # as it will be read back


def to_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def parse(text: bytes) -> dict[str, Any] | None:
    """The record of an earlier run, or None if it cannot be read as one."""
    try:
        record = json.loads(text)
        parts = record["decides"], record.get("environment", {}), record.get("speed", {})
        lists = isinstance(record.get("earlier_environments", []), list)
        return record if lists and all(isinstance(part, dict) for part in parts) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings in which a part of an earlier record differs from that of this run, in words."""
    words = []
    for name in now:
        if there.get(name) != now[name]:
            pair = f": {there.get(name)} there, {now[name]} now"
            words.append(name + pair if len(pair) < 100 else name)
    return ", ".join(words)


def continue_from(earlier: dict[str, Any], record: dict[str, Any], draws: bool) -> None:
    """Keep in `record` what the samples that are there were computed with, and how fast.

    draws: whether any will be computed now; else the record stays as it was.
    """
    if not draws:
        kept = ("environment", "earlier_environments", "speed")
        record.update({name: earlier[name] for name in kept if name in earlier})
        return
    environments = [earlier.get("environment", {}), *earlier.get("earlier_environments", ())]
    others = [e for e in environments if isinstance(e, dict) and e != record["environment"]]
    if others:
        record["earlier_environments"] = others
    if "speed" in earlier:
        record["speed"] = earlier["speed"]
