"""A U-Net's own Triton kernels compiled ahead of time for sm_80 and sm_90, which needs no GPU.

What is asserted is read from the machine code: few enough registers for four blocks on a
multiprocessor, no stack and no spill, and 16-byte accesses to whatever has the size of an image.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from machine_code import ARCHITECTURES, Kernel, needs_triton, read_kernels

MULTIPLE = "multiple of 16"  # of an integer
TABLE = {"bias": "fp32", "weight": "fp32", "shift": "fp32", "moments": "fp32"}


def compiled(kernel, architecture: int, folder: Path, **types) -> Kernel:
    """types: of a pointer's values, None for a tensor that is not there, a constant, or MULTIPLE;
    what is not named is an integer."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddpm_fast.triton_layers import OPTIONS

    signature, constants, multiples = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = types.get(name, int)
        signature[name] = "constexpr"
        if value is int or value is float:
            signature[name] = "i32" if value is int else "fp32"
        elif value == MULTIPLE:
            signature[name], multiples[(i,)] = "i32", [["tt.divisibility", 16]]
        elif isinstance(value, str):
            signature[name], multiples[(i,)] = f"*{value}", [["tt.divisibility", 16]]
        else:
            constants[(i,)] = value
    source = ASTSource(kernel, signature, constexprs=constants, attrs=multiples)
    target = GPUTarget("cuda", architecture, 32)
    result = triton.compile(source, target=target, options=OPTIONS)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    (one,) = read_kernels(cubin, result.asm["ptx"])
    return one


def check(one: Kernel) -> None:
    assert one.resources["REG"] <= 128, one.resources
    assert one.resources["STACK"] == one.resources["LOCAL"] == 0
    assert not re.search(r"\b(?:LDL|STL|DFMA|DMUL|DADD)\b", one.sass)
    assert not any(re.search(r"\.(?:U8|U16|S16)", access) for access in one.accesses())


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda cc: f"sm_{cc}")
class TestLayers:
    @pytest.mark.parametrize("what", ["residual", "phases", "moments"])
    def test_finish(self, architecture, dtype, tmp_path, what):
        from ddpm_fast.triton_layer_kernels import finish_kernel

        types = TABLE | {"channels": MULTIPLE, "x": dtype, "out": dtype, "residual": None}
        types |= {"ROWS": 1, "COLUMNS": 1, "BLOCK_P": 64, "BLOCK_C": 64}
        types |= {
            "residual": {"residual": dtype},
            "phases": {"ROWS": 2, "COLUMNS": 2},
            "moments": {"out": None, "bias": None},
        }[what]
        one = compiled(finish_kernel, architecture, tmp_path, **types)
        check(one)
        assert "LDG.E.128" in one.accesses()
        assert ("STG.E.128" in one.accesses()) == (what != "moments")

    @pytest.mark.parametrize("skip", [False, True])
    @pytest.mark.parametrize("group", [8, 12])
    def test_normalise(self, architecture, dtype, tmp_path, group, skip):
        from ddpm_fast.triton_layer_kernels import normalise_kernel
        from ddpm_fast.triton_layers import BLOCK_C, FEWEST_PARTS, NORM_PIXELS, _span

        channels, groups = _span(group, BLOCK_C)
        strides = ("x_channels", "skip_channels", "shift_stride", "affine_stride")
        types = TABLE | dict.fromkeys(strides, MULTIPLE) | {"x": dtype, "out": dtype, "eps": float}
        types |= {"skip": dtype if skip else None, "skip_moments": "fp32" if skip else None}
        types |= {"SILU": True, "PARTS": FEWEST_PARTS, "SPAN": channels, "GROUPS": groups}
        types |= {"BLOCK_P": NORM_PIXELS, "BLOCK_C": BLOCK_C}
        one = compiled(normalise_kernel, architecture, tmp_path, **types)
        check(one)
        assert len(re.findall(r"\bLDG\.E(?=\s|\.CONST)", one.sass)) <= 2  # of moments none
        assert {"LDG.E.128", "STG.E.128"} <= one.accesses()


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda cc: f"sm_{cc}")
def test_rows(architecture, tmp_path):
    from ddpm_fast.triton_layer_kernels import rows_kernel

    types = {"out": "fp32", "table": "fp32", "known": "fp32", "t": "i64", "labels": "i64"}
    types |= {"columns": MULTIPLE, "KNOWN": 1024, "BLOCK": 1024}
    one = compiled(rows_kernel, architecture, tmp_path, **types)
    check(one)
    assert "STG.E.128" in one.accesses()
