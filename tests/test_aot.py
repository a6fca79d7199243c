"""The CUDA and Triton kernels compiled ahead of time for sm_80 and sm_90, which needs no GPU.

What is asserted is read from the machine code (cuobjdump) and the PTX: at most 64 registers, no
stack and no spill; 16-byte accesses where everything is contiguous; and only IEEE operations, with
fused multiply-adds where the noise contract has them and nowhere else.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from machine_code import ARCHITECTURES, Kernel, needs_triton, read_kernels

ROOT = Path(__file__).resolve().parents[1]
# Fused multiply-adds of one counter's four normals: two radii (11 each), two angles (8 each).
NORMALS = 2 * (11 + 8)
EXPONENTIAL = 8  # of one element, with learned variances

# What nvcc says of an architecture and of a host compiler that it does not know.
NOT_FOR_THIS_NVCC = re.compile(
    r"nvcc fatal\s*: Unsupported gpu architecture '\w+'"
    r"|#error -- unsupported (?:GNU|clang) version!.*"
)


def check_resources(kernel: Kernel) -> None:
    assert kernel.resources["REG"] <= 64, kernel.name
    assert kernel.resources["STACK"] == kernel.resources["LOCAL"] == 0, kernel.name
    assert not re.search(r"\b(?:LDL|STL)\b", kernel.sass), kernel.name


def check_rounding(kernel: Kernel, fused: int) -> None:
    """Every operation says .rn: PTX lets the assembler contract a mul and an add that do not."""
    assert not re.search(r"\.approx|\.ftz|div\.full|\bmad\.\w*\.?f32", kernel.ptx), kernel.name
    assert not re.search(r"\b(?:mul|add|sub|div|sqrt)\.f32", kernel.ptx), kernel.name
    assert kernel.count(r"\bfma\.") == kernel.count(r"\bfma\.rn\.f32") == fused, kernel.name
    assert kernel.count(r"\bmul\.rn\.f32") > 0, kernel.name


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda cc: f"sm_{cc}")
def cuda_kernels(request, tmp_path_factory) -> list[Kernel]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    build = (ROOT / "CMakeLists.txt").read_text()
    flags = re.search(r"target_compile_options\(cuda_kernels PRIVATE (.*)\)", build)[1].split()
    kernels = []
    for source in ("noise", "step"):
        cubin = folder / f"{source}.cubin"
        command = [nvcc, "-std=c++20", "-O3", *flags, f"-arch=sm_{request.param}", "-cubin"]
        command += ["--keep", "--keep-dir", str(folder), "-o", str(cubin)]
        command.append(str(ROOT / "csrc" / "cuda" / f"{source}.cu"))
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode and (refusal := NOT_FOR_THIS_NVCC.search(run.stderr)):
            pytest.skip(f"this nvcc cannot compile it: {refusal[0]}")
        assert run.returncode == 0, run.stderr
        kernels += read_kernels(cubin, (folder / f"{source}.ptx").read_text())
    return kernels


def together(kernel: Kernel) -> bool:
    """Whether it is an instantiation for quads that move at once (csrc/cuda)."""
    return re.search(r"Lb1E|PathE[12]E", kernel.name) is not None


def test_cuda_resources(cuda_kernels):
    assert len(cuda_kernels) == 2 * 2 + 3 * 3  # randn, q_sample; a step per dtype and path
    for kernel in cuda_kernels:
        check_resources(kernel)


def test_cuda_accesses(cuda_kernels):
    for kernel in filter(together, cuda_kernels):
        assert "STG.E.128" in kernel.accesses(), kernel.name
        if "randn" not in kernel.name:
            assert "LDG.E.128" in kernel.accesses(), kernel.name
        if "half" in kernel.name or "bfloat16" in kernel.name:
            assert "LDG.E.64" in kernel.accesses(), kernel.name
            assert "STG.E.U16" not in kernel.accesses(), kernel.name
    assert sum(map(together, cuda_kernels)) == 2 + 3 * 2


def test_cuda_rounding(cuda_kernels):
    for kernel in cuda_kernels:
        learned = "step_kernel" in kernel.name and "PathE2E" not in kernel.name
        check_rounding(kernel, NORMALS + (4 * EXPONENTIAL if learned else 0))
        if "step_kernel" in kernel.name:
            assert "cvt.rn.bf16.f32" in kernel.ptx and "cvt.rn.f16.f32" in kernel.ptx


def signature(kernel, aligned: bool, **types):
    """What `triton.compile` is told: arguments' types, constants, and multiples of 16.

    types: "fp32" and the like for a pointer's, None for a tensor that is not there, or a constant.
    """
    from triton.compiler import ASTSource

    defaults = {"coefficients": "fp32", "index": "i32", "status": "i32"}
    defaults |= dict.fromkeys(("row", "seed", "sample_index", "timesteps"), "i64")
    defaults |= dict.fromkeys(("out", "x_t", "x_start", "noise_out", "model_output"), "fp32")
    optional = dict.fromkeys(("noise", "previous", "next_input", "guidance_scale"))
    defaults |= optional | {"TOGETHER": aligned, "LEARNED": False, "EACH": 8, "LARGE": False}
    signature, constants, multiples = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = (defaults | types).get(name, int)
        if "layout" in name:
            signature[name] = ("i32",) * 3
            multiples |= {(i, j): [["tt.divisibility", 16]] for j in range(3 if aligned else 0)}
        elif value is int:
            signature[name] = "i32"
            if aligned and name in ("elements", "pixels", "unconditional", "variance", "next_copy"):
                multiples[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, str):
            signature[name] = f"*{value}"
            multiples[(i,)] = [["tt.divisibility", 16]] if aligned else []
        else:
            signature[name], constants[(i,)] = "constexpr", value
    return ASTSource(kernel, signature, constexprs=constants, attrs=multiples)


def compiled(kernel, architecture: int, folder: Path, aligned: bool = True, **types) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget

    from ddpm_fast import triton_ops

    source = signature(kernel, aligned, BLOCK=triton_ops.BLOCK, **types)
    target = GPUTarget("cuda", architecture, 32)
    result = triton.compile(source, target=target, options=triton_ops.OPTIONS)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    (one,) = read_kernels(cubin, result.asm["ptx"])
    check_resources(one)
    return one


FULL = {"LEARNED": True, "guidance_scale": "fp32", "previous": "fp32"}


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda cc: f"sm_{cc}")
class TestTriton:
    def test_randn_and_q_sample(self, architecture, tmp_path):
        from ddpm_fast import triton_kernels

        one = compiled(triton_kernels.randn_kernel, architecture, tmp_path)
        check_rounding(one, NORMALS)
        assert "STG.E.128" in one.accesses()
        given = {"noise": "fp32", "noise_out": None}
        for options, fused in (({}, NORMALS), (given, 0)):
            one = compiled(triton_kernels.q_sample_kernel, architecture, tmp_path, **options)
            check_rounding(one, fused)
            assert {"LDG.E.128", "STG.E.128"} <= one.accesses()

    def test_plain_step(self, architecture, tmp_path):
        from ddpm_fast import triton_kernels

        one = compiled(triton_kernels.step_kernel, architecture, tmp_path)
        check_rounding(one, NORMALS)
        assert {"LDG.E.128", "STG.E.128"} <= one.accesses()

    def test_full_step(self, architecture, tmp_path):
        from ddpm_fast import triton_kernels

        low = {"model_output": "bf16", "next_input": "bf16"}
        one = compiled(triton_kernels.step_kernel, architecture, tmp_path, **FULL, **low)
        check_rounding(one, NORMALS + 4 * EXPONENTIAL)
        assert {"LDG.E.128", "STG.E.128", "LDG.E.64", "STG.E.64"} <= one.accesses()
        assert not any(".U16" in access for access in one.accesses())
        assert re.search(r"cvt\.rn\.bf16(?:x2)?\.f32", one.ptx)

    def test_scattered_step(self, architecture, tmp_path):
        from ddpm_fast import triton_kernels

        low = {"model_output": "fp16", "next_input": "fp16"}
        one = compiled(triton_kernels.step_kernel, architecture, tmp_path, False, **FULL, **low)
        check_rounding(one, NORMALS + 4 * EXPONENTIAL)
        assert re.search(r"cvt\.rn\.f16(?:x2)?\.f32", one.ptx)

    def test_large_step(self, architecture, tmp_path):
        from ddpm_fast import triton_kernels

        one = compiled(triton_kernels.step_kernel, architecture, tmp_path, LARGE=True)
        check_rounding(one, NORMALS)
        assert {"LDG.E.128", "STG.E.128"} <= one.accesses()
