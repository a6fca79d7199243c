"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def replacing(
    path: str | os.PathLike[str], beside: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the block ends without error.

    It lies in the folder of `path`, or in the folder `beside` of the same file system, and keeps
    the suffix, because writers choose their format by it. The file gets the permissions of any new
    file, whatever the writer does (safetensors makes it private).
    Raises OSError where the folder is missing or cannot be written.
    """
    path = Path(path)
    folder = path.parent if beside is None else Path(beside)
    partial = folder / f".{path.stem}.{os.getpid()}{PARTIAL}{path.suffix}"
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)
