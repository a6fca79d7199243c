"""What only a build beside a CUDA torch compiles, checked without one: that it compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++20", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-DDDPM_FAST_WITH_CUDA", "-DUSE_CUDA"]
# As CMakeLists.txt has them: for torch's operators alone, which need no pybind11.
OF_TORCH = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
OF_TORCH += ["-isystem", str(Path(torch.__file__).parent / "include")]


@pytest.mark.parametrize("source", ["torch_step.cpp", "while_loop_bindings.cpp"])
def test_the_branch_with_cuda_compiles(source):
    cxx = shutil.which(os.environ.get("CXX", "c++").split(" ")[0])
    if cxx is None:
        pytest.skip("no C++ compiler")
    if source.startswith("torch"):
        own = OF_TORCH
    else:
        own = ["-isystem", pytest.importorskip("pybind11").get_include()]
    python = ["-isystem", sysconfig.get_path("include")]
    command = [cxx, *FLAGS, *own, *python, str(CSRC / source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:3000]
