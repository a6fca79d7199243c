"""The benchmark of captured loops runs, as far as it can without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm_fast import backend

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    backend.extension is None, reason="the compiled extension is missing"
)


def bench(path: Path, *more: str) -> dict:
    """The document that it leaves."""
    command = [sys.executable, "benchmarks/bench_captured.py", "--smoke", "--json", path, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """Of two runs: the first has no time, and the second goes on from what it left."""
    path = tmp_path_factory.mktemp("bench") / "captured.json"
    first = bench(path, "--budget=0")["figures"]
    assert not first["complete"] and not any(first["models"]["tiny"].values())
    places = {what for what, why in first["left_out"].items() if why == "no time was left"}
    document = bench(path, "--resume")
    assert places and not places & document["figures"]["left_out"].keys()
    return document


def test_every_engine_at_every_batch(whole):
    figures = whole["figures"]
    assert figures["complete"] and "commit" in whole
    cells, peer = figures["models"]["tiny"], figures["peer"]
    everywhere = {"ddpm_fast eager", f"{peer} bfloat16", f"{peer} float32"}
    modes = {f"{peer} bfloat16, compiled {mode}" for mode in ("reduce-overhead", "max-autotune")}
    assert everywhere | modes == cells["1"].keys() == cells["2"].keys()
    grown = [n for n in cells if int(n) > 2]
    assert grown and any(cells[n].keys() == everywhere for n in ["2", *grown] if n in cells)
    for n, engines in cells.items():
        for row in engines.values():
            assert row["ms_per_step"] > 0 and row["prepared_seconds"] > 0 and row["rounds"] == 1
            per_batch = 1e3 * int(n) / row["ms_per_step"]
            assert row["images_per_second_1000"] == pytest.approx(per_batch / 1000)
            assert row["images_per_second_3"] == pytest.approx(per_batch / 3)


def test_what_is_left_out_is_named(whole):
    figures = whole["figures"]
    assert figures["left_out"]["ddpm_fast captured"] == "there is nothing to capture on a CPU"
    missing = "No module named 'diffusers'" in figures["left_out"].get("diffusers", "")
    assert missing == (figures["peer"] == "plain PyTorch (stand-in for diffusers)")


@pytest.fixture
def tools(monkeypatch):
    """The script as a module, and a bench without a GPU."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_captured
    from gpu_measure import Bench

    return bench_captured, Bench(torch.device("cpu"), 3, time.time() + 60, rounds=1)


def failing(at: int):
    """An engine whose runs fail from that one on."""
    calls = []

    def run():
        calls.append(0)
        if len(calls) > at:
            raise IndexError("of a compiler\nand more")

    return lambda *_: run


@pytest.mark.parametrize("at", [0, 1, 2])  # while it is prepared, and in its turn
def test_an_engine_that_fails_hides_no_other(tools, at):
    script, bench = tools
    engines = {"bad": failing(at), "good": failing(9)}
    script.measure(bench, "tiny", script.tiny(), 1, engines)
    assert bench.figures["tiny"]["1"].keys() == {"good"}
    assert bench.left_out == {"tiny, batch 1: bad": "IndexError: of a compiler"}


def test_a_lost_gpu_is_named_and_not_tried_again(tools, monkeypatch):
    script, bench = tools
    monkeypatch.setattr(bench, "gpu_is_lost", lambda: True)
    engines = {"bad": failing(0), "good": failing(9)}
    with pytest.raises(script.LostGpu):
        script.measure(bench, "tiny", script.tiny(), 1, engines)
    script.measure(bench, "tiny", script.tiny(), 1, engines)  # as the next process does
    assert bench.figures["tiny"]["1"].keys() == {"good"}


def test_what_is_under_way_is_stopped(tools):
    script, bench = tools
    with pytest.raises(script.TimeUp), script.time_up_after(0):
        script.measure(bench, "tiny", script.tiny(), 1, {"slow": lambda *_: time.sleep(30)})
    assert bench.left_out == {"tiny, batch 1: slow": "the process ended in it"}


def test_goals(tools):
    script, _ = tools
    peer = f"{script.PEER} bfloat16"
    compiled = list(script.SLOW_TO_MAKE)[1]
    rows = {peer: 6.0, script.EAGER: 2.0, script.CAPTURED: 1.0, compiled: 1.6}
    cell = {
        label: {"ms_per_step": ms, "idle": 0.02, "share_of_peak": 0.4} for label, ms in rows.items()
    }
    said = script.goals({"cifar10": {"1": cell, "64": cell}, "mnist": {"8": cell}})
    assert list(said.values()) == [
        "6.00 times (wanted: 5)",
        "1.60 times (wanted: 1.5)",
        "1.60 times (wanted: 1.3)",
        "1.000 ms (wanted: at most 0.6)",
        "2.0 % (wanted: under 3 %)",
        "40.0 % (wanted: 45 %)",
        "2.00 times at least, at cifar10, batch 1 (wanted: 1)",
        "1.60 times at least, at cifar10, batch 1 (wanted: 1)",
    ]
    assert script.goals({}) == {}
