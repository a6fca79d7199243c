"""The AMX emulator by itself: what must not be carried out, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import amx_forms
import pytest
from amx_forms import config

START = """
import ctypes, faulthandler, os, resource, signal, sys, threading
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
emulator, forms = (ctypes.CDLL(path) for path in sys.argv[1:3])
memory = ctypes.create_string_buffer(4096)
def configure(config): forms.configure(config)
def load(tile, stride=64): forms[f"load_{tile}"](memory, ctypes.c_int64(stride))
def another_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()
"""
INSTALLED = START + "emulator.amx_emulator_install()\n"


@pytest.fixture(scope="module")
def child(amx_library, amx_forms_library, tmp_path_factory):
    """Runs a script; gives its exit status and what it wrote to standard error."""
    folder = tmp_path_factory.mktemp("faults")

    def run(script: str) -> tuple[int, str]:
        command = [sys.executable, "-IS", "-c", script, amx_library._name, amx_forms_library]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        return done.returncode, done.stderr

    return run


def fault(name: str, sentence: str, script: str, **fields):
    start = f"configure({config(**fields)!r})\n"
    return pytest.param(start + script, sentence, id=name)


NO_TILES = "this thread has configured no tiles"
SAME = "tdpbf16ps: two of the three tiles are the same"
LENGTHS = {"rows": (16, 16, 8, 0), "colsb": (64, 32, 64, 0)}  # of a product that fits
FAULTS = [
    fault("palette", "ldtilecfg: the palette is not 1", "", palette=2),
    fault("rows", "ldtilecfg: a tile has more than 16 rows", "", rows=(16, 17)),
    fault("colsb", "ldtilecfg: a tile has more than 64 bytes per row", "", colsb=(64, 68)),
    fault("wide_colsb", "ldtilecfg: a tile has more than 64", "", colsb=(64, 256 + 64)),
    fault("no_rows", "ldtilecfg: a tile has rows without bytes", "", rows=(16, 0)),
    fault("no_colsb", "ldtilecfg: a tile has rows without bytes", "", colsb=(64, 0)),
    *(
        fault(f"byte_{byte}", "ldtilecfg: a reserved byte is set", "", **{f"byte_{byte}": 1})
        for byte in (2, 15, 32, 47, 56, 63)
    ),
    pytest.param("load(0)", f"tileloadd: {NO_TILES}", id="load_unconfigured"),
    pytest.param("forms.zero_3()", f"tilezero: {NO_TILES}", id="zero_unconfigured"),
    pytest.param("forms.store_3(memory, 0)", f"tilestored: {NO_TILES}", id="store_unconfigured"),
    pytest.param("forms.product_0_1_2()", f"tdpbf16ps: {NO_TILES}", id="product_unconfigured"),
    fault("released", f"tileloadd: {NO_TILES}", "load(0); forms.release(); load(0)"),
    fault("palette_0", f"tileloadd: {NO_TILES}", f"configure({bytes(64)!r}); load(0)"),
    fault("other_thread", f"tileloadd: {NO_TILES}", "load(0); another_thread(load, 0)"),
    fault("tile_3", "tileloadd: the tile has no rows", "load(2); load(3)", **LENGTHS),
    fault(
        "bytes",
        "tileloadd: the tile's row is not of whole 4 bytes",
        "load(1)",
        rows=(1, 1),
        colsb=(8, 6),
    ),
    fault("start_row", "tileloadd: start_row is behind the tile", "load(1)", start_row=16),
    fault("c_is_a", SAME, "forms.product_0_0_2()"),
    fault("c_is_b", SAME, "forms.product_0_1_0()"),
    fault("a_is_b", SAME, "forms.product_0_1_1()"),
    fault("product_tile", "tdpbf16ps: the tile has no rows", "forms.product_0_1_3()", **LENGTHS),
]
MISFITS = [
    ("C and A have different rows", {"rows": (15, 16, 8, 0)}),
    ("C and B have different columns", {"colsb": (60, 32, 64, 0)}),
    ("A's columns are not B's rows", {"rows": (16, 16, 7, 0)}),
    ("A's columns are not B's rows", {"colsb": (64, 36, 64, 0)}),
]
for name, (sentence, changed) in zip(("m", "n", "b", "a"), MISFITS, strict=True):
    fields = LENGTHS | changed
    FAULTS.append(fault(name, f"tdpbf16ps: {sentence}", "forms.product_0_1_2()", **fields))


@pytest.mark.parametrize(("script", "sentence"), FAULTS)
def test_what_the_architecture_faults_aborts_with_a_sentence(child, script, sentence):
    status, error = child(INSTALLED + script)
    assert status == -signal.SIGABRT, (status, error)
    assert error.startswith(f"amx_emulator: {sentence}"), error


def test_a_product_that_fits_is_no_fault(child):
    script = f"configure({config(**LENGTHS)!r}); load(0); load(1); forms.product_0_1_2()"
    assert child(INSTALLED + script) == (0, "")


@pytest.mark.parametrize("name", amx_forms.ILLEGAL)
def test_any_other_illegal_instruction_kills(child, name):
    script = INSTALLED + f"configure({config()!r}); load(0)\nforms[{name!r}](memory, memory)"
    assert child(script) == (-signal.SIGILL, "")


def test_faulthandler_is_there_before_and_after(child):
    for change in ("", "emulator.amx_emulator_remove(); "):
        script = "faulthandler.enable()\n" + f"emulator.amx_emulator_install(); {change}"
        status, error = child(START + script + "forms.ud2()")
        assert status == -signal.SIGILL
        assert error.startswith("Fatal Python error: Illegal instruction"), error


def test_a_handler_that_returns_goes_on(child):
    """The previous handler skips ud2, and AMX's instructions work before and after it."""
    script = f"""
SA_SIGINFO = 4
address = ctypes.cast(forms.skip_ud2, ctypes.c_void_p).value
action = (ctypes.c_uint64 * 19)(address, *[0] * 16, SA_SIGINFO)  # the mask is 1024 bits
ctypes.CDLL(None).sigaction(signal.SIGILL, action, None)
for _ in range(2): emulator.amx_emulator_install()
configure({config()!r}); load(0); forms.ud2(); forms.ud2(); load(0)
emulator.amx_emulator_remove()
forms.ud2()
"""
    assert child(START + script) == (0, "")


def test_without_the_emulator_amx_is_illegal(child):
    for change in ("", "emulator.amx_emulator_install(); emulator.amx_emulator_remove()\n"):
        assert child(START + change + f"configure({config()!r})") == (-signal.SIGILL, "")


@pytest.mark.parametrize(
    "sent", ["os.kill(os.getpid(), signal.SIGILL)", "forms.kill_and_release()"]
)
def test_a_signal_that_is_sent_kills(child, sent):
    script = f"configure({config()!r}); load(0); {sent}"
    assert child(INSTALLED + script) == (-signal.SIGILL, "")


def test_memory_that_is_not_there_faults_as_it_does(child):
    script = f"configure({config()!r}); forms.load_0(ctypes.c_void_p(64), 64)"
    assert child(INSTALLED + script) == (-signal.SIGSEGV, "")
