"""Several processes, one run: who does what, and how they tell each other."""

from __future__ import annotations

import os
import threading
import time
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddpm_fast import distributed, heartbeat, sample
from ddpm_fast.device import resolve_device
from ddpm_fast.distributed import OthersGoneError, World
from ddpm_fast.progress import Progress


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


def wait_until_they_ended(leader: World) -> None:
    deadline = time.monotonic() + 20
    while not leader.others_left():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_is_missed(worlds, monkeypatch):
    """It stands still, as its counter does when it is killed: no word of it ever comes."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 1.0)
    leader, good, bad = both = worlds(3)
    leader.publish(b"")
    with good, bad:
        receive(both)
        began = time.monotonic()
        while time.monotonic() < began + 2:  # slow, and alive
            assert not leader.others_left()
            time.sleep(0.01)
    good.leave()  # and from here on it is as silent as the other
    with pytest.raises(OthersGoneError, match=r"^process 2 of 3 has given no sign of life in 1 s$"):
        wait_until_they_ended(leader)


def test_who_has_left_is_not_missed(worlds, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.2)
    leader, early, late = both = worlds(3)
    leader.publish(b"")
    receive(both)
    early.leave()
    with late:
        threading.Timer(1, late.leave).start()
        wait_until_they_ended(leader)


def test_a_heart_stops_with_its_block(worlds):
    def hearts() -> int:
        return sum(thread.name == "heartbeat" for thread in threading.enumerate())

    leader, other = worlds(2)
    with leader:
        assert hearts() == 0
        with pytest.raises(OSError), other:
            assert hearts() == 1
            raise OSError
    assert hearts() == 0


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


def test_the_leader_is_gone_before_it_answers(worlds, monkeypatch):
    """The store is the leader's: whatever is asked of it then says so in our words."""
    other = worlds(2)[1]

    def lost(*_: object) -> None:
        raise dist.DistNetworkError("Failed to recv, got 0 bytes.")

    monkeypatch.setattr(other, "_store", SimpleNamespace(add=lost, check=lost, get=lost))
    for ask in (other.receive, other.leave, lambda: next(other.claims(np.arange(3), 1))):
        with pytest.raises(OthersGoneError, match=r"^the other processes are gone$"):
            ask()
