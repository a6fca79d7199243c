"""python -m ddpm_fast.train, in a process of its own or in this one, and a look at its losses."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

from ddpm_fast import cli, train

NETWORK = ["--base-channels", "8", "--channel-mult", "1,2", "--num-res-blocks", "1"]
NETWORK += ["--attention", "1", "--norm-groups", "4", "--timesteps", "20"]
RUN = ["--batch-size", "4", "--warmup", "5", "--dtype", "float32", "--device", "cpu"]
# No byte code: a test limits the size of what the process may write.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def arguments(data, out, *more: object) -> list[str]:
    """The command's; a small new network, unless `more` has a --model."""
    network = [] if "--model" in more else NETWORK
    return [str(a) for a in ("--data", data, "--out", out, *network, *RUN, *more)]


def command(*args, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ddpm_fast.train", *arguments(*args)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        **settings,
    )


def here(*args) -> int:
    """The command in this process: its exit status."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cli.run(lambda: train.main(arguments(*args, "--quiet")), "ddpm_fast.train")
    finally:
        torch.set_num_threads(before)


def losses(out: Path) -> list[tuple[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "loss", "lr", "images_per_second", "seconds"]
    return [(row[0], row[1]) for row in rows[1:]]
