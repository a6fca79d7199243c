"""make test-gpu's own machinery, on tests that pass, fail, crash, hang and lose a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SESSION = Path(__file__).parent / "gpu_session.py"
TESTS = """
import os, sys, time, types
import pytest

def test_first():
    pass

def test_fails():
    assert 1 == 2, "one is two"

def test_crashes():
    os._exit(9)

def test_hangs():
    time.sleep(60)

def test_loses_the_gpu():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    assert False, "illegal"

def test_skips():
    pytest.skip("no second GPU")

def test_last():
    assert "torch" not in sys.modules
"""


def session(folder: Path, *more: str) -> tuple[int, dict]:
    path = folder / "out.json"
    command = [sys.executable, SESSION, "--json", path, "--longest", "2", *more, "test_a.py"]
    done = subprocess.run([*map(str, command), "test_b.py"], cwd=folder, capture_output=True)
    return done.returncode, json.loads(path.read_text())


def test_no_test_hides_another(tmp_path):
    (tmp_path / "test_a.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "test_b.py").write_text(TESTS)
    status, document = session(tmp_path, "--processes", "2")
    assert status == 1 and document["finished"] and document["running"] == []
    assert document["passed"] == ["test_b.py::test_first", "test_b.py::test_last"]
    assert [path.name for path in tmp_path.glob("*.json")] == ["out.json"]
    assert document["reasons"] == {"no second GPU": 1}
    failed = {name.split("::")[-1]: why for name, why in document["failed"].items()}
    assert "No module named 'a_package_that_is_missing'" in failed.pop("test_a.py")
    assert failed.pop("test_fails").startswith("AssertionError: one is two")
    assert failed.pop("test_crashes") == "the process ended in this test"
    assert failed.pop("test_hangs") == "it took more than 2 s"
    assert "the GPU was lost: CUDA error: an illegal memory" in failed.pop("test_loses_the_gpu")
    assert not failed


def test_a_session_in_which_nothing_passed_is_no_success(tmp_path):
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text("# none")
    status, document = session(tmp_path)
    assert status == 1 and document["finished"] and not document["failed"]


def test_what_is_done_is_kept(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_first(): pass\n")
    (tmp_path / "test_b.py").write_text("import time\ndef test_slow(): time.sleep(1)\n")
    status, document = session(tmp_path, "--budget", "1")
    assert status == 1 and not document["finished"] and not document["failed"]
    status, document = session(tmp_path, "--resume", "--budget", "30")
    assert status == 0 and document["finished"]
    assert document["passed"] == ["test_a.py::test_first", "test_b.py::test_slow"]
