"""Whether bfloat16 networks multiply by AMX's tiles: on the emulator where the CPU has none."""

import threading

import pytest
import torch

from ddpm_fast import backend, info, ops, tile_trial

BF16 = torch.bfloat16


@pytest.fixture
def levels(monkeypatch, amx_level, extension):
    """The levels that were set in a process that has tiles, but had no trial yet; a short trial."""
    extension._set_cpu_level("avx512")
    set_level, chosen = extension._set_cpu_level, []

    def recorded(name, unchecked=False):
        chosen.append(name)
        set_level(name, unchecked=True)

    available = [*extension.cpu_levels_available(), "amx"][:4]
    monkeypatch.setattr(extension, "_set_cpu_level", recorded)
    monkeypatch.setattr(extension, "cpu_levels_available", lambda: available)
    monkeypatch.setattr(extension, "cpu_level_is_asked_for", lambda: bool(chosen))
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(tile_trial, "_verdict", "")
    monkeypatch.setattr(tile_trial, "ROUNDS", 0)
    monkeypatch.setattr(tile_trial, "CALLS", 1)
    timed = (32, 32, 3, 1, 1, (4, 4), BF16)
    monkeypatch.setattr(tile_trial, "LAYERS", (timed, *tile_trial.LAYERS[1:]))
    yield chosen
    monkeypatch.undo()


def clock(monkeypatch, theirs, ours):
    """The seconds that each call seems to take."""
    ticks = iter([0.0, theirs, theirs, theirs + ours])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))


@pytest.mark.parametrize("ours, level", [(0.5, "amx"), (1.1, "amx"), (1.2, "avx512")])
def test_tiles_are_used_unless_they_are_slower(monkeypatch, extension, levels, ours, level):
    clock(monkeypatch, 1.0, ours)
    state = torch.get_rng_state()
    assert backend.conv_kernels(BF16) == {"amx": "amx", "avx512": "avx512_bf16"}[level]
    assert extension.cpu_level() == level and "amx" in levels
    assert ops.is_conv2d_fastest(BF16) == (level == "amx")
    assert torch.equal(torch.get_rng_state(), state)
    speed = f"{1 / ours:.2f} times oneDNN's speed in a trial"
    assert dict(info.report())["CPU levels here"].endswith(f"in use: {level} (amx: {speed})")


def test_the_trial_is_one_for_all_threads(monkeypatch, levels):
    clock(monkeypatch, 1.0, 0.5)  # which another trial would run out of
    seen = []
    workers = [
        threading.Thread(target=lambda: seen.append(backend.conv_kernels(BF16))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == ["amx"] * 4


@pytest.mark.parametrize("part", [0, 1, 2])
def test_wrong_sums_are_told_and_not_used(monkeypatch, extension, levels, part):
    formula, calls = tile_trial._formula, []

    def other(*layer):
        calls.append(layer)
        want = formula(*layer)
        if len(calls) == part + 1:
            want[-1, -1, -1, -1] += 0.02 * want.abs().max()
        return want

    monkeypatch.setattr(tile_trial, "_formula", other)
    with pytest.warns(UserWarning, match="AMX kernels give wrong sums on this CPU"):
        assert backend.conv_kernels(BF16) == "avx512_bf16"
    assert extension.cpu_level() == "avx512" and not ops.is_conv2d_fastest(BF16)
    assert "in use: avx512 (amx: wrong sums in a trial)" in dict(info.report())["CPU levels here"]


def test_what_is_not_a_number_is_wrong():
    assert not tile_trial._error(torch.tensor([1.0, torch.nan]), torch.ones(2)) <= 1.0


def test_the_host_s_settings_change_nothing(monkeypatch, levels):
    clock(monkeypatch, 1.0, 0.5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert backend.conv_kernels(BF16) == "amx"


def test_a_trial_that_fails_leaves_the_level(monkeypatch, extension, levels):
    monkeypatch.setattr(tile_trial, "_fastest", lambda calls: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend.conv_kernels(BF16)
    assert extension.cpu_level() == "avx512"


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_there_is_none_without_tiles_or_where_a_level_is_asked_for(
    monkeypatch, extension, is_asked_for
):
    monkeypatch.setattr(tile_trial, "attempt", lambda *_: pytest.fail("a trial"))
    monkeypatch.setattr(extension, "cpu_level_is_asked_for", lambda: is_asked_for)
    levels = ["avx512", "amx"] if is_asked_for else ["avx512"]
    monkeypatch.setattr(extension, "cpu_levels_available", lambda: levels)
    before = extension.cpu_level()
    assert backend.cpu_level() == before
