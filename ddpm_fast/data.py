"""Training data: IDX files, a folder of images, or an npz, held in memory in its stored type."""

from __future__ import annotations

import gzip
import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
IDX_DTYPES = {8: np.uint8, 9: np.int8, 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class DataError(ValueError):
    """Training data that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Dataset:
    """Samples (N, C, *size), uint8 or float32 in [-1, 1], and labels (N,) int64 or None."""

    samples: Tensor
    labels: Tensor | None
    checksums: dict[str, str]

    def __len__(self) -> int:
        return self.samples.shape[0]

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else int(self.labels.max()) + 1

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_start (B, C, *size) float32 in [-1, 1], and its labels."""
        x = self.samples[indices]
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1.0
        return x, None if self.labels is None else self.labels[indices]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def read_idx(path: Path) -> np.ndarray:
    """An IDX array (the format of the MNIST files), gzipped or not."""
    try:
        data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
        if zero != 0 or kind not in IDX_DTYPES:
            raise ValueError("no IDX header")
        return np.frombuffer(data, IDX_DTYPES[kind], offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(f"{path} is not a readable IDX file: {error}") from None


def _find_idx(folder: Path, kind: str) -> Path | None:
    """The training file of a kind (images-idx3, labels-idx1) in the folder."""
    found = sorted(p for p in folder.iterdir() if kind in p.name.replace(".", "-"))
    return next((p for p in found if p.name.startswith("train")), found[0] if found else None)


def _from_idx(images: Path, labels: Path | None) -> Dataset:
    array = read_idx(images)
    if array.ndim != 3 or array.dtype != np.uint8:
        raise DataError(
            f"{images} must hold uint8 images (N, H, W), got {array.dtype} {array.shape}"
        )
    files = [images] + ([labels] if labels else [])
    return _dataset(
        torch.from_numpy(array[:, None].copy()), read_idx(labels) if labels else None, files
    )


def _from_npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = list(file.keys())
            array = file["arr_0" if "arr_0" in keys else keys[0]]
            labels = file["arr_1"] if "arr_1" in keys else file["labels"] if "labels" in keys else None
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise DataError(f"{path} is not a readable npz file: {error}") from None
    if array.dtype == np.uint8 and array.ndim in (3, 4):  # (N, H, W) or (N, H, W, C) images
        array = array[:, None] if array.ndim == 3 else np.moveaxis(array, -1, 1)
        samples = torch.from_numpy(np.ascontiguousarray(array))
    elif array.dtype.kind == "f" and array.ndim in (3, 4):  # (N, C, L) series, (N, C, H, W) images
        samples = torch.from_numpy(array.astype(np.float32))
        low, high = samples.min().item(), samples.max().item()
        if not (-1.0 <= low and high <= 1.0):
            raise DataError(
                f"{path} must hold floats in [-1, 1], got [{low:.4g}, {high:.4g}]: scale it first"
            )
    else:
        raise DataError(
            f"{path} must hold uint8 images (N, H, W) or (N, H, W, C), or floats (N, C, L) or "
            f"(N, C, H, W) in [-1, 1], got {array.dtype} of shape {array.shape}"
        )
    return _dataset(samples, labels, [path])


def _read_image(path: Path, size: tuple[int, int] | None, mode: str | None) -> Image.Image:
    try:
        with Image.open(path) as file:
            image = file.convert(mode or ("L" if file.mode in ("1", "L", "I;16") else "RGB"))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{path} is not a readable image: {error}") from None
    if size is None or image.size == (size[1], size[0]):
        return image
    height, width = size  # scale the shorter side, then cut the middle out
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _from_folder(folder: Path, size: tuple[int, int] | None) -> Dataset:
    """Images anywhere below the folder; if they lie in subfolders, each of those is a class."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no IDX files, no npz and no images {IMAGE_SUFFIXES}")
    first = _read_image(paths[0], size, None)
    rows = []
    for path in paths:
        row = np.asarray(_read_image(path, size, first.mode))
        if rows and row.shape != rows[0].shape:
            raise DataError(
                f"{path} is {row.shape[1]}x{row.shape[0]}, the first image "
                f"{rows[0].shape[1]}x{rows[0].shape[0]}: give --size HxW to scale and crop them"
            )
        rows.append(row)
    array = np.stack(rows)
    array = array[:, None] if array.ndim == 3 else np.moveaxis(array, -1, 1)
    parents = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    classes = sorted(set(parents))
    labels = np.array([classes.index(p) for p in parents]) if len(classes) > 1 else None
    names = hashlib.md5("\n".join(str(p.relative_to(folder)) for p in paths).encode()).hexdigest()
    data = _dataset(torch.from_numpy(np.ascontiguousarray(array)), labels, [])
    return Dataset(data.samples, data.labels, {f"{len(paths)} file names": names})


def _dataset(samples: Tensor, labels: np.ndarray | None, files: list[Path]) -> Dataset:
    if len(samples) == 0:
        raise DataError(f"{files[0] if files else 'the data'} holds no samples")
    if labels is not None:
        if labels.shape != (len(samples),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DataError(
                f"labels must be {len(samples)} integers from 0, got {labels.dtype} {labels.shape}"
            )
        labels = torch.from_numpy(labels.astype(np.int64))
    return Dataset(samples, labels, {path.name: _checksum(path) for path in files})


def load_dataset(path: str | Path, size: tuple[int, int] | None = None) -> Dataset:
    """Read training data.

    Args:
        path: a folder with IDX files (train-images-idx3-ubyte[.gz] and its labels), a folder of
            images (subfolders are classes), an IDX file, or an npz (arr_0, labels in arr_1).
        size: (H, W) to scale and centre-crop a folder's images to.
    Raises ValueError in one sentence if there is nothing there, DataError if it cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        images = _find_idx(path, "images-idx3")
        if images is not None:
            return _from_idx(images, _find_idx(path, "labels-idx1"))
        archives = sorted(path.glob("*.npz"))
        return _from_npz(archives[0]) if len(archives) == 1 else _from_folder(path, size)
    if not path.is_file():
        raise ValueError(f"there is no data at {path}: give a folder, an IDX file or an npz")
    return _from_npz(path) if path.suffix == ".npz" else _from_idx(path, None)
