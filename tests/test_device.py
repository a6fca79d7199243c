"""What a command sets for its process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, torch
from ddpm_fast.device import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]

def mapped():
    "How many blocks are straight from the kernel, which gets them back when they are freed."
    return getattr(libc.mallinfo2(), "3")

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if sys.argv[1] == "keep":
    keep_freed_memory()
before = mapped()
layers = [torch.ones(4 << 20) for _ in range(3)]  # 16 MiB each
print(mapped() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_is_freed_is_kept_for_the_next():
    def mapped(how: str) -> int:
        command = [sys.executable, "-c", SCRIPT, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert mapped("as it is") == 3 and mapped("keep") == 0
