"""From x_0 in [-1, 1] to files: PNG, grid, moving GIF, npz."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_uint8(x: Tensor) -> np.ndarray:
    """Images x (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C): (x + 1) * 127.5, half to even."""
    levels = ((x.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(1, -1).contiguous().cpu().numpy()


def is_picture(sample_shape: Sequence[int]) -> bool:
    """Whether a sample (C, *size) can be a PNG: grey, RGB or RGBA, two dimensions."""
    return len(sample_shape) == 3 and sample_shape[0] in MODES


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def write_png(path: Path, array: np.ndarray) -> None:
    """One picture, uint8 (H, W, C)."""
    _image(array).save(path, format="PNG")


def grid(images: np.ndarray, gap: int = 2) -> np.ndarray:
    """Pictures (N, H, W, C) side by side, as near to a square as N allows, black between."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    canvas = np.zeros(shape, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_grid(path: Path, images: np.ndarray) -> None:
    """All pictures (N, H, W, C) uint8 in one PNG."""
    write_png(path, grid(images))


def write_gif(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 80) -> None:
    """Pictures (H, W, C) uint8 one after the other; the last stays for two seconds."""
    pictures = [_image(frame) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    pictures[0].save(
        path, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )


def read_png(data: bytes) -> np.ndarray:
    """The picture in the bytes of a file, uint8 (H, W, C)."""
    with Image.open(io.BytesIO(data)) as image:
        array = np.asarray(image)
    return array.reshape(*array.shape[:2], -1)


def write_npz(
    path: Path,
    shape: Sequence[int],
    dtype: type,
    samples: Iterable[np.ndarray],
    labels: np.ndarray | None,
) -> None:
    """An npz with arr_0, and labels as arr_1: the layout that the field's evaluators read.

    shape, dtype: (N, H, W, C) of uint8 images, or (N, C, *size) of float32 series and volumes, as
    training reads them. samples: the N of them, of which only one need be in memory at a time.
    """
    with zipfile.ZipFile(path, "w") as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as entry:
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(entry, header)
            for sample in samples:
                entry.write(sample.tobytes())
        if labels is not None:
            with file.open("arr_1.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, labels)
