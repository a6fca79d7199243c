"""Training data: IDX files, a folder of images, or an npz, held in memory in its stored type."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
IDX_DTYPES = {8: np.uint8, 9: np.int8, 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class DataError(ValueError):
    """Training data that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Dataset:
    """Samples (N, C, *size), uint8 or float32 in [-1, 1], and labels (N,) int64 or None.

    checksums: what tells this data from other, by file.
    """

    samples: Tensor
    labels: Tensor | None
    checksums: dict[str, str]

    def __len__(self) -> int:
        return self.samples.shape[0]

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label; None without labels."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_start (B, C, *size) float32 in [-1, 1], and its labels, of the `indices` (B,) int64."""
        x = self.samples[indices]
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1.0
        return x, None if self.labels is None else self.labels[indices]


def _checksum(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_idx(path: Path) -> np.ndarray:
    """An IDX array (the format of the MNIST files), gzipped or not; DataError if it is none."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        if zero != 0 or kind not in IDX_DTYPES:
            raise ValueError("it does not begin as one")
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
        values = np.frombuffer(data, IDX_DTYPES[kind], offset=4 + 4 * rank)
        if values.size != math.prod(shape):
            raise ValueError(f"it holds {values.size} values, and its header says {shape}")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a readable IDX file: {error}") from None


def _find_images(folder: Path) -> Path | None:
    """The IDX file of images in the folder: the training set's, if there are several."""
    found = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    found = [p for p in found if "images-idx3" in p.name.replace(".", "-")]
    return next((p for p in found if p.name.startswith("train")), found[0] if found else None)


def _find_labels(images: Path) -> Path | None:
    """The labels that lie beside a file of images, gzipped or not."""
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    paths = (images.with_name(name), images.with_name(f"{name}.gz"))
    return next((p for p in paths if p != images and p.is_file()), None)


def _from_idx(images: Path) -> Dataset:
    array = read_idx(images)
    if array.ndim != 3 or array.dtype != np.uint8:
        raise DataError(
            f"{images} must hold uint8 images (N, H, W), got {array.dtype} {array.shape}"
        )
    labels = _find_labels(images)
    files = [images] + ([labels] if labels else [])
    return _dataset(
        torch.from_numpy(array[:, None].copy()), read_idx(labels) if labels else None, files
    )


def _from_npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [key for key in file if key not in ("arr_1", "labels")]
            if not names:
                raise ValueError("it holds no array of samples")
            array = file["arr_0" if "arr_0" in names else names[0]]
            labels = next((file[key] for key in ("arr_1", "labels") if key in file), None)
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise DataError(f"{path} is not a readable npz file: {error}") from None
    if array.size == 0:
        raise DataError(f"{path} holds no samples")
    if array.dtype == np.uint8 and array.ndim in (3, 4):  # (N, H, W) or (N, H, W, C) images
        array = array[:, None] if array.ndim == 3 else np.moveaxis(array, -1, 1)
        samples = torch.from_numpy(np.ascontiguousarray(array))
    elif array.dtype.kind == "f" and array.ndim in (3, 4):  # (N, C, L) series, (N, C, H, W) images
        samples = torch.from_numpy(array.astype(np.float32))
        low, high = samples.min().item(), samples.max().item()
        if not (low >= -1.0 and high <= 1.0):
            raise DataError(
                f"{path} must hold floats in [-1, 1], got [{low:.4g}, {high:.4g}]: scale it first"
            )
    else:
        raise DataError(
            f"{path} must hold uint8 images (N, H, W) or (N, H, W, C), or floats (N, C, L) or "
            f"(N, C, H, W) in [-1, 1], got {array.dtype} of shape {array.shape}"
        )
    return _dataset(samples, labels, [path])


def _as_8_bit(image: Image.Image) -> Image.Image:
    """Grey or RGB of 8 bits; 16-bit grey is scaled, which Pillow's own conversion does not do."""
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(levels.round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of more than 16 bits (mode {image.mode})")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _read_image(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """One picture, uint8 (H, W) or (H, W, 3), scaled and cropped to `size`, (H, W)."""
    try:
        with Image.open(path) as file:
            image = _as_8_bit(file)
    except Exception as error:  # Pillow raises SyntaxError, struct.error and its own besides
        raise DataError(f"{path} is not a readable image: {error}") from None
    if size is None or image.size == (size[1], size[0]):
        return np.asarray(image)
    height, width = size  # scale the shorter side, then cut the middle out
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _find_pictures(folder: Path) -> list[Path]:
    """The pictures anywhere below the folder, without hidden files and folders."""
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def _from_folder(folder: Path, size: tuple[int, int] | None) -> Dataset:
    """Images anywhere below the folder; if they lie in subfolders, each of those is a class."""
    paths = _find_pictures(folder)
    if not paths:
        raise DataError(f"{folder} holds no samples: no IDX files, no npz, no images")
    rows: list[np.ndarray] = []
    for path in paths:
        rows.append(_read_image(path, size))
        if rows[-1].shape[:2] != rows[0].shape[:2]:
            raise DataError(
                f"{path} is {rows[-1].shape[0]}x{rows[-1].shape[1]} (HxW), the first image "
                f"{rows[0].shape[0]}x{rows[0].shape[1]}: give --size HxW to scale and crop them"
            )
    if any(row.ndim == 3 for row in rows):  # one in colour makes all of them RGB
        rows = [np.moveaxis(r, -1, 0) if r.ndim == 3 else np.stack((r, r, r)) for r in rows]
    array = np.ascontiguousarray(np.stack(rows))
    array = array[:, None] if array.ndim == 3 else array
    parents = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    classes = sorted(set(parents))
    if len(classes) > 1 and "" in classes:
        raise DataError(
            f"{folder} holds images both directly and in subfolders, which are classes: put them "
            f"all in subfolders, or none"
        )
    labels = np.array([classes.index(p) for p in parents]) if len(classes) > 1 else None
    data = _dataset(torch.from_numpy(array), labels, [])
    checksums = {f"pixels of {len(paths)} images": hashlib.md5(array).hexdigest()}
    return Dataset(data.samples, data.labels, checksums)


def _dataset(samples: Tensor, labels: np.ndarray | None, files: list[Path]) -> Dataset:
    if samples.numel() == 0:
        raise DataError(f"{files[0]} holds no samples")
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
            images (subfolders are classes), an IDX file, or an npz (arr_0, labels in arr_1):
            uint8 (N, H, W) or (N, H, W, C), or floats (N, C, L) or (N, C, H, W) in [-1, 1].
        size: (H, W) to scale and centre-crop a folder's images to.
    Raises ValueError in one sentence if there is nothing there, or a size is given for what is no
    folder of images; DataError if the data cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no data at {path}: give a folder, an IDX file or an npz")
    if path.is_dir():
        archives = sorted(path.glob("[!.]*.npz"))
        if len(archives) > 1:
            raise ValueError(f"{path} holds {len(archives)} npz files: give the path of one")
        source = _find_images(path) or next(iter(archives), None)
        if source is None:
            return _from_folder(path, size)
        path = source
    if size is not None:
        raise ValueError(f"only a folder of images can be scaled, and {path} is an array of them")
    return _from_npz(path) if path.suffix == ".npz" else _from_idx(path)
