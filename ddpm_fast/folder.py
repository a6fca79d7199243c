"""The place of a run's files: a folder, or by fsspec any place that has a URL.

Both kinds have the same methods, and in both a file appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import PARTIAL, replacing

LOCK = ".lock"


def open_folder(url: str) -> LocalFolder | RemoteFolder:
    """The folder at a path, or at a URL of fsspec's ("s3://bucket/run", "memory://run").

    Nothing is made yet. Raises ValueError in one sentence for a URL that cannot be opened.
    """
    scheme, separator, path = url.partition("://")
    if not scheme:
        raise ValueError(f"--out must name a folder or a URL, got {url!r}")
    if not separator:
        return LocalFolder(url)
    return LocalFolder(path) if scheme in ("file", "local") else RemoteFolder(url)


class LocalFolder:
    """A folder of this machine, or one that it has mounted."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def __str__(self) -> str:
        return str(self.path)

    def make(self, below: str = "") -> None:
        """The folder itself, or its subfolder `below`, if it is not there yet."""
        (self.path / below).mkdir(parents=True, exist_ok=True)

    def names(self, below: str = "") -> Iterator[str]:
        """The files in it, or in its subfolder; no empty ones, which a crash can leave."""
        try:
            entries = os.scandir(self.path / below)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                try:
                    empty = not entry.is_file() or entry.stat().st_size == 0
                except FileNotFoundError:  # another run has renamed or removed it by now
                    continue
                if not empty:
                    yield entry.name

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yield a path to write the new file `name` to; it is there when the block has ended.

        The temporary file is never in a subfolder, whose every file readers of pictures may take.
        """
        with replacing(self.path / name, beside=self.path) as partial:
            yield partial

    def lock(self) -> None:
        """Let no other run in until `unlock` or the end of the process, however it ends.

        Raises OSError if another run is in it.
        """
        while self._lock is None:
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            self._take(lock, fcntl.LOCK_EX)
            if self._is_in_place(lock):  # and not one that a run removed between the two lines
                self._lock = lock
            else:
                os.close(lock)

    def share_lock(self) -> None:
        """From here on other processes of this run may be in it too; each calls this."""
        if self._lock is None:
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._take(self._lock, fcntl.LOCK_SH)

    def _is_in_place(self, lock: int) -> bool:
        """Whether the open file is the one that others would open now."""
        try:
            return os.path.samestat(os.stat(self.path / LOCK), os.fstat(lock))
        except FileNotFoundError:
            return False

    def _take(self, lock: int, kind: int) -> None:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            self._lock = None
            raise OSError(
                f"another run is writing into {self}: wait until it has ended, or give another "
                f"--out"
            ) from None
        except OSError:  # a file system without locks
            pass

    def unlock(self) -> None:
        """Let others in; the last process of the run removes the lock's file."""
        if self._lock is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_in_place(self._lock):  # and the folder was not removed meanwhile
                self.delete(LOCK)
        except OSError:  # other processes of the run are still in it
            pass
        os.close(self._lock)
        self._lock = None

    def clean(self) -> None:
        """Remove what killed writers left, which only the holder of the lock may."""
        for path in self.path.glob(f".*{PARTIAL}*"):
            path.unlink(missing_ok=True)


class RemoteFolder:
    """A place that fsspec reaches. It has no lock; a file is as whole as its upload makes it."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise ValueError(f"{url} is reached by fsspec: pip install ddpm_fast[fsspec]") from None
        try:
            self.fs, self.path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} cannot be opened: {error}") from None
        self.url = url

    def __str__(self) -> str:
        return self.url

    def make(self, below: str = "") -> None:
        self.fs.makedirs(f"{self.path}/{below}".rstrip("/"), exist_ok=True)

    def names(self, below: str = "") -> Iterator[str]:
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(f"{self.path}/{below}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry["type"] == "file" and entry["size"]:
                yield entry["name"].rpartition("/")[2]

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.path}/{name}")

    def delete(self, name: str) -> None:
        self.fs.rm_file(f"{self.path}/{name}")

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name.rpartition("/")[2]
            yield path
            self.fs.put_file(str(path), f"{self.path}/{name}")

    def lock(self) -> None:
        """Nothing: no two runs of other settings may be started into it at the same moment."""

    def share_lock(self) -> None:
        """Nothing, as above."""

    def unlock(self) -> None:
        """Nothing, as above."""

    def clean(self) -> None:
        """Nothing: partial files are on this machine alone, and gone."""
