"""python -m ddpm_fast.sample in this process, and a look at what it left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_fast import cli, sample


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, in this process."""
    words = [str(a) for a in arguments]
    if "--device" not in words:  # what the GPU does is in test_cuda.py
        words += ["--device", "cpu"]
    try:
        status = cli.run(lambda: sample.main(words), "ddpm_fast.sample")
    except SystemExit as stop:  # argparse's own
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the folder; of run.json what decides the samples."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    record = json.loads(files["run.json"])
    files["run.json"] = json.dumps([record["decides"], record["samples"]]).encode()
    return files
