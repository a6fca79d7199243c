"""Whether bfloat16 networks multiply by AMX's tiles: on the emulator where the CPU has none."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from building import ROOT

from ddpm_fast import backend, info, ops, tile_trial
from ddpm_fast.inference import prepare

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def fresh(monkeypatch, amx_level, extension):
    """The extension of a process on a CPU that has tiles, before its trial, a short one."""
    extension._set_cpu_level("avx512")
    set_level, levels = extension._set_cpu_level, extension.cpu_levels_available()
    monkeypatch.setattr(extension, "_set_cpu_level", lambda name: set_level(name, unchecked=True))
    monkeypatch.setattr(extension, "cpu_levels_available", lambda: [*levels, "amx"])
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    monkeypatch.delenv("DDPM_FAST_CPU", raising=False)
    monkeypatch.setattr(tile_trial, "_is_settled", False)
    monkeypatch.setattr(tile_trial, "_verdict", "")
    short = tile_trial.TIMED._replace(in_channels=32, out_channels=32, size=(4, 4))
    monkeypatch.setattr(tile_trial, "TIMED", short)
    monkeypatch.setattr(tile_trial, "CHECKED", (short, *tile_trial.CHECKED[1:]))
    yield extension
    monkeypatch.undo()


def clock(monkeypatch, ours, theirs=1.0):
    """The seconds that the two seem to take."""
    monkeypatch.setattr(tile_trial, "_fastest", lambda calls: [calls and ours, theirs])


@pytest.mark.parametrize("ours, level", [(0.5, "amx"), (1.4, "amx"), (1.6, "avx512")])
def test_tiles_are_used_unless_they_are_slow(monkeypatch, fresh, ours, level):
    clock(monkeypatch, ours)
    state = torch.get_rng_state()
    assert backend.conv_kernels(BF16) == {"amx": "amx", "avx512": "avx512_bf16"}[level]
    assert fresh.cpu_level() == level
    assert ops.is_conv2d_fastest(BF16) == (level == "amx")
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(tile_trial, "_attempt", lambda: pytest.fail("a second trial"))
    lines = dict(info.report())
    speed = f"{1 / ours:.2f} times oneDNN's speed in a trial"
    assert lines["CPU levels here"].endswith(f"in use: {level} (amx: {speed})")
    whose = "own (amx)" if level == "amx" else "oneDNN's; at the network's ends own (avx512_bf16)"
    assert lines["bfloat16 convolutions"] == whose


def test_the_layer_of_a_network_is_timed_against_onednn_s(monkeypatch, fresh):
    """As a network has it: ours with float16, a sample for each core."""
    timed = []
    monkeypatch.setattr(tile_trial, "_fastest", lambda calls: timed.extend(calls) or [1.0, 1.0])
    assert backend.conv_kernels(BF16) == "amx"
    ours, theirs = timed
    assert ours.args[0].dtype == torch.float16 and theirs.args[0].dtype == BF16
    assert len(ours.args[0]) == len(theirs.args[0]) >= torch.get_num_threads()
    torch.testing.assert_close(ours(), theirs(), rtol=2**-7, atol=2e-2)


def test_the_least_time_counts(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def varying():
        calls.append(1)
        now[0] += 1.0 if len(calls) in (7, 8, 9) else 5.0

    def steady():
        now[0] += 2.0

    assert tile_trial._fastest([varying, steady]) == [3.0, 6.0]
    assert len(calls) == 3 * (1 + tile_trial.ROUNDS)


def test_the_trial_is_one_for_all_threads(monkeypatch, fresh):
    attempts, attempt = [], tile_trial._attempt
    monkeypatch.setattr(tile_trial, "_attempt", lambda: attempts.append(1) or attempt())
    clock(monkeypatch, 0.5)
    seen = []
    workers = [
        threading.Thread(target=lambda: seen.append(backend.conv_kernels(BF16))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == ["amx"] * 4 and attempts == [1]


def test_what_is_no_number_is_wrong(monkeypatch, fresh):
    formula = tile_trial._formula
    monkeypatch.setattr(tile_trial, "_formula", lambda *layer: formula(*layer) * torch.nan)
    with pytest.warns(UserWarning, match=r"give wrong sums \(nan times their bound\)"):
        assert backend.conv_kernels(BF16) == "avx512_bf16"


def test_an_interrupt_leaves_no_level_that_was_not_tried(monkeypatch, fresh):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tile_trial, "_attempt", interrupt)
        backend.conv_kernels(BF16)
    assert fresh.cpu_level() == "avx512"
    clock(monkeypatch, 0.5)
    assert backend.conv_kernels(BF16) == "amx"


@pytest.mark.parametrize("part", [0, 1, 2, "attention"])
def test_wrong_sums_are_told_and_not_used(monkeypatch, fresh, part):
    formula, calls = tile_trial._formula, []

    def other(*layer):
        calls.append(layer)
        want = formula(*layer)
        if len(calls) == part + 1:
            want[-1, -1, -1, -1] += 0.02 * want.abs().max()
        return want

    if part == "attention":
        monkeypatch.setattr(tile_trial, "_attention", lambda q, k, v: (q @ k.mT).softmax(-2) @ v)
    else:
        monkeypatch.setattr(tile_trial, "_formula", other)
    with pytest.warns(UserWarning, match="kernels for AMX give wrong sums"):
        assert backend.conv_kernels(BF16) == "avx512_bf16"
    assert fresh.cpu_level() == "avx512" and not ops.is_conv2d_fastest(BF16)
    assert not ops.is_attention_fastest(BF16)
    assert "in use: avx512 (amx: wrong sums in a trial)" in dict(info.report())["CPU levels here"]


def test_the_bound_is_that_of_a_rounding():
    want = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert tile_trial._error(torch.full((1,), 3e-4), torch.zeros(1)) > 1.0  # without a rounding
    truncated = (want.view(torch.int32) & -65536).view(F32)
    assert tile_trial._error(want.bfloat16(), want) <= 1.0 < tile_trial._error(truncated, want)
    assert not tile_trial._error(torch.tensor([1.0, torch.nan]), torch.ones(2)) <= 1.0


@pytest.mark.parametrize("is_strict", [False, True])
def test_a_trial_that_fails_is_told_once(monkeypatch, fresh, is_strict):
    monkeypatch.setattr(tile_trial, "_fastest", lambda calls: 1 / 0)
    expected = pytest.warns(UserWarning, match=r"had no trial \(division by zero\), so oneDNN's")
    if is_strict:
        monkeypatch.setattr("warnings.warn", lambda text, **_: exec("raise UserWarning(text)"))
        expected = pytest.raises(UserWarning)
    with expected:
        backend.conv_kernels(BF16)
    assert fresh.cpu_level() == "avx512" and tile_trial.verdict() == "its trial failed"
    assert backend.conv_kernels(BF16) == "avx512_bf16"


def test_a_host_s_settings_change_nothing(monkeypatch, fresh):
    clock(monkeypatch, 0.5)
    monkeypatch.setenv("DDPM_FAST_BACKEND", "reference")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", BF16), torch.device("meta"):
            assert backend.conv_kernels(BF16) == "amx"
    finally:
        torch.set_default_dtype(default)


def test_without_onednn_right_sums_decide(monkeypatch, fresh):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert backend.conv_kernels(BF16) == "amx"
    assert tile_trial.verdict() == "right sums in a trial"


def test_attention_comes_after_the_trial(monkeypatch, fresh):
    clock(monkeypatch, 0.5)
    x = torch.zeros(1, 32, 4, 4, dtype=BF16).contiguous(memory_format=torch.channels_last)
    ops.attention(x, x, x)
    assert fresh.cpu_level() == "amx"


def test_weights_are_packed_after_the_trial(monkeypatch, fresh):
    clock(monkeypatch, 0.5)
    weight = torch.randn(64, 64, 3, 3)
    packed = ops.pack_conv2d(weight, BF16)
    assert fresh.cpu_level() == "amx"
    assert torch.equal(ops.pack_conv2d(weight, BF16), packed)


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_float32_networks_need_none(monkeypatch, fresh, tiny_unet):
    monkeypatch.setattr(tile_trial, "_attempt", lambda: pytest.fail("a trial"))
    network = prepare(tiny_unet().eval(), torch.device("cpu"), F32)
    x, t = torch.randn(1, 1, 8, 8), torch.zeros(1)
    network(x, t)
    compiled = torch.compile(network, backend="eager")
    torch.testing.assert_close(compiled(x, t), network(x, t))


@pytest.mark.parametrize("has_tiles", [False, True])
def test_there_is_none_without_tiles_or_where_a_level_is_asked_for(monkeypatch, fresh, has_tiles):
    monkeypatch.setattr(tile_trial, "_attempt", lambda: pytest.fail("a trial"))
    if has_tiles:
        monkeypatch.setenv("DDPM_FAST_CPU", "avx512")
    else:
        monkeypatch.setattr(fresh, "cpu_levels_available", lambda: ["avx512"])
    assert backend.cpu_level() == "avx512" and tile_trial.verdict() == ""


def test_tests_pass_as_on_a_cpu_with_amx(amx_library):
    files = [f"tests/test_{name}.py" for name in ("conv_layer", "conv2d_refusals", "fakes")]
    options = ["-q", "-p", "as_with_amx", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "DDPM_FAST_CPU": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_trial_has_its_own(monkeypatch, fresh):
    clock(monkeypatch, 0.5)
    with tile_trial._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                chosen = backend.conv_kernels(BF16)
            finally:
                os._exit(0 if chosen == "amx" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
