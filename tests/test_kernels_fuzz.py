"""The C++ kernels under the address and undefined-behaviour sanitizers; see *_fuzz.cpp."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
SANITIZERS = "address,undefined"


def tool(*names):
    found = next((f for name in names if (f := shutil.which(name, path=PATH))), None)
    return found or pytest.skip(f"none of {', '.join(names)} was found")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A C++ compiler whose programs run with the sanitizers."""
    cxx = tool(*filter(None, [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]))
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    build = [cxx, f"-fsanitize={SANITIZERS}", "empty.cpp", "-o", "empty"]
    for command in (build, [str(folder / "empty")]):
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"{cxx} has no working {SANITIZERS} sanitizers: {run.stderr[-200:]}")
    return cxx


def test_kernels_under_sanitizers(compiler, tmp_path):
    cmake, ninja = tool("cmake"), tool("ninja")
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path)]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    configure += [f"-DDDPM_FAST_SANITIZE={SANITIZERS}"]
    for command in (configure, [cmake, "--build", str(tmp_path)]):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    for program, cases in (("kernels_fuzz", "2000"), ("norm_fuzz", "300"), ("conv_fuzz", "300")):
        run = subprocess.run([str(tmp_path / program), cases], capture_output=True, text=True)
        assert run.returncode == 0 and "agree" in run.stdout, run.stdout + run.stderr[-5000:]
