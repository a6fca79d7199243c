"""The C++ kernels under the address and undefined-behaviour sanitizers; see *_fuzz.cpp."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from building import ROOT, configure, cxx, run, tool

SANITIZERS = "address,undefined"


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """Only with a compiler whose programs run with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    build = [cxx(), f"-fsanitize={SANITIZERS}", "empty.cpp", "-o", "empty"]
    for command in (build, [str(folder / "empty")]):
        tried = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"{cxx()} has no working {SANITIZERS} sanitizers: {tried.stderr[-200:]}")


def test_kernels_under_sanitizers(sanitizers, tmp_path):
    configure(ROOT, tmp_path, f"-DDDPM_FAST_SANITIZE={SANITIZERS}")
    run(tool("cmake"), "--build", tmp_path)
    cases = {"kernels_fuzz": 2000, "norm_fuzz": 300, "conv_fuzz": 300, "attention_fuzz": 300}
    with ThreadPoolExecutor() as pool:  # each uses one core
        for said in pool.map(lambda program: run(tmp_path / program, str(cases[program])), cases):
            assert "agree" in said
