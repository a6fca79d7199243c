"""Files of named tensors: safetensors, and PyTorch's own read as if they were.

A safetensors file is numbers and JSON, so nothing in it is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing
from .pickles import is_pickle, read_pickle

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """A model file that cannot be read; the message is one sentence for the user."""


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"there is no {kind} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # besides SafetensorError, torch's own for what it cannot hold
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is not a readable safetensors file (truncated or of another format): {reason}"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; CheckpointError in one sentence if it is none."""
    with _opened(path, "model") as file:
        return file.metadata() or {}


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file; CheckpointError in one sentence if none."""
    with _opened(path, kind) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def read_any(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch or safetensors file, whatever its name says it is.

    Raises CheckpointError, or ValueError without the path, in one sentence.
    """
    return read_pickle(path) if is_pickle(path) else read_tensors(path, "model")[0]


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, whole or not at all; OSError if it cannot be written."""
    with replacing(path) as partial:
        arrays = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        try:
            save_file(arrays, partial, metadata)
        except SafetensorError as error:  # a full disk is no OSError there
            raise OSError(f"{path} cannot be written: {error}") from None
