"""Where a run's files go: a folder, or a URL of fsspec's."""

from __future__ import annotations

import builtins
import errno
import shutil
import subprocess
import sys

import pytest
from sampling import contents, run

from ddpm_fast.folder import LocalFolder, RemoteFolder, open_folder

QUICK = ["--num-samples", 5, "--batch-size", 2, "--steps", 4, "--dtype", "float32", "--npz"]


@pytest.fixture
def memory(request):
    """An empty place in fsspec's memory: its file system and URL."""
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    name = f"/{request.node.name}"
    yield fs, f"memory:/{name}/run"
    if fs.exists(name):
        fs.rm(name, recursive=True)


def test_a_run_into_memory_goes_on(class_model_file, tmp_path, capsys, memory):
    fs, url = memory
    arguments = ["--model", class_model_file, *QUICK]
    assert run(capsys, *arguments, "--out", tmp_path / "local")[0] == 0
    status, said, _ = run(capsys, *arguments, "--out", url)
    assert status == 0 and said.strip().endswith(f"{url}/grid.png")
    fs.rm_file(f"{url}/images/000002.png")
    status, said, _ = run(capsys, *arguments, "--out", url)
    assert status == 0 and said.startswith("1 samples in ")
    fs.get(url, str(tmp_path / "copy"), recursive=True)
    assert contents(tmp_path / "copy") == contents(tmp_path / "local")
    status, _, err = run(capsys, *arguments, "--seed", 1, "--out", url)
    assert status == 2 and "seed: 0 there, 1 now" in err
    assert (
        run(capsys, *arguments[:2], "--steps", 4, "--seed", 1, "--out", url, "--overwrite")[0] == 0
    )
    names = sorted(p.rpartition("/")[2] for p in fs.ls(url, detail=False))
    assert names == ["grid.png", "images", "run.json"]


def test_a_failed_write_leaves_nothing_in_memory(memory):
    fs, url = memory
    folder = open_folder(url)
    with pytest.raises(OSError, match="full"), folder.replacing("a.png") as path:
        path.write_bytes(b"half")
        raise OSError("the disk is full")
    assert not fs.exists(f"{url}/a.png")


def test_a_file_url_is_a_local_folder(class_model_file, tmp_path, capsys):
    arguments = ["--model", class_model_file, *QUICK]
    assert run(capsys, *arguments, "--out", tmp_path / "a")[0] == 0
    assert run(capsys, *arguments, "--out", f"file://{tmp_path}/b")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert isinstance(open_folder(f"file://{tmp_path}"), LocalFolder)
    assert isinstance(open_folder(str(tmp_path)), LocalFolder)


def test_a_url_that_cannot_be_opened(class_model_file, capsys, monkeypatch):
    pytest.importorskip("fsspec")
    arguments = ["--model", class_model_file, *QUICK]
    for url in ("", "://x"):  # as of a variable of the shell's that is not set
        status, _, err = run(capsys, *arguments, "--out", url)
        assert status == 2 and f"--out must name a folder or a URL, got {url!r}" in err
    status, _, err = run(capsys, *arguments, "--out", "nonsense://x")
    assert status == 2 and "nonsense://x cannot be opened" in err and len(err.splitlines()) == 1
    imported = builtins.__import__

    def without(name, *more):
        if name == "fsspec":
            raise ImportError(name)
        return imported(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install ddpm_fast\[fsspec\]"):
        RemoteFolder("memory://x")


def test_partial_files_are_never_beside_the_pictures(tmp_path):
    folder = LocalFolder(tmp_path)
    folder.make("images")
    with folder.replacing("images/000001.png") as path:
        path.write_bytes(b"half")
        assert path.parent == tmp_path and [*folder.names("images")] == []
    assert [*folder.names("images")] == ["000001.png"]
    (tmp_path / path.name).write_bytes(b"left by a killed writer")
    folder.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_the_last_of_a_run_removes_the_lock(tmp_path):
    first, second, other = (LocalFolder(tmp_path) for _ in range(3))
    first.lock()
    first.share_lock()
    second.share_lock()
    first.unlock()
    with pytest.raises(OSError, match="another run is writing into"):
        other.lock()
    second.unlock()
    assert [*tmp_path.iterdir()] == []
    other.lock()
    with pytest.raises(OSError, match="another run"):
        first.share_lock()
    other.unlock()


def test_a_removed_folder_takes_its_lock_along(tmp_path):
    """A run whose folder was removed does not let others in beside the one that made it anew."""
    old, new, other = (LocalFolder(tmp_path / "out") for _ in range(3))
    old.make()
    old.lock()
    shutil.rmtree(tmp_path / "out")
    new.make()
    new.lock()
    old.unlock()
    with pytest.raises(OSError, match="another run is writing into"):
        other.lock()
    new.unlock()


def test_a_killed_process_leaves_no_lock(tmp_path):
    """The kernel lets go of it, so the next run goes on without a hand."""
    code = "import sys, time; from ddpm_fast.folder import LocalFolder as F; "
    code += "f = F(sys.argv[1]); f.lock(); print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        folder = LocalFolder(tmp_path)
        with pytest.raises(OSError, match="another run"):
            folder.lock()
        process.kill()
        process.wait()
        folder.lock()
        folder.unlock()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ddpm_fast.folder.fcntl.flock", flock)
    folder = LocalFolder(tmp_path)
    folder.lock()
    folder.share_lock()
    folder.unlock()
