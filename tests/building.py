"""Building C++ in a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Tools that pip installed lie beside this Python, also where its venv is not activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def tool(*names: str) -> str:
    """The first of these programs that is there; without one the test is skipped, in CI failed."""
    found = next((f for name in names if (f := shutil.which(name, path=PATH))), None)
    if found is None:
        message = f"none of {', '.join(names)} was found"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


def cxx() -> str:
    return tool(*filter(None, [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]))


def run(*command: object, **options) -> str:
    """The command's output; that it succeeds is asserted."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-5000:])
    return done.stdout


def configure(source: Path, build: Path, *options: str, **keywords) -> None:
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    compiler = f"-DCMAKE_CXX_COMPILER={cxx()}"
    run(tool("cmake"), "-S", source, "-B", build, *generator, compiler, *options, **keywords)
