"""Which backend is chosen, and what happens without the compiled extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import ROOT

from ddpm_fast import backend, info, ops
from ddpm_fast.fused import Norm
from ddpm_fast.inference import prepare, unfused

pytestmark = pytest.mark.skipif(
    backend.extension is None, reason=f"the compiled extension is {backend.extension_error}"
)


def python(code, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_backend_choice():
    name, reason = ops.resolve_backend("cpu")
    if not os.environ.get("DDPM_FAST_BACKEND"):
        assert name == "cpu" and "compiled kernels" in reason
    assert ops.resolve_backend("cpu", "reference")[0] == "reference"
    backend._resolve.cache_clear()
    with pytest.warns(UserWarning, match="slow reference: cuda: .*; triton: "):
        assert ops.resolve_backend("cuda")[0] == "reference"
    for asked in ("cuda", "triton", "tpu"):
        with pytest.raises(ops.BackendError):
            ops.resolve_backend("cpu", asked)


def test_environment_chooses_the_backend(monkeypatch):
    backend._resolve.cache_clear()
    monkeypatch.setenv("DDPM_FAST_BACKEND", "reference")
    assert ops.resolve_backend("cpu")[0] == "reference"
    backend._resolve.cache_clear()
    monkeypatch.setenv("DDPM_FAST_BACKEND", "triton")
    with pytest.raises(ops.BackendError, match="the tensors are on cpu"):
        ops.resolve_backend("cpu")
    backend._resolve.cache_clear()


def test_environment_chooses_a_prepared_networks_backend(monkeypatch, tiny_unet):
    unet, x, t = tiny_unet(), torch.randn(2, 1, 8, 8), torch.tensor([3, 70])
    networks = [prepare(unet, torch.device("cpu"), torch.float32)]
    monkeypatch.setenv("DDPM_FAST_BACKEND", "reference")
    backend._resolve.cache_clear()
    try:
        networks.append(prepare(unet, torch.device("cpu"), torch.float32))
        lines = dict(info.report())
    finally:
        monkeypatch.undo()
        backend._resolve.cache_clear()
    assert lines["float32 convolutions"] == lines["bfloat16 convolutions"] == "oneDNN's"
    assert len(unfused(networks[1])) == sum(isinstance(m, Norm) for m in networks[1].modules())
    torch.testing.assert_close(networks[1](x, t), networks[0](x, t), rtol=1e-4, atol=1e-4)


def test_environment_chooses_the_level():
    code = """
import os
from ddpm_fast import backend
try:
    backend.extension.cpu_level()
except RuntimeError as error:
    print(error)
os.environ["DDPM_FAST_CPU"] = "baseline"
print("in use:", backend.cpu_level())
"""
    run = python(code, DDPM_FAST_CPU="vax")
    assert "not available here" in run.stdout, run.stderr
    assert "in use: baseline" in run.stdout


def test_info_says_that_a_level_is_not_there():
    run = python("from ddpm_fast import info; info.main()", DDPM_FAST_CPU="vax")
    assert run.returncode == 0 and "backend on cpu" in run.stdout, run.stderr
    assert run.stdout.count('the CPU level "vax"') == 2


def test_without_the_extension_the_reference_is_used_with_one_warning():
    code = """
import sys, warnings
sys.modules["ddpm_fast._C"] = None
import torch
from ddpm_fast import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ops.randn(torch.arange(1), torch.arange(1), (4,))
print(len(caught), caught[0].message)
x = torch.zeros(1, 1, 1, 1)
calls = (
    lambda: ops.pack_conv2d(x, x.dtype),
    lambda: ops.conv2d(x, x, None, None, 1, *[[1, 1]] * 3),
    lambda: ops.upsample_conv2d(x, x, None, 1),
    lambda: ops.attention(x, x, x),
)
for call in calls:
    try:
        call()
    except ops.BackendError as error:
        print(error)
ops.resolve_backend("cpu", "cpu")
"""
    run = python(code, DDPM_FAST_BACKEND="")
    assert run.stdout.startswith("1 ") and run.stdout.count("pip install") == 5, run.stderr
    assert "BackendError" in run.stderr


def test_an_extension_of_other_sources_is_not_used(tmp_path):
    """As after an update that was not followed by a build."""
    (tmp_path / "ddpm_fast").symlink_to(Path(backend.__file__).parent)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    with (tmp_path / "csrc" / "torch_ops.cpp").open("a") as file:
        file.write("// changed\n")
    code = """
import warnings
import torch
from ddpm_fast import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ops.randn(torch.arange(1), torch.arange(1), (4,))
print(len(caught), caught[0].message)
ops.attention(*[torch.zeros(1, 1, 1, 1)] * 3)
"""
    run = python(code, tmp_path, DDPM_FAST_BACKEND="")
    why = "the compiled extension is out of date (it was built from another csrc/torch_ops.cpp)"
    assert run.stdout.startswith("1 ddpm_fast uses its slow reference") and why in run.stdout
    last = run.stderr.splitlines()[-1]
    assert "BackendError" in last and f"{why}; {backend.BUILD_HINT}" in last, run.stderr


def test_every_source_of_the_extension_counts(extension, monkeypatch, tmp_path):
    built_from = extension.build_config()["sources"]
    paths = [entry.split("=")[0] for entry in built_from.split()]
    assert {"csrc/torch_ops.cpp", "csrc/bindings.cpp"} <= set(paths)
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "ddpm_fast" / "backend.py"))
    assert backend._load() == (extension, "")  # as installed, without sources
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert backend._load() == (extension, "")
    for path in paths:
        source = tmp_path / path
        text = source.read_bytes()
        for change in (lambda: source.write_bytes(text[1:]), source.unlink):  # noqa: B023
            change()
            assert backend._changed_source(built_from) == path
        source.write_bytes(text)
    monkeypatch.setattr(extension, "build_config", dict)  # as before it told its sources
    assert backend._load()[0] is None
