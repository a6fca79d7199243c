"""The folder that a sampling run leaves (README, "Sampling"): samples, grid, npz, run.json.

What is there decides what is still to do: a sample's file, named by its index, is whole or absent.
"""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from . import images, record
from .folder import open_folder

GIF_FRAMES = 60
GRID_SAMPLES = 64
WRITERS = 4  # zlib and the disk let go of the interpreter, and a remote place is slow to answer
# What a run writes, and so what --overwrite may delete.
WRITTEN = re.compile(
    r"(images/\d{6,}\.png|arrays/\d{6,}\.npy|grid\.png|denoising\.gif|samples_[\dx]+\.npz|"
    r"run\.json)"
)


def frame_stride(num_steps: int) -> int:
    """The steps between two frames of the moving picture."""
    return max(1, num_steps // GIF_FRAMES)


class Output:
    """Samples are written beside the computation, what shows the whole run at its end.

    Args:
        url: of the folder; see `folder.open_folder`.
        sample_shape: (C, *size) of one sample. Pictures are PNGs in images/, others float32 arrays
            in arrays/.
        indices: the samples of the run.
        batch_size: how many are computed, and come to `add`, at once.
        npz, gif: whether to leave those too; there is an npz always where there are no pictures.
    Leaving it as a context manager finishes the files in hand, whatever ended the block.
    """

    def __init__(
        self,
        url: str,
        sample_shape: Sequence[int],
        indices: range,
        batch_size: int,
        *,
        npz: bool = False,
        gif: bool = False,
    ) -> None:
        self.folder = open_folder(url)
        self.indices, self.batch_size = indices, batch_size
        self.pictures = images.is_picture(sample_shape)
        if gif and not self.pictures:
            raise ValueError(f"--gif wants pictures, and the samples have shape {sample_shape}")
        self.npz, self.gif = npz or not self.pictures, gif
        channels, *size = sample_shape
        self.array_shape = (*size, channels) if self.pictures else tuple(sample_shape)
        self.below, self.suffix = ("images", ".png") if self.pictures else ("arrays", ".npy")
        self._frames: dict[int, np.ndarray] = {}
        self._pool = ThreadPoolExecutor(WRITERS)
        self._in_hand: deque[Future] = deque()

    def prepare(self, run: dict[str, Any], overwrite: bool = False) -> tuple[np.ndarray, list[str]]:
        """Open the folder for `run`: (of each sample, whether to compute it; notes for the user).

        Raises OSError if it cannot be written or another run is in it, and ValueError naming the
        differences if it holds samples of other settings, of which a mixture is of no use to
        anybody; to `overwrite` is to delete them.
        """
        self._refuse_others(run, overwrite)
        self.folder.make()
        self.folder.lock()
        earlier = self._refuse_others(run, overwrite)  # now nobody changes it
        self.folder.clean()
        if earlier is None:
            self._delete_written()
        self.folder.make(self.below)
        missing = self._missing()
        if self.gif and "denoising.gif" not in self.folder.names():
            missing[: self.batch_size] = True  # its frames are seen only while they are computed
        notes = []
        if earlier is not None:
            draws = bool(missing.any())
            changed = record.differences(earlier.get("environment", {}), run["environment"])
            if changed and draws:
                notes.append(f"{self.folder} goes on with another {changed}: last bits may differ")
            record.continue_from(earlier, run, draws)
        self._write_record(run)
        self.folder.share_lock()
        return missing, notes

    def _refuse_others(self, run: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
        """The record of the run that `run` goes on with; None if there is nothing to go on with."""
        there, earlier = self._there(run)
        if there and not overwrite:
            raise ValueError(
                f"{self.folder} holds {there}: give another --out, or --overwrite to replace it"
            )
        return None if there else earlier

    def _there(self, run: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
        """What is there that `run` cannot go on with, in words, and the record that is there."""
        if record.NAME not in self.folder.names():
            others = any(True for _ in self._written())
            return (f"samples, but no {record.NAME} that says of what" if others else ""), None
        earlier = record.parse(self.folder.read(record.NAME))
        if earlier is None:
            return f"a run, but its {record.NAME} cannot be read", None
        changed = record.differences(earlier["decides"], run["decides"])
        if changed and not any("/" in name for name in self._written()):
            return "", None  # it has left no sample that could be mixed with others
        return (f"a run of other settings ({changed})" if changed else ""), earlier

    def _written(self) -> Iterator[str]:
        """The files that runs have left, this or others."""
        for below in ("", "images/", "arrays/"):
            for name in self.folder.names(below):
                if WRITTEN.fullmatch(below + name):
                    yield below + name

    def _delete_written(self) -> None:
        for name in list(self._written()):
            self.folder.delete(name)

    def _write_record(self, run: dict[str, Any]) -> None:
        with self.folder.replacing(record.NAME) as path:
            path.write_text(record.to_text(run))

    def _file(self, index: int) -> str:
        return f"{self.below}/{index:06d}{self.suffix}"

    def _missing(self) -> np.ndarray:
        """Of each sample of the run, whether its file is missing."""
        missing = np.ones(len(self.indices), bool)
        for name in self.folder.names(self.below):
            stem = name.removesuffix(self.suffix)
            if stem.isdecimal() and self._file(int(stem)) == f"{self.below}/{name}":
                place = int(stem) - self.indices.start
                if 0 <= place < len(missing):
                    missing[place] = False
        return missing

    def _count(self) -> int:
        return int(np.count_nonzero(~self._missing()))

    def standing(self) -> str:
        """How much of the run is there, in words."""
        total = len(self.indices)
        return f"{self._count()} of {total} samples are in {self.folder}; run it again to go on"

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.folder.unlock()

    def stop(self) -> None:
        """Finish the files in hand, for the last time."""
        self._pool.shutdown()

    def drain(self) -> None:
        """Wait until all that was added is written; raises OSError if something could not be."""
        self._settle(0)

    def add(self, index: Tensor, x: Tensor) -> None:
        """Begin to write the samples x (B, C, *size) in [-1, 1] of a finished batch.

        Raises OSError if an earlier one could not be written.
        """
        batch = images.to_uint8(x) if self.pictures else x.cpu().numpy()
        for i, sample in zip(index.tolist(), batch, strict=True):
            self._submit(self._write_sample, i, sample)
        if self._frames:
            self._submit(self._write_gif, list(self._frames.values()))
            self._frames.clear()
        self._settle(2 * self.batch_size)  # else a slow disk would fill the memory

    def _submit(self, task: Callable[..., None], *arguments: object) -> None:
        self._in_hand.append(self._pool.submit(task, *arguments))

    def _settle(self, allowed: int) -> None:
        """Wait until at most `allowed` tasks are in hand; raise the error of any that ended."""
        while self._in_hand and (len(self._in_hand) > allowed or self._in_hand[0].done()):
            self._in_hand.popleft().result()

    def _write_sample(self, index: int, sample: np.ndarray) -> None:
        with self.folder.replacing(self._file(index)) as path:
            if self.pictures:
                images.write_png(path, sample)
            else:
                np.save(path, sample)

    def _write_gif(self, frames: list[np.ndarray]) -> None:
        with self.folder.replacing("denoising.gif") as path:
            images.write_gif(path, frames)

    def frame(self, index: Tensor, done: int, x: Tensor, num_steps: int) -> None:
        """Keep a frame of the moving picture: the first batch, evenly through its steps."""
        wanted = self.gif and int(index[0]) == self.indices.start
        if wanted and (done % frame_stride(num_steps) == 0 or done == num_steps):
            self._frames[done] = images.grid(images.to_uint8(x))

    def finish(self, labels: np.ndarray | None, run: dict[str, Any]) -> str:
        """Write what shows the whole run, from its files; returns the place to tell the user.

        labels: (N,) for the npz. Raises RuntimeError if a file is missing or cannot be read.
        """
        if self._missing().any():
            raise RuntimeError(
                f"all were written, but only {self.standing()} (--out must be one place for all "
                f"processes)"
            )
        shape = (len(self.indices), *self.array_shape)
        shown = f"samples_{'x'.join(map(str, shape))}.npz"
        if self.npz:
            dtype = np.uint8 if self.pictures else np.float32
            with self.folder.replacing(shown) as path:
                images.write_npz(path, shape, dtype, self._read(self.indices), labels)
        if self.pictures:
            shown = "grid.png"
            with self.folder.replacing(shown) as path:
                images.write_grid(path, np.stack([*self._read(self.indices[:GRID_SAMPLES])]))
        self._write_record(run)
        return f"{self.folder}/{shown}"

    def _read(self, indices: range) -> Iterator[np.ndarray]:
        """The samples in the order of `indices`, a few read ahead."""
        with ThreadPoolExecutor(WRITERS) as pool:
            for first in range(0, len(indices), GRID_SAMPLES):
                yield from pool.map(self._read_sample, indices[first : first + GRID_SAMPLES])

    def _read_sample(self, index: int) -> np.ndarray:
        data = self.folder.read(self._file(index))
        try:
            array = images.read_png(data) if self.pictures else np.load(io.BytesIO(data))
            if array.shape != self.array_shape:
                raise ValueError(f"its shape is {array.shape}")
        except (OSError, ValueError, SyntaxError) as error:
            raise RuntimeError(
                f"{self.folder}/{self._file(index)} is broken ({error}): delete it and run again"
            ) from None
        return array
