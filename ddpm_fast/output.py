"""The folder that a sampling run leaves (README, "Sampling"): pictures, grid, npz, run.json."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import images
from .files import write_text

GIF_FRAMES = 60
GRID_SAMPLES = 256
# What a run writes, and so what --overwrite may delete.
WRITTEN = re.compile(r"images/\d{6,}\.png|grid\.png|denoising\.gif|samples_[\dx]+\.npz|run\.json")


class Output:
    """Pictures are written as their batch ends, what shows the whole run at the end.

    args: out, start, npz, gif and overwrite of `python -m ddpm_fast.sample`.
    """

    def __init__(self, args: argparse.Namespace, sample_shape: Sequence[int]) -> None:
        self.folder, self.args = Path(args.out), args
        self.pictures = images.is_picture(sample_shape)
        if args.gif and not self.pictures:
            raise ValueError(f"--gif wants pictures, and the samples have shape {sample_shape}")
        self.keep_all = args.npz or not self.pictures
        self.kept: list[np.ndarray] = []
        self.frames: dict[int, np.ndarray] = {}
        self.seconds = 0.0

    def prepare(self, run: dict[str, Any]) -> None:
        """Open the folder for `run` before the work begins: it may be unwritable, or another's.

        A folder of the same settings is added to. One of other settings raises ValueError naming a
        difference, because pictures of two runs in one folder are of no use to anybody.
        """
        others = self._difference(run["decides"])
        if others and not self.args.overwrite:
            raise ValueError(
                f"{self.folder} holds a run of other settings ({others}): give another --out, or "
                f"--overwrite to replace it"
            )
        (self.folder / "images" if self.pictures else self.folder).mkdir(
            parents=True, exist_ok=True
        )
        if others:
            for path in [*self.folder.iterdir(), *self.folder.glob("images/*")]:
                if WRITTEN.fullmatch(path.relative_to(self.folder).as_posix()):
                    path.unlink()
        self._write_record(run)

    def _difference(self, decides: dict[str, Any]) -> str:
        """The first setting in which the run recorded in the folder differs, or nothing."""
        path = self.folder / "run.json"
        if not path.is_file():
            return ""
        try:
            there = json.loads(path.read_text())["decides"]
            mine = json.loads(json.dumps(decides))
            names = [k for k in mine if there.get(k) != mine[k]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "its run.json cannot be read"
        if not names:
            return ""
        name = names[0]
        if len(str(mine[name])) + len(str(there.get(name))) > 100:
            return name
        return f"{name}: {there.get(name)} there, {mine[name]} now"

    def _write_record(self, run: dict[str, Any]) -> None:
        write_text(self.folder / "run.json", json.dumps(run, indent=1) + "\n")

    def add(self, index: Tensor, x: Tensor) -> None:
        """Write the pictures of a finished batch."""
        began = time.perf_counter()
        if self.pictures:
            batch = images.to_uint8(x)
            for i, picture in zip(index.tolist(), batch, strict=True):
                images.write_png(self.folder / "images" / f"{i:06d}.png", picture)
        else:
            batch = x.cpu().numpy()
        room = len(batch) if self.keep_all else GRID_SAMPLES - sum(map(len, self.kept))
        self.kept.append(batch[: max(0, room)])
        self.seconds += time.perf_counter() - began

    def frame(self, index: Tensor, done: int, x: Tensor, num_steps: int) -> None:
        """Keep a frame of the moving picture: the first batch, evenly through its steps."""
        stride = max(1, num_steps // GIF_FRAMES)
        if int(index[0]) == self.args.start and (done % stride == 0 or done == num_steps):
            self.frames[done] = images.grid(images.to_uint8(x))

    def finish(self, labels: np.ndarray | None, run: dict[str, Any]) -> Path:
        """Write what shows the whole run; returns the path to tell the user."""
        samples = np.concatenate(self.kept)
        shown = self.folder / "grid.png"
        if self.keep_all:
            path = images.write_npz(self.folder, samples, labels)
            shown = shown if self.pictures else path
        if self.pictures:
            images.write_grid(self.folder / "grid.png", samples[:GRID_SAMPLES])
        if self.frames:
            images.write_gif(self.folder / "denoising.gif", list(self.frames.values()))
        self._write_record(run)
        return shown
