"""Benchmark results as JSON: with the device, the versions, the commit and the date."""

from __future__ import annotations

import json
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from ddpm_fast.device import device_name, resolve_device

FOLDER = Path(__file__).parent / "results"


def _cpu() -> str:
    """What /proc/cpuinfo says of the CPUs; empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def instruction_sets() -> list[str]:
    """Of those that decide the network's speed, the ones this CPU has."""
    flags = _cpu()
    return [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags]


def cpu_family() -> str:
    """Which generation it is, where a virtual machine hides that in the name."""
    found = re.search(r"^cpu family\s*: (\d+)\nmodel\s*: (\d+)", _cpu(), re.MULTILINE)
    return f"family {found[1]}, model {found[2]}" if found else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Empty in a copy that is no checkout, or where there is no git."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def write(name: str, figures: dict, folder: Path = FOLDER) -> Path:
    """Write `figures` under `name`, with what they were measured on; whole, or not at all."""
    packages = ("ddpm_fast", "torch", "numpy", "diffusers", "openvino", "triton")
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    document = {
        "device": device_name(resolve_device("auto")),
        "cpu_family": cpu_family(),
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "versions": {p: v for p in packages if (v := _version(p))},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "figures": figures,
    }
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    return beside.replace(path)
