"""A model's file changed in any part, and what a refusal must be."""

from __future__ import annotations

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from ddpm_fast.checkpoint import CheckpointError, load_model


def refuses(path, match: str | None = None, error=CheckpointError, **choices) -> None:
    """`load_model` raises `error`, in one line that holds `match`."""
    with pytest.raises(error, match=match) as caught:
        load_model(path, **choices)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def metadata_of(path) -> dict[str, str]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))["__metadata__"]


def rewrite(path, change=None, **metadata) -> None:
    """Write the model's file again with other metadata, its tensors passed through `change`."""
    tensors, old = load_file(path), metadata_of(path)
    change = change or (lambda tensors: tensors)
    save_file(change(tensors), path, {k: v for k, v in (old | metadata).items() if v is not None})


def configured(path, **parts) -> None:
    config = json.loads(metadata_of(path)["config"])
    for name, change in parts.items():
        config[name] = config.get(name, {}) | change if isinstance(change, dict) else change
    rewrite(path, config=json.dumps(config))
