"""Kernels compiled ahead of time: their PTX, their machine code, and what they use."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ARCHITECTURES = (80, 90)
triton_missing = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(triton_missing, reason="triton is not installed")


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None and not triton_missing:
        package = Path(importlib.util.find_spec("triton").origin).parent
        found = shutil.which("cuobjdump", path=str(package / "backends" / "nvidia" / "bin"))
    return found


@dataclass
class Kernel:
    """One kernel's PTX, machine code and resources."""

    name: str
    ptx: str
    sass: str
    resources: dict[str, int]

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    def accesses(self) -> set[str]:
        return set(re.findall(r"\b(?:LDG|STG)\.E[.\w]*", self.sass))


def read_kernels(cubin: Path, ptx: str) -> list[Kernel]:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's is here")

    def dump(option: str) -> str:
        return subprocess.run(
            [tool, option, str(cubin)], capture_output=True, text=True, check=True
        ).stdout

    used = dict(re.findall(r"Function (\S+):\s+(REG.*)", dump("--dump-resource-usage")))
    machine = dict(re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", dump("--dump-sass"), re.S))
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", ptx, re.S))
    assert used.keys() == machine.keys() == entries.keys() and used
    return [
        Kernel(
            name,
            entries[name],
            machine[name],
            {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)},
        )
        for name, line in used.items()
    ]
