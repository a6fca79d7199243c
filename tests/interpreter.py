"""Triton's interpreter, which is chosen before triton is imported: so in a process of its own.

What older versions of it compute otherwise than a GPU is mended here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.lib import NumpyVersion

from ddpm_fast import noise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in test_in_the_interpreter's process"
)


def run_in_the_interpreter(file: str) -> None:
    import triton

    if NumpyVersion(triton.__version__) < "3.7.0" and NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter before 3.7 cannot index by the arrays of NumPy 2.4")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def _fuse_multiply_adds() -> None:
    """An older Triton's interpreter rounds the product, too: there it gets the reference's fma."""
    from triton.runtime import interpreter

    if hasattr(interpreter._interpreter, "fma_fp32"):
        return
    rounded_twice = interpreter.InterpreterBuilder.create_fma

    def create_fma(self: object, x: object, y: object, z: object) -> object:
        if z.data.dtype != np.float32:
            return rounded_twice(self, x, y, z)
        return interpreter.TensorHandle(noise.fma32(x.data, y.data, z.data), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


if INTERPRETED and importlib.util.find_spec("triton"):
    _fuse_multiply_adds()
