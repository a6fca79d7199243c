"""Several processes that draw one run together, as a scheduler or torchrun starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from sampling import contents, run

from ddpm_fast.folder import LOCK

in_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds processes in /proc"
)
SAMPLES = 400  # enough that all processes have some, however late they start
COMMON = ["--num-samples", SAMPLES, "--batch-size", 4, "--steps", 10, "--dtype", "float32", "--npz"]
COMMON += ["--device", "cpu", "--threads", 1]  # whose number can change a last bit


# The command where beats and silences are shorter, and all but the leader dawdle in the end.
HURRIED = """
import os, sys, time
from ddpm_fast import cli, heartbeat, output, sample
heartbeat.BEAT_SECONDS, heartbeat.SILENT_LOOKS, heartbeat.LATE_LOOKS = 0.1, 40, 40
drain = output.Output.drain
dawdle = float(os.environ["DAWDLE"]) * (os.environ["RANK"] != "0")
output.Output.drain = lambda self: (time.sleep(dawdle), drain(self))
sys.exit(cli.run(sample.main, "ddpm_fast.sample"))
"""


def start(
    arguments: list[object], module: str | None = "ddpm_fast.sample", **environment: object
) -> subprocess.Popen:
    program = ["-c", HURRIED] if module is None else ["-m", module]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )


def start_ranks(
    size: int, arguments: list[object], *own: list[object], **settings: object
) -> list[subprocess.Popen]:
    """The processes as a cluster's scheduler would start them; rank 0 has the store.

    own: what each is told alone, if anything. settings: of `start`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [[*arguments, *more] for more in own or [()] * size]
    return [start(words[rank], RANK=rank, **place, **settings) for rank in range(size)]


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def wait_until_all_draw(processes: list[subprocess.Popen], out: Path) -> None:
    """Each process of a run opens the folder's lock before it draws."""
    deadline = time.monotonic() + 120

    def draws(process: subprocess.Popen) -> bool:
        for opened in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed in the meantime
                if os.readlink(opened) == str(out.resolve() / LOCK):
                    return True
        return False

    while not all(map(draws, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def wait_for(out: Path, pictures: int) -> None:
    deadline = time.monotonic() + 120
    while len([*out.glob("images/*.png")]) < pictures and time.monotonic() < deadline:
        time.sleep(0.02)


def last_word_without(killed: subprocess.Popen, other: subprocess.Popen) -> str:
    """Kill one: the last line of the other, which must fail then."""
    killed.kill()
    killed.communicate()
    _, err = other.communicate(timeout=120)
    assert other.returncode == 1
    return err.splitlines()[-1]


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
    said = last_word_without(leader, other)
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


@in_proc
def test_a_process_killed_without_torchrun(arguments, tmp_path):
    """As on another machine: nobody but the leader can miss it."""
    leader, other = processes = start_ranks(2, arguments, module=None, DAWDLE=600)
    wait_until_all_draw(processes, tmp_path / "out")
    said = last_word_without(other, leader)
    assert said.startswith("ddpm_fast.sample: 1 of 2 give no sign of life (rank 1): ")
    assert f" of {SAMPLES} samples are in " in said


def test_a_process_slower_than_any_silence(arguments, tmp_path):
    leader, other = start_ranks(2, arguments, module=None, DAWDLE=8)
    said = [process.communicate(timeout=120) for process in (leader, other)]
    assert [leader.returncode, other.returncode] == [0, 0], said
    assert (tmp_path / "out" / "grid.png").is_file()
