"""A pytest plugin: tests run as on a CPU with AMX whose trial chose tiles, on the emulator.

    PYTHONPATH=tests python -m pytest -p as_with_amx -p no:faulthandler tests/test_conv_layer.py ...

Not in child processes; and some thousand times slower where there are many products.
"""

import contextlib
import tempfile
from pathlib import Path

import amx
import torch

from ddpm_fast import backend, tile_trial


@contextlib.contextmanager
def _is_installed(emulator):
    yield dict


if tile_trial.LEVEL not in backend.extension.cpu_levels_available():
    _emulator = amx.build_emulator(Path(tempfile.mkdtemp()))
    _emulator.amx_emulator_install()  # for good: before pytest's own handler, which is left out
    amx.emulated = _is_installed
    _set_level = backend.extension._set_cpu_level
    _levels = backend.extension.cpu_levels_available()
    backend.extension._set_cpu_level = lambda name, unchecked=False: _set_level(name, True)
    backend.extension.cpu_levels_available = lambda: [*_levels, tile_trial.LEVEL]
    torch.cpu._is_amx_tile_supported = lambda: True
    _fastest, tile_trial._fastest = tile_trial._fastest, lambda calls: [1.0, 1.0]
    backend.cpu_level()
    tile_trial._fastest = _fastest
