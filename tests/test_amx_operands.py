"""The AMX emulator by itself: every form of a memory operand, and what a compiler emits."""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import amx
import amx_forms
import numpy as np
import pytest
from amx_forms import ABSOLUTE, config
from building import ROOT

HALF = 2**21  # of the memory; below its middle is room for a signal's handler, where rsp is a base
NEAR = slice(HALF - 8192, HALF + 8192)
MAP_FIXED_NOREPLACE = 0x100000


@pytest.fixture(scope="module")
def memory(amx_library):
    """Bytes whose middle lies at the address ABSOLUTE."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_uint64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    start = ctypes.c_void_p(ABSOLUTE - HALF)
    found = libc.mmap(
        start, ctypes.c_size_t(2 * HALF), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0
    )
    assert found == start.value, ctypes.get_errno()
    yield np.frombuffer((ctypes.c_uint8 * (2 * HALF)).from_address(found), np.uint8)
    libc.munmap(start, ctypes.c_size_t(2 * HALF))


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize("name", ["tileloadd", "tileloaddt1", "tilestored"])
def test_every_operand_moves_a_tile(forms, memory, rng, name, amx_emulator):
    forms.configure()
    operands = amx_forms.operands()
    for i, operand in enumerate(operands):
        stride = 8 * int(rng.integers(8, 40)) if operand.index else 0
        if operand.base != "rsp" and i % 2:
            stride = -stride
        memory[NEAR] = rng.integers(0, 256, 16384, np.uint8)
        rows = [slice(HALF + row * stride, HALF + row * stride + 64) for row in range(16)]
        tile = rng.integers(0, 256, (16, 64), np.uint8)
        forms.load(i % 8, tile)
        expected = memory.copy() if name == "tilestored" else np.stack([memory[r] for r in rows])
        forms(f"{name}_{i}", ABSOLUTE - operand.displacement, stride // operand.scale)
        if name == "tilestored":
            for row, values in zip(rows, tile, strict=True):
                expected[row] = values
            kept = slice(HALF if operand.base == "rsp" else NEAR.start, NEAR.stop)
            assert (memory[kept] == expected[kept]).all(), operand
        else:
            assert (forms.store(i % 8, 16, 64) == expected).all(), operand
    assert amx_emulator()[name] >= len(operands)


def test_no_base_is_no_base_with_every_prefix(forms, memory, rng):
    forms.configure()
    memory[NEAR] = rng.integers(0, 256, 16384, np.uint8)
    forms("load_b")
    assert (forms.store(0, 16, 64) == memory[HALF : HALF + 64]).all()


@pytest.mark.parametrize("name", ["ldtilecfg", "sttilecfg"])
def test_every_operand_moves_a_configuration(forms, memory, rng, name):
    for i, operand in enumerate(amx_forms.operands()):
        index = 40 * operand.scale if operand.index else 0
        base = ABSOLUTE - operand.displacement - index
        at = HALF + (index if operand.base is None else 0)
        wanted = config(rng.integers(1, 17, 8), 4 * rng.integers(1, 17, 8))
        memory[NEAR] = 255
        if name == "ldtilecfg":
            memory[at : at + 64] = np.frombuffer(wanted, np.uint8)
            forms(f"{name}_{i}", base, 40)
            assert forms.configuration() == wanted, operand
        else:
            forms("configure", np.frombuffer(wanted, np.uint8))
            forms(f"{name}_{i}", base, 40)
            assert memory[at : at + 64].tobytes() == wanted, operand
            assert (memory[at + 64 : NEAR.stop] == 255).all(), operand


@pytest.mark.parametrize("place", ["rip", "thread"])
def test_a_configuration_beside_the_code_and_in_a_threads_memory(forms, place):
    here = (ctypes.c_uint8 * 64).from_address(forms(f"address_{place}"))
    here[:] = config(range(1, 9), range(4, 36, 4))
    forms(f"ldtilecfg_{place}")
    assert forms.configuration() == bytes(here)
    forms.configure()
    forms(f"sttilecfg_{place}")
    assert bytes(here) == config()


@pytest.fixture(scope="module")
def probe(amx_library, tmp_path_factory):
    """The compiler's own code, from the intrinsics."""
    path = tmp_path_factory.mktemp("probe") / "libprobe.so"
    return amx.build_library(path, ROOT / "tests" / "amx_probe.cpp", flags=amx.AMX)


def compiled_matmul(probe, rng, m, n, pairs) -> tuple[np.ndarray, np.ndarray]:
    """What the compiled code found, and what is right: integers, so both are exact."""
    a, b = rng.integers(-8, 9, (m, 2 * pairs)), rng.integers(-8, 9, (2 * pairs, n))
    c = rng.integers(-100, 100, (m, n)).astype(np.float32)
    expected = c + (a @ b).astype(np.float32)
    packed = b.reshape(pairs, 2, n).transpose(0, 2, 1)  # two rows' numbers side by side
    bits = [
        (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for x in (a, packed)
    ]
    sizes = (ctypes.c_int64(size) for size in (m, n, pairs))
    probe.probe_matmul(*sizes, *(ctypes.c_void_p(x.ctypes.data) for x in (*bits, c)))
    return c, expected


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 16, 16), (40, 50, 35), (17, 64, 48)])
def test_what_a_compiler_emits_is_carried_out(amx_emulator, probe, rng, shape):
    found, expected = compiled_matmul(probe, rng, *shape)
    assert (found == expected).all()
    blocks = int(np.prod([-(-size // 16) for size in shape]))
    assert amx_emulator() == dict.fromkeys(amx.INSTRUCTIONS, blocks) | {
        "sttilecfg": 0, "tilerelease": 1, "tilezero": 0, "tileloadd": 2 * blocks
    }  # fmt: skip


def test_threads_have_their_own_tiles(amx_emulator, probe):
    shapes = [(40, 50, 35), (35, 17, 70), (9, 33, 20)]

    def work(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        pairs = [compiled_matmul(probe, rng, *shape) for shape in shapes * 10]
        return all((found == expected).all() for found, expected in pairs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    blocks = sum(int(np.prod([-(-size // 16) for size in shape])) for shape in shapes)
    assert amx_emulator()["tdpbf16ps"] == 80 * blocks
