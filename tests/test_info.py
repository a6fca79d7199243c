"""`python -m ddpm_fast.info`."""

import os
import subprocess
import sys

from ddpm_fast import backend, info


def test_the_report_names_the_choice_and_its_reason():
    lines, has_triton = dict(info.report()), not backend.triton_obstacle()
    assert lines["noise contract"] == "version 1"
    assert lines["backend on cpu"].split()[0] in ("cpu", "reference")
    if backend.extension is not None:
        assert "never run on a GPU" in lines["CUDA kernels"]
        assert "never run on a GPU" in lines["network on a GPU"] or not has_triton
        assert backend.extension.cpu_level() in lines["CPU levels here"]
        for name in ("mnist", "Ho et al.'s CIFAR-10 U-Net"):
            assert ", 0 of them unfused, " in lines[name]


def test_the_command_prints_the_report():
    run = subprocess.run(
        [sys.executable, "-m", "ddpm_fast.info"], capture_output=True, text=True, check=True
    )
    assert "backend on cpu" in run.stdout and run.stderr == ""


def test_a_backend_without_a_cpu_is_reported():
    run = subprocess.run(
        [sys.executable, "-m", "ddpm_fast.info"],
        env={**os.environ, "DDPM_FAST_BACKEND": "triton"},
        capture_output=True,
        text=True,
    )
    assert "the tensors are on cpu" in run.stdout and run.stderr == ""


def test_a_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(backend, "extension", None)
    monkeypatch.setattr(backend, "extension_error", "missing (No module named 'ddpm_fast._C')")
    lines = dict(info.report())
    assert "missing" in lines["extension"] and "pip install" in lines["extension"]
