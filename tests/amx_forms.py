"""AMX's instructions as assembly: plain ones, and many forms of their memory operands."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from building import cxx, run

REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
REGISTERS += tuple(f"r{number}" for number in range(8, 16))
SAVED = ("rbx", "rbp", "r12", "r13", "r14", "r15")
DISPLACEMENTS = (0, 8, -8, 127, -128, 128, 5000, -70001)
ABSOLUTE = 0x20000000  # an address that fits a displacement without a base
TILES = range(8)


@dataclass(frozen=True)
class Operand:
    """A memory operand of base, index, scale and displacement."""

    base: str | None
    index: str | None
    scale: int
    displacement: int

    def __str__(self) -> str:
        base = f"%{self.base}" if self.base else ""
        index = f",%{self.index},{self.scale}" if self.index else ""
        return f"{self.displacement}({base}{index})" if base or index else f"{self.displacement}"


def operands() -> list[Operand]:
    """All pairs of base and index, each alone, and neither; scales and displacements in turn."""
    scales, displacements = itertools.cycle((1, 2, 4, 8)), itertools.cycle(DISPLACEMENTS)
    found = []
    for base, index in itertools.product((*REGISTERS, None), (*REGISTERS, None)):
        if index == "rsp" or (base == index and base is not None):
            continue
        displacement = ABSOLUTE if base is None else next(displacements)
        if base == "rsp":  # what lies below it belongs to the signal's handler
            displacement = abs(displacement)
        found.append(Operand(base, index, next(scales), displacement))
    return found


def _function(name: str, *instructions: str) -> str:
    return "\n".join([f".globl {name}", f"{name}:", *instructions, "ret", ""])


def _with_registers(name: str, operand: Operand, instruction: str) -> str:
    """A function of the base's and the index's values."""
    given = zip((operand.base, operand.index), ("%xmm0", "%xmm1"), strict=True)
    return _function(
        name,
        *(f"push %{register}" for register in SAVED),
        "mov %rsp, stack(%rip)",
        "movq %rdi, %xmm0",
        "movq %rsi, %xmm1",
        *(f"movq {value}, %{register}" for register, value in given if register),
        instruction,
        "mov stack(%rip), %rsp",
        *(f"pop %{register}" for register in reversed(SAVED)),
    )


# Encodings that no CPU knows, and one of AMX that is not emulated.
ILLEGAL = {
    "ud2": "0x0f, 0x0b",
    "load_without_sib": "0xc4, 0xe2, 0x7b, 0x4b, 0x18",
    "load_of_vvvv": "0xc4, 0xe2, 0x73, 0x4b, 0x1c, 0x18",
    "load_of_l": "0xc4, 0xe2, 0x7f, 0x4b, 0x1c, 0x18",
    "load_of_w": "0xc4, 0xe2, 0xfb, 0x4b, 0x1c, 0x18",
    "load_of_r": "0xc4, 0x62, 0x7b, 0x4b, 0x1c, 0x18",
    "load_of_a_register": "0xc4, 0xe2, 0x7b, 0x4b, 0xdc",
    "load_of_another_map": "0xc4, 0xe3, 0x7b, 0x4b, 0x1c, 0x18",
    "config_of_reg": "0xc4, 0xe2, 0x78, 0x49, 0x08",
    "release_of_rm": "0xc4, 0xe2, 0x78, 0x49, 0xc1",
    "zero_of_rm": "0xc4, 0xe2, 0x7b, 0x49, 0xe9",
    "product_of_vvvv": "0xc4, 0xe2, 0x32, 0x5c, 0xda",
    "product_of_b": "0xc4, 0xc2, 0x72, 0x5c, 0xda",
    "tdpbssd": "0xc4, 0xe2, 0x73, 0x5e, 0xda",
}


def assembly() -> str:
    """Functions of one instruction each, by the names that the tests call them."""
    text = [".text\n"]
    text += [_function(name, f".byte {encoding}") for name, encoding in ILLEGAL.items()]
    text.append(_function("configure", "ldtilecfg (%rdi)"))
    text.append(_function("configuration", "sttilecfg (%rdi)"))
    text.append(_function("release", "tilerelease"))
    for t in TILES:
        text.append(_function(f"zero_{t}", f"tilezero %tmm{t}"))
        text.append(_function(f"load_{t}", f"tileloadd (%rdi,%rsi,1), %tmm{t}"))
        text.append(_function(f"store_{t}", f"tilestored %tmm{t}, (%rdi,%rsi,1)"))
    for c, a, b in itertools.product(TILES, TILES, TILES):
        if c != a != b != c:
            text.append(_function(f"product_{c}_{a}_{b}", f"tdpbf16ps %tmm{b}, %tmm{a}, %tmm{c}"))
    for c, a, b in ((0, 0, 2), (0, 1, 0), (0, 1, 1)):  # which an assembler refuses
        encoding = f"0xc4, 0xe2, {0x7A - 8 * b:#x}, 0x5c, {0xC0 + 8 * c + a:#x}"
        text.append(_function(f"product_{c}_{a}_{b}", f".byte {encoding}"))
    for i, operand in enumerate(operands()):
        tile = f"%tmm{i % 8}"
        for name in ("tileloadd", "tileloaddt1"):
            text.append(_with_registers(f"{name}_{i}", operand, f"{name} {operand}, {tile}"))
        text.append(_with_registers(f"tilestored_{i}", operand, f"tilestored {tile}, {operand}"))
        for name in ("ldtilecfg", "sttilecfg"):
            text.append(_with_registers(f"{name}_{i}", operand, f"{name} {operand}"))
    for name in ("ldtilecfg", "sttilecfg"):
        text.append(_function(f"{name}_rip", f"{name} config(%rip)"))
        thread = "mov thread_config@gottpoff(%rip), %rax"
        text.append(_function(f"{name}_thread", thread, f"{name} %fs:(%rax)"))
    # No base, though VEX's B is set: no assembler makes it.
    displacement = ", ".join(f"{byte:#x}" for byte in ABSOLUTE.to_bytes(4, "little"))
    text.append(_function("load_b", f".byte 0xc4, 0xc2, 0x7b, 0x4b, 0x04, 0x25, {displacement}"))
    # A signal that is sent arrives where the next instruction is one of AMX's.
    kill = ("mov $39, %eax", "syscall", "mov %eax, %edi", "mov $4, %esi", "mov $62, %eax")
    text.append(_function("kill_and_release", *kill, "syscall", "tilerelease"))
    # A signal's handler that goes on behind the two bytes of ud2: RIP's place in a ucontext_t.
    text.append(_function("skip_ud2", "addq $2, 168(%rdx)"))
    text.append(_function("address_rip", "lea config(%rip), %rax"))
    text.append(
        _function("address_thread", "mov %fs:0, %rax", "add thread_config@gottpoff(%rip), %rax")
    )
    text.append(".local stack\n.comm stack, 8\n.local config\n.comm config, 64\n")
    text.append('.section .tbss, "awT", @nobits\nthread_config: .zero 64\n')
    text.append('.section .note.GNU-stack, "", @progbits\n')
    return "\n".join(text)


def build(folder: Path) -> Path:
    """The library of these functions."""
    source, library = folder / "forms.s", folder / "libforms.so"
    source.write_text(assembly())
    run(cxx(), "-shared", source, "-o", library)
    return library


def config(rows=(16,) * 8, colsb=(64,) * 8, palette=1, start_row=0, **bytes_) -> bytes:
    """A configuration; byte_N=x sets a byte behind that."""
    made = np.zeros(64, np.uint8)
    made[:2] = palette, start_row
    made[16 : 16 + 2 * len(colsb)] = np.array(colsb, "<u2").view(np.uint8)
    made[48 : 48 + len(rows)] = rows
    for name, value in bytes_.items():
        made[int(name.removeprefix("byte_"))] = value
    return made.tobytes()


class Forms:
    """Calls single instructions; addresses are integers, arrays give theirs."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))

    def __call__(self, name: str, *arguments) -> int:
        function = self.library[name]
        function.restype = ctypes.c_uint64
        values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
        return function(*(ctypes.c_uint64(value % 2**64) for value in values))

    def configure(self, **fields) -> None:
        self("configure", np.frombuffer(config(**fields), np.uint8))

    def configuration(self) -> bytes:
        found = np.full(64, 77, np.uint8)
        self("configuration", found)
        return found.tobytes()

    def load(self, tile: int, rows: np.ndarray) -> None:
        self(f"load_{tile}", rows, rows.strides[0])

    def store(self, tile: int, rows: int, colsb: int) -> np.ndarray:
        found = np.zeros((rows, colsb), np.uint8)
        self(f"store_{tile}", found, colsb)
        return found
