"""The benchmark of captured loops runs, as far as it can without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast import backend

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(backend.extension is None, reason="the compiled extension is missing")
def test_smoke():
    command = [sys.executable, "benchmarks/bench_captured.py", "--smoke"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    for batch, engines in figures["models"]["tiny"].items():
        row = engines["ddpm_fast eager"]
        assert row["ms_per_step"] > 0 and row["prepared_seconds"] > 0 and row["rounds"] == 1
        per_batch = 1e3 * int(batch) / row["ms_per_step"]
        assert row["images_per_second_1000"] == pytest.approx(per_batch / 1000)
        assert row["images_per_second_3"] == pytest.approx(per_batch / 3)
    assert list(figures["models"]["tiny"]) == ["1", "2"]
    assert figures["left_out"]["ddpm_fast captured"] == "there is nothing to capture on a CPU"
