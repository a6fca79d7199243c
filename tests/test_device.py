"""What a command sets for its process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
import torch
from ddpm_fast.device import keep_freed_memory
from ddpm_fast.inference import prepare

class Info(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]

def arena():
    "Bytes from the kernel, but for blocks that it gets back when they are freed."
    return getattr(libc.mallinfo2(), "0")

def mapped():
    "How many such blocks there are."
    return getattr(libc.mallinfo2(), "3")

def at_end():
    "Bytes that are free at the arena's end, and were kept."
    return getattr(libc.mallinfo2(), "9")

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "kept":
    keep_freed_memory()
if sys.argv[1] == "prepared":
    prepare(torch.nn.Conv2d(1, 1, 1), torch.device("cpu"), torch.float32)
before, start = mapped(), arena()
layers = [libc.malloc(16 << 20) for _ in range(3)]
count = mapped() - before
for layer in layers:
    libc.free(layer)
print(count, (arena() - start) >> 20, at_end() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_is_freed_is_kept_for_the_next():
    def blocks_and_kept(how: str) -> list[int]:
        command = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    assert blocks_and_kept("as it is")[:2] == [3, 0]
    for how in ("kept", "prepared"):
        blocks, _, mebibytes = blocks_and_kept(how)
        assert blocks == 0 and mebibytes >= 48


HOLES = """
import ctypes, os
from ddpm_fast.device import give_back_freed_memory

def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(64 << 10) for _ in range(1024)]
for block in blocks:
    ctypes.memset(block, 1, 64 << 10)
for block in blocks[::2]:
    libc.free(block)
held = resident()
give_back_freed_memory()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_is_freed_between_others_is_given_back():
    """Of 32 MiB freed, each block between two that are in use, all but the pages at their ends."""
    command = [sys.executable, "-c", HOLES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 25
