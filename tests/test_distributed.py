"""Several processes, one run: who does what, and what becomes of it when one is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sampling import contents, run

from ddpm_fast import distributed, sample
from ddpm_fast.device import resolve_device
from ddpm_fast.distributed import OthersGoneError, World
from ddpm_fast.folder import LOCK
from ddpm_fast.progress import Progress

in_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds processes in /proc"
)


@pytest.fixture
def worlds(monkeypatch):
    """A function that makes the worlds of `size` processes around one store, old keys and all."""
    store = dist.HashStore()
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 0)]))

    def make(size: int) -> list[World]:
        made = []
        for rank in range(size):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(size))
            made.append(World())
        return made

    return make


def receive(worlds: list[World]) -> list[bytes]:
    """What the others get, each in a thread of its own as they wait, while the leader looks on."""
    plans: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda w=w: plans.__setitem__(w.rank, w.receive()), daemon=True)
        for w in worlds[1:]
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while any(t.is_alive() for t in threads) and time.monotonic() < deadline:
        worlds[0].count_steps(0)
        time.sleep(0.01)
    return [plans[w.rank] for w in worlds[1:]]


def test_every_sample_is_claimed_once_whoever_is_faster(worlds):
    leader, *others = both = worlds(3)
    leader.publish(b"plan")
    assert receive(both) == [b"plan", b"plan"]
    indices = np.arange(100, 171) * 3
    claims = [w.claims(indices, 8) for w in both]
    got: list[list[int]] = [[], [], []]
    for who in [0, 1, 1, 1, 2, 1, 1, 0, 1, 1, 2]:  # a batch each, of nine
        got[who] += islice(claims[who], 8)
    assert sorted(chain(*got)) == indices.tolist()
    assert got[0][:8] == indices[:8].tolist() and len(got[1]) > 30
    assert [next(c, None) for c in claims] == [None] * 3
    assert leader.count_steps(5) == 5 and others[0].count_steps(2) == 7
    for i, other in enumerate(others):
        assert not leader.others_left()
        other.leave()
        assert leader.others_left() == (i == 1)


def test_a_restart_in_the_same_store_begins_anew(worlds):
    """torchrun's store outlives the processes, which may have died before or after any line."""
    first = worlds(2)
    first[0].publish(b"old")
    assert receive(first) == [b"old"]
    assert [*first[1].claims(np.arange(4), 2)] == [0, 1, 2, 3]
    first[1].leave()
    waiting = worlds(2)[1]  # dies before it is answered
    threading.Thread(target=waiting.receive, daemon=True).start()
    second = worlds(3)
    second[0].publish(b"new")
    assert not second[0].others_left()
    assert receive(second) == [b"new", b"new"]
    assert [*second[2].claims(np.arange(4), 2)] == [0, 1, 2, 3]
    assert second[0].count_steps(1) == 1 and not second[0].others_left()


@pytest.mark.parametrize("early", [False, True])
def test_a_failure_is_told_to_the_leader_who_would_wait_for_ever(worlds, early):
    """After the others are done; before it knows of the run, as where a machine lacks the model."""
    leader, good, bad = both = worlds(3)
    leader.publish(b"")
    receive(both[: 2 if early else 3])

    def fail() -> None:
        with pytest.raises(OSError, match="no such disk"), bad.telling_failure():
            raise OSError("no such disk")

    failing = threading.Thread(target=fail, daemon=True)
    failing.start()
    deadline = time.monotonic() + 20
    while failing.is_alive() and time.monotonic() < deadline:
        assert not leader.others_left()
        time.sleep(0.01)
    assert not failing.is_alive() and not leader.others_left()
    good.leave()
    with pytest.raises(OthersGoneError, match=r"^1 of 3 processes failed$"):
        leader.others_left()


def test_a_world_of_one_needs_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World()
    world.publish(b"")
    assert world.leads and world.others_left()
    assert [*world.claims(np.array([5, 7, 9]), 2)] == [5, 7, 9]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_an_environment_that_torchrun_did_not_make(monkeypatch, name):
    monkeypatch.setenv(name, "many")
    with pytest.raises(ValueError, match=f"{name} is set to 'many'"):
        World()


def test_threads_are_shared_out(worlds, monkeypatch):
    asked = []
    monkeypatch.setattr(sample.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does
    for local_size, wanted in ((1, None), (3, None), (20, None), (3, 5)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
        sample.set_threads(wanted, worlds(20)[0])
    assert asked == [2, 1, 5]  # a process alone keeps what it has
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # as a user does
    sample.set_threads(None, worlds(20)[0])
    assert asked == [2, 1, 5]


def test_one_bar_shows_what_all_have_done_and_what_was_there(worlds, capsys):
    both = worlds(2)
    both[0].publish(b"")
    receive(both)
    index = torch.arange(6)
    with Progress(both[1], 100, 40, 5, quiet=False) as other:
        for done in range(6):
            other.callback(index, done, index)
        other.look()
    assert capsys.readouterr().err == ""  # the leader alone has a bar
    with Progress(both[0], 100, 40, 5, quiet=False) as progress:
        progress.callback(index[:2], 0, index)
        progress.callback(index[:2], 2, index)  # not every step is told
        progress.callback(index[:2], 3, index)
        progress.look()
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith(" 67%") and " 67/100 images " in last  # 60 + 6 + 2 * 3/5


def test_processes_share_out_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(resolve_device("auto", rank)) for rank in (0, 1, 2)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    assert str(resolve_device("cuda:1", 0)) == "cuda:1" and str(resolve_device("auto")) == "cuda"


SAMPLES = 400  # enough that all processes have some, however late they start
COMMON = ["--num-samples", SAMPLES, "--batch-size", 4, "--steps", 10, "--dtype", "float32", "--npz"]
COMMON += ["--device", "cpu", "--threads", 1]  # whose number can change a last bit


def start(
    arguments: list[object], module: str = "ddpm_fast.sample", **environment: object
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )


def start_ranks(size: int, arguments: list[object], *own: list[object]) -> list[subprocess.Popen]:
    """The processes as a cluster's scheduler would start them; rank 0 has the store.

    own: what each is told alone, if anything.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [[*arguments, *more] for more in own or [()] * size]
    return [start(words[rank], RANK=rank, **place) for rank in range(size)]


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def wait_until_all_draw(processes: list[subprocess.Popen], out: Path) -> None:
    """Each process of a run opens the folder's lock before it draws."""
    deadline = time.monotonic() + 120

    def draws(process: subprocess.Popen) -> bool:
        opened = Path(f"/proc/{process.pid}/fd").iterdir()
        return any(os.path.realpath(fd) == str(out / LOCK) for fd in opened)

    while not all(map(draws, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def wait_for(out: Path, pictures: int) -> None:
    deadline = time.monotonic() + 120
    while len([*out.glob("images/*.png")]) < pictures and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture
def arguments(class_model_file, tmp_path) -> list[object]:
    return ["--model", class_model_file, *COMMON, "--out", tmp_path / "out"]


@pytest.fixture
def whole(arguments, tmp_path, capsys) -> dict[str, bytes]:
    """The folder of one process that nothing disturbed."""
    threads = torch.get_num_threads()
    assert run(capsys, *arguments, "--out", tmp_path / "whole")[0] == 0
    torch.set_num_threads(threads)
    return contents(tmp_path / "whole")


@in_proc
def test_torchrun_starts_a_killed_process_again(arguments, tmp_path, whole):
    torchrun = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    torchrun += ["-m", "ddpm_fast.sample"]
    process = start([*torchrun, *arguments], "torch.distributed.run")
    wait_for(tmp_path / "out", 10)
    os.kill(children(process)[1], signal.SIGKILL)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert contents(tmp_path / "out") == whole
    assert said.strip().splitlines()[-1].endswith("grid.png")


@in_proc
def test_the_end_of_the_job_and_another_number_of_processes(arguments, tmp_path, whole):
    out = tmp_path / "out"
    processes = start_ranks(3, arguments)
    wait_until_all_draw(processes, out)
    wait_for(out, 10)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143] * 3
    there = len([*out.glob("images/*.png")])
    assert 10 <= there < SAMPLES
    told = said[0].splitlines()[-1]
    assert told.startswith("ddpm_fast.sample: stopped: ") and said[1:] == ["", ""]
    assert f" of {SAMPLES} samples are in " in told
    processes = start_ranks(2, [*arguments, "--overwrite"])  # of nothing, here
    said = [process.communicate(timeout=120) for process in processes]
    assert said[0][0].startswith(f"{SAMPLES - there} samples in ") and said[1] == ("", "")
    assert contents(out) == whole


@in_proc
def test_the_others_end_when_the_leader_is_gone(arguments, tmp_path):
    """Without torchrun nobody ends them: they do when they ask for more work."""
    leader, other = processes = start_ranks(2, [*arguments, "--num-samples", 5000])
    wait_until_all_draw(processes, tmp_path / "out")
    wait_for(tmp_path / "out", 10)
    leader.kill()
    leader.communicate()
    _, err = other.communicate(timeout=120)
    assert other.returncode == 1
    said = err.splitlines()[-1]
    assert said.startswith("ddpm_fast.sample: the other processes are gone: ")
    assert " of 5000 samples are in " in said


def test_a_process_without_the_folder(arguments, tmp_path):
    """As where a machine does not share --out: the others draw it all, and the leader tells."""
    own = [["--out", tmp_path / name] for name in ("out", "elsewhere")]
    leader, other = start_ranks(2, arguments, *own)
    said = [process.communicate(timeout=120)[1].splitlines()[-1] for process in (leader, other)]
    assert leader.returncode == other.returncode == 1
    standing = f"{SAMPLES} of {SAMPLES} samples are in {tmp_path / 'out'}; run it again to go on"
    assert said[0] == f"ddpm_fast.sample: 1 of 2 processes failed: {standing}"
    assert said[1].startswith("ddpm_fast.sample: [Errno 2] No such file or directory")


def test_the_leader_is_gone_before_it_answers(worlds, monkeypatch):
    """The store is the leader's: whatever is asked of it then says so in our words."""
    other = worlds(2)[1]

    def lost(*_: object) -> None:
        raise dist.DistNetworkError("Failed to recv, got 0 bytes.")

    monkeypatch.setattr(other, "_store", SimpleNamespace(add=lost, check=lost, get=lost))
    for ask in (other.receive, other.leave, lambda: next(other.claims(np.arange(3), 1))):
        with pytest.raises(OthersGoneError, match=r"^the other processes are gone$"):
            ask()
