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
def test_a_failure_is_told_to_the_leader(worlds, early):
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


@pytest.fixture
def hurried(monkeypatch):
    """Every look of the leader is one in time for a beat, and three are a long silence."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(heartbeat, "SILENT_LOOKS", 3)
    monkeypatch.setattr(heartbeat, "LATE_LOOKS", 10)


def test_a_killed_process_is_missed_when_all_others_have_ended(worlds, hurried):
    leader, _, last = worlds(3)
    leader.publish(b"")
    for _ in range(2):
        for rank in (1, 2):
            leader._store.add(f"beats/{rank}", 1)
        assert not leader.others_left()
    for _ in range(20):  # rank 2 draws on, and 1 is silent
        leader._store.add("beats/2", 1)
        assert not leader.others_left()
    last._run = leader._run
    last.leave()
    with pytest.raises(OthersGoneError, match=r"^1 of 3 give no sign of life \(rank 1\)$"):
        leader.others_left()


@pytest.mark.parametrize("stale", [0, 7])
def test_a_process_may_be_late_but_not_for_ever(worlds, hurried, stale):
    """stale: what its like in an earlier start has left in the store."""
    leader = worlds(2)[0]
    leader.publish(b"")
    leader._store.add("beats/1", stale)
    assert [leader.others_left() for _ in range(10)] == [False] * 10
    with pytest.raises(OthersGoneError, match="rank 1"):
        leader.others_left()


def test_how_a_process_ended_outlasts_its_silence(worlds, hurried):
    leader, left, failed, slow = both = worlds(4)
    leader.publish(b"")
    for other in both[1:]:
        other._run, other._knows_run = leader._run, True
    left.leave()
    with pytest.raises(OSError), failed.telling_failure():
        raise OSError
    for _ in range(20):
        leader._store.add("beats/3", 1)
        assert not leader.others_left()
    slow.leave()
    with pytest.raises(OthersGoneError, match=r"^1 of 4 processes failed$"):
        leader.others_left()


def test_looks_are_as_rare_as_beats(worlds, monkeypatch):
    monkeypatch.setattr(heartbeat, "LATE_LOOKS", 1)
    leader = worlds(2)[0]
    leader.publish(b"")
    assert [leader.others_left() for _ in range(50)] == [False] * 50


def test_a_heart_beats_in_its_block_alone(worlds, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)

    def beats(rank: int) -> int:
        return leader._store.add(f"beats/{rank}", 0)

    leader, other = worlds(2)
    with pytest.raises(OSError), leader, other:
        deadline = time.monotonic() + 20
        while beats(1) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        raise OSError
    last = beats(1)
    time.sleep(0.1)
    assert beats(1) == last >= 5 and beats(0) == 0


def test_a_heart_is_quiet_when_the_store_is_gone(worlds, monkeypatch):
    def lost(*_: object) -> None:
        raise dist.DistNetworkError("Failed to recv, got 0 bytes.")

    other = worlds(2)[1]
    monkeypatch.setattr(other._heart, "_store", SimpleNamespace(add=lost))
    complaints = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    with other:
        other._heart._thread.join(20)
    assert complaints == []


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
