"""PyTorch's own files (.pt, .pth, .bin), read without running anything in them.

Such a file is a pickle, which can ask for any function to be called. torch's restricted unpickler
builds tensors and plain containers only; what it lets through is checked for size here.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Containers may hold one another over and over: a short file can have paths without end.
MAX_ENTRIES, MAX_DEPTH = 1_000_000, 6
# ermongroup/ddim saves a list; these are the names of its entries.
LIST = ("model", "optimizer", "epoch", "step", "ema")


def is_pickle(path: Path) -> bool:
    """Whether a file begins as PyTorch's do: with a zip archive's or a pickle's first bytes.

    The length that a safetensors file begins with may look like those; its ninth byte is a brace.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by their path in its containers: "ema.model.conv_in.weight".

    Raises ValueError in one sentence for a file that is truncated, asks for code, or claims more
    numbers than it holds.
    """
    archive = zipfile.is_zipfile(path)
    if archive:
        _check_archive(path)
    # Named so, torch takes a file for safetensors: it must not see the name.
    renamed = path.suffix == ".safetensors"
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # about formats of old versions
            root = torch.load(
                file if renamed else path,
                map_location="cpu",
                weights_only=True,
                mmap=archive and not renamed,  # so that what is not used is not read
            )
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(_sentence(error)) from None
    if isinstance(root, (list, tuple)):
        root = dict(zip(LIST, root, strict=False))
    return dict(_tensors(root, "", MAX_DEPTH, count()))


def _check_archive(path: Path) -> None:
    """PyTorch never compresses: an archive that does could grow without bound."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except Exception as error:
        raise ValueError(_sentence(error)) from None
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its archive is compressed or overlaps itself, as PyTorch's never is")


def _sentence(error: Exception) -> str:
    """torch's reason, without its advice to run what is in the file."""
    text = " ".join(str(error).split())
    asked = re.search(r"GLOBAL (\S+)", text)
    if isinstance(error, pickle.UnpicklingError) and asked:
        return (
            f"it asks for {ascii(asked[1])[:80]}, and nothing in a file is ever run: save a state "
            f"dict alone"
        )
    text = text.partition("WeightsUnpickler error: ")[2] or text
    reason = text.partition(" Check the documentation")[0][:150]
    return f"it is no readable PyTorch file (truncated or of another format): {reason}"


def _tensors(
    value: Any, path: str, depth: int, entries: Iterator[int]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested containers, to a depth; `entries` counts those that were looked at."""
    if isinstance(value, Tensor):
        yield path, _checked(value, path)
        return
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return
    if depth == 0:
        return
    for key, inner in items:
        if next(entries) == MAX_ENTRIES:
            raise ValueError(f"it has more than {MAX_ENTRIES} entries: it is no model")
        if isinstance(inner, (Tensor, dict, list, tuple)) and isinstance(key, (str, int)):
            inner_path = f"{path}.{key}" if path else str(key)
            yield from _tensors(inner, inner_path, depth - 1, entries)


def _checked(value: Tensor, path: str) -> Tensor:
    """The tensor, if every number of it is in the file."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
    if not plain or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{ascii(path)[:80]} in it is no plain tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{ascii(path)[:80]} in it claims more numbers than the file holds")
    return value.detach()
