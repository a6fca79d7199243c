"""Intel AMX's instructions on a CPU that has none; see amx_emulator.cpp."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from building import ROOT, cxx, run

# In the order of amx_emulator_counts.
INSTRUCTIONS = ("ldtilecfg", "sttilecfg", "tilerelease", "tilezero")
INSTRUCTIONS += ("tileloadd", "tileloaddt1", "tilestored", "tdpbf16ps")
AMX = ("-mamx-tile", "-mamx-bf16")


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def skip_without_emulation() -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("AMX is emulated on x86-64 Linux only")
    if "amx_tile" in _cpu_flags():
        pytest.skip("this CPU has AMX itself: its instructions are not illegal")
    if missing := {"avx2", "fma"} - _cpu_flags():
        pytest.skip(f"AMX is emulated with {' and '.join(sorted(missing))}, which this CPU lacks")
    probed = [cxx(), *AMX, "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probed, input="", capture_output=True, text=True).returncode:
        pytest.skip(f"{cxx()} does not know {' '.join(AMX)}")


def build_library(path: Path, *sources: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    strict = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    run(cxx(), *strict, *flags, *sources, "-o", path)
    return ctypes.CDLL(str(path))


def build_emulator(folder: Path) -> ctypes.CDLL:
    """The emulator, not yet installed; skips where it cannot work, or is not needed."""
    skip_without_emulation()
    return build_library(folder / "libamx_emulator.so", ROOT / "tests" / "amx_emulator.cpp")


@contextlib.contextmanager
def emulated(emulator: ctypes.CDLL) -> Iterator[Callable[[], dict[str, int]]]:
    """AMX's instructions work inside. Gives a function: how many of each were carried out."""
    counts = (ctypes.c_uint64 * len(INSTRUCTIONS))()

    def counted() -> dict[str, int]:
        emulator.amx_emulator_counts(counts)
        return dict(zip(INSTRUCTIONS, counts, strict=True))

    emulator.amx_emulator_reset_counts()
    emulator.amx_emulator_install()
    try:
        yield counted
    finally:
        emulator.amx_emulator_remove()
