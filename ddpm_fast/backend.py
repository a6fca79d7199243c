"""Which implementation of the operators is used, and why.

The tensor's device picks CPU or CUDA. `DDPM_FAST_BACKEND` overrides "auto". What is asked for
explicitly and cannot be had raises BackendError; what was chosen automatically may fall back to
the reference, with one warning. A network prepared for a CPU follows: on the reference, its norms
are PyTorch's and its convolutions oneDNN's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from . import tile_trial

# Backends that are only used where they are asked for by name.
UNPROVEN = ("cuda", "triton")
_UNPROVEN_HOW = "never run on a GPU, so to be asked for by name"
NAMES = ("auto", "cpu", "cuda", "triton", "reference")
BUILD_HINT = "build it with `pip install --no-build-isolation -e .` in the source tree"


class BackendError(RuntimeError):
    """A backend was asked for by name and is not available here."""


def _changed_source(built_from: str) -> str:
    """The first source that is not what the extension was built from; "" where there is none.

    built_from: "path=SHA-256 path=SHA-256 ...", of all that CMake makes the extension of beside the
    kernels: nobody has to count versions. Where no sources lie beside the package, it was installed
    together with the extension.
    """
    root = Path(__file__).parents[1]
    if not (root / "csrc").is_dir():
        return ""
    for entry in built_from.split():
        path, digest = entry.split("=")
        source = root / path
        if not source.exists() or hashlib.sha256(source.read_bytes()).hexdigest() != digest:
            return path
    return ""


def _load() -> tuple[ModuleType | None, str]:
    """The compiled extension; or None, and what it is instead."""
    try:
        from . import _C
    except ImportError as error:
        return None, f"missing ({error})"
    # The default is for an extension from before they told their sources.
    changed = _changed_source(_C.build_config().get("sources", "csrc/bindings.cpp="))
    if changed:
        return None, f"out of date (it was built from another {changed})"
    return _C, ""


extension, extension_error = _load()


def is_available() -> bool:
    """Whether the compiled extension was found, and belongs to this package."""
    return extension is not None


def cpu_level() -> str:
    """The extension's instruction-set level, once AMX's tiles had their trial."""
    tile_trial.settle(extension)
    return extension.cpu_level()


def conv_kernels(dtype: torch.dtype) -> str | None:
    """The instruction set of `ops.conv2d` on this CPU, at the level in use; None if it has none."""
    if extension is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    if dtype == torch.bfloat16:
        tile_trial.settle(extension)
    return extension.conv_kernels(dtype == torch.bfloat16)


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether `ops.conv2d` and `ops.attention` have AMX, with which Winograd's algorithm is not
    worth what it costs."""
    return conv_kernels(dtype) == tile_trial.LEVEL


def has_attention(dtype: torch.dtype) -> bool:
    """Whether `ops.attention` is there on this CPU, at the level in use."""
    if extension is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.bfloat16:
        tile_trial.settle(extension)
    return extension.has_attention(dtype == torch.bfloat16)


def is_overridden() -> bool:
    """Whether DDPM_FAST_BACKEND says what "auto" is."""
    return os.environ.get("DDPM_FAST_BACKEND", "").strip() not in ("", "auto")


def _missing() -> str:
    return f"the compiled extension is {extension_error}; {BUILD_HINT}"


def _cpu(device: torch.device) -> tuple[bool, str]:
    if device.type != "cpu":
        return False, f"the tensors are on {device.type}"
    if extension is None:
        return False, _missing()
    try:
        extension.cpu_level()
    except RuntimeError as error:  # DDPM_FAST_CPU asks for what is not there
        raise BackendError(str(error)) from error
    return True, "compiled kernels"


def _cuda(device: torch.device) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, f"the tensors are on {device.type}"
    if extension is None:
        return False, _missing()
    if not extension.build_config()["cuda_linked"]:
        return False, "this build has no CUDA kernels; build it with nvcc beside a CUDA torch"
    return True, "compiled CUDA kernels"


def triton_obstacle() -> str:
    """Why the Triton kernels cannot be compiled; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return ""


def _triton(device: torch.device) -> tuple[bool, str]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU
    if device.type != "cuda" and not interpreted:
        return False, f"the tensors are on {device.type}"
    obstacle = triton_obstacle()
    return not obstacle, obstacle or "Triton kernels" + ", interpreted" * interpreted


def unproven(name: str) -> str:
    """What to know of a backend before it is used; empty where there is nothing."""
    return _UNPROVEN_HOW if name in UNPROVEN else ""


def _reference(device: torch.device) -> tuple[bool, str]:
    return True, "plain PyTorch and NumPy"


_PROBES = {"cpu": _cpu, "cuda": _cuda, "triton": _triton, "reference": _reference}


def _automatic(device: torch.device) -> tuple[str, str]:
    reasons = []
    for name in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        available, reason = _PROBES[name](device)
        if available and name not in UNPROVEN:
            return name, reason
        reasons.append(f"{name}: {reason}" + (f", {_UNPROVEN_HOW}" if available else ""))
    reason = "; ".join(reasons)
    warnings.warn(f"ddpm_fast uses its slow reference: {reason}.", stacklevel=4)
    return "reference", reason


@cache
def _resolve(device_type: str, requested: str) -> tuple[str, str]:
    device = torch.device(device_type)
    source = "it was asked for"
    if requested == "auto" and is_overridden():
        requested = os.environ["DDPM_FAST_BACKEND"].strip()
        source = "DDPM_FAST_BACKEND asks for it"
    if requested not in NAMES:
        raise BackendError(f"the backend must be one of {', '.join(NAMES)}, not {requested!r}.")
    if requested == "auto":
        return _automatic(device)
    available, reason = _PROBES[requested](device)
    if not available:
        raise BackendError(f"the backend {requested!r} is not available: {reason}.")
    if requested in UNPROVEN:
        reason += f" ({unproven(requested)})"
    return requested, f"{source}: {reason}"


def resolve_backend(device: torch.device | str, requested: str = "auto") -> tuple[str, str]:
    """(name, reason) of the backend for tensors on `device`.

    requested: "auto", "cpu", "cuda", "triton" or "reference". Raises BackendError if what is asked
    for, here or in DDPM_FAST_BACKEND, is not available. Answers are kept for the process.
    """
    device_type = device.type if isinstance(device, torch.device) else torch.device(device).type
    return _resolve(device_type, requested)


# What torch.compiler.assume_constant_result does, without its import of all of torch._dynamo, which
# would be half of every command's start.
resolve_backend._dynamo_marked_constant = True
