"""Triton's interpreter, which is chosen before triton is imported: so in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in test_in_the_interpreter's process"
)


def run_in_the_interpreter(file: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
