"""`python -m ddpm_fast.info`: what is installed and built, which backend is used and why, and what
of a network runs unfused on this CPU.
"""

from __future__ import annotations

import platform
import sys
import warnings
from importlib import metadata

import torch

from . import backend, graphs, noise, tile_trial
from .checkpoint import SHIPPED, load_model
from .device import DTYPES, resolve_dtype
from .executor import WHOLE
from .fused import CpuLayers
from .inference import FusedUNet, convolutions, unfused
from .sampler import STEPS_PER_GRAPH
from .unet import UNet
from .unet_config import UNetConfig


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _choice(device: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name, reason = backend.resolve_backend(device)
    except backend.BackendError as error:
        return f"none: {error}"
    return f"{name} ({reason})"


def _cpu_levels() -> str:
    if backend.extension is None:
        return "none"
    try:
        used = backend.cpu_level()
    except RuntimeError as error:
        return f"none: {error}"
    said = tile_trial.verdict()
    available = ", ".join(backend.extension.cpu_levels_available())
    return f"{available}; in use: {used}" + f" ({tile_trial.LEVEL}: {said})" * bool(said)


def _networks() -> list[tuple[str, str]]:
    """Of the shipped models and of Ho et al.'s, how many layers run as PyTorch's own operators."""
    with torch.device("meta"):
        cifar10 = UNet(UNetConfig())
    unets = {"Ho et al.'s CIFAR-10 U-Net": cifar10.to_empty(device="cpu")}
    lines = []
    for name in SHIPPED:
        try:
            unets[name] = load_model(name).unet
        except ValueError as error:
            lines.append((name, str(error)))
    dtype = resolve_dtype("auto", torch.device("cpu"))
    for name, unet in unets.items():
        network = FusedUNet(unet, CpuLayers(dtype))
        left = unfused(network)
        layers = sum(hasattr(module, "is_fused") for module in network.modules())
        which = f" ({', '.join(left)})" if left else ""
        kind = str(dtype).removeprefix("torch.")
        lines.append((name, f"{layers} layers, {len(left)} of them unfused{which}, {kind}"))
    return lines


def _prepared() -> list[tuple[str, str]]:
    """Of networks prepared for this CPU; nothing where the backend that is asked for has no CPU."""
    try:
        backend.resolve_backend("cpu")
    except backend.BackendError:
        return []
    kinds = ("float32", "bfloat16")
    return [(f"{name} convolutions", convolutions(DTYPES[name])) for name in kinds] + _networks()


def _gpu_network() -> str:
    """What a prepared network is made of on a GPU."""
    obstacle = backend.triton_obstacle()
    if obstacle:
        return f"PyTorch's: {obstacle}"
    return _with_caution("cuDNN's convolutions, Triton's kernels, with cuda or triton", "triton")


def report() -> list[tuple[str, str]]:
    """The lines as (name, value)."""
    lines = [
        ("ddpm_fast", _version("ddpm_fast")),
        ("noise contract", f"version {noise.VERSION}"),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        *((package, _version(package)) for package in ("torch", "numpy", "triton")),
        ("threads", str(torch.get_num_threads())),
    ]
    if backend.extension is None:
        lines.append(("extension", f"{backend.extension_error}; {backend.BUILD_HINT}"))
    else:
        config = backend.extension.build_config()
        lines += [
            ("extension", f"built by {config['compiler']} ({config['build_type']})"),
            ("built for torch", config["torch"]),
            ("CPU levels built", ", ".join(config["cpu_levels"])),
            ("CPU levels here", _cpu_levels()),
            ("CUDA kernels", _cuda_kernels(config)),
        ]
    lines.append(("Triton kernels", _triton_kernels()))
    lines.append(("network on a GPU", _gpu_network()))
    lines.append(("captured loop", _captured_loop()))
    lines.append(("backend on cpu", _choice("cpu")))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            lines.append((f"backend on cuda:{i}", _choice(f"cuda:{i}")))
            lines.append((f"cuda:{i}", torch.cuda.get_device_name(i)))
    else:
        lines.append(("backend on cuda", "none: torch sees no CUDA device"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lines + _prepared()


def _cuda_kernels(config: dict[str, object]) -> str:
    state = "linked" if config["cuda_linked"] else "not compiled"
    if config["cuda_compiled"] and not config["cuda_linked"]:
        state = "compiled as a check, not linked (torch is a CPU build)"
    return _with_caution(state, "cuda")


def _triton_kernels() -> str:
    return _with_caution(backend.triton_obstacle() or "compiled at the first call", "triton")


def _captured_loop() -> str:
    obstacle = graphs.while_loop_obstacle()
    if not torch.cuda.is_available():
        obstacle = "torch sees no CUDA device"
    whole = f"not: {obstacle}" if obstacle else f"asked for by steps_per_graph={WHOLE!r}"
    return f"{STEPS_PER_GRAPH} step a launch; the whole loop as one launch: {whole}"


def _with_caution(state: str, name: str) -> str:
    caution = backend.unproven(name)
    return f"{state}; {caution}" if caution else state


def main() -> int:
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
