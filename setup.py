"""Drives CMake, which owns the build: sources, flags and instruction sets are in CMakeLists.txt.

MAX_JOBS: parallel compilations (default: the CPUs). CMAKE_ARGS: more arguments for CMake, as in
CMAKE_ARGS=-DDDPM_FAST_CUDA=OFF.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, needed_for: str, *alternatives: str) -> str:
    # Tools that pip installed lie beside this Python, also where its venv is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for candidate in (name, *alternatives):
        found = shutil.which(candidate, path=path)
        if found:
            return found
    sys.exit(f"ddpm_fast: building needs {name}, which was not found: {needed_for}.")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake = find_tool("cmake", "pip install cmake, or install it with the system's packages")
        ninja = find_tool("ninja", "pip install ninja, or install it with the system's packages")
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++", "g++", "clang++"]
        find_tool(compiler[0], "install a C++ compiler (Debian, Ubuntu: g++)", *compiler[1:])

        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parents[1]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (
            configure,
            [cmake, "--build", str(build), "--parallel", jobs],
            [cmake, "--install", str(build), "--prefix", str(prefix)],
        ):
            if subprocess.run(command).returncode:
                sys.exit(f"ddpm_fast: the build failed in `{shlex.join(command)}`; see above.")


setup(ext_modules=[Extension("ddpm_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
