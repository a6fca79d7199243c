"""Kill a sampling run at random moments, go on, and compare with a run that nothing disturbed.

    python benchmarks/bulk_kills.py [--kills 30]

For 1, 2 and 3 processes: each time all of them get SIGKILL, sometimes one of them a little before
the rest, at a random moment after they opened the folder or wrote into it; the run is started
again, and at last left to finish. Its folder must be that of one undisturbed process byte for byte.
Goes to results/bulk_kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
import torch

from ddpm_fast.checkpoint import Model, save_model
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.unet import UNet
from ddpm_fast.unet_config import UNetConfig

NUM_SAMPLES = 6000
COMMAND = [sys.executable, "-m", "ddpm_fast.sample", "--device", "cpu", "--dtype", "float32"]
COMMAND += ["--num-samples", str(NUM_SAMPLES), "--batch-size", "8", "--steps", "5", "--npz"]
COMMAND += ["--threads", "1"]  # whose number can change a last bit


def tiny_model(path: Path) -> None:
    """A network for 8x8 images with random weights."""
    generator = torch.Generator().manual_seed(0)
    config = UNetConfig(
        in_channels=1,
        sample_size=(8, 8),
        base_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(False, True),
        norm_groups=4,
        dropout=0.0,
    )
    unet = UNet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    save_model(path, Model(unet, NoiseSchedule.linear(100, 1e-3, 0.2)))


def start(processes: int, *arguments: object) -> list[subprocess.Popen]:
    """The processes of a run, as torchrun or a scheduler would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"LOCAL_WORLD_SIZE": processes}
    return [
        subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {name: str(value) for name, value in place.items()} | {"RANK": str(i)},
        )
        for i in range(processes)
    ]


def kill(processes: list[subprocess.Popen], chance: random.Random) -> None:
    if chance.random() < 0.3:
        chance.choice(processes).kill()
        time.sleep(chance.uniform(0, 0.1))
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def opened(out: Path) -> int:
    """When a run last wrote its record there."""
    try:
        return (out / "run.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def count(out: Path) -> int:
    return len([*out.glob("images/*.png")])


def contents(folder: Path) -> dict[str, bytes]:
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    record = json.loads(files["run.json"])
    files["run.json"] = json.dumps([record["decides"], record["samples"]]).encode()
    return files


def killed_often(processes: int, kills: int, arguments: list[object], out: Path) -> list[int]:
    """The samples that were there after each kill; RuntimeError if the last start fails.

    The kills are spread over the samples; the last tenth come when only the rest is to be written.
    """
    chance, there = random.Random(), []
    for i in range(kills):
        before, had = opened(out), count(out)
        early = chance.random() < 0.3  # before it has drawn any
        spread = round(1.1 * NUM_SAMPLES * (i + chance.random()) / kills)
        wanted = had if early else min(max(had + 1, spread), NUM_SAMPLES)
        run = start(processes, *arguments, "--out", out)
        while (opened(out) == before or count(out) < wanted) and run[0].poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5 if wanted == NUM_SAMPLES else 0.05))
        kill(run, chance)
        there.append(count(out))
    run = start(processes, *arguments, "--out", out)
    if any(process.wait() for process in run):
        raise RuntimeError("the run that was left alone failed")
    return there


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=30)
    p.add_argument("--processes", type=int, nargs="*", default=[1, 2, 3])
    args = p.parse_args()
    figures: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder / "tiny.safetensors")
        arguments = ["--model", folder / "tiny.safetensors"]
        for process in start(1, *arguments, "--out", folder / "whole"):
            process.wait()
        whole = contents(folder / "whole")
        for processes in args.processes:
            out = folder / str(processes)
            there = killed_often(processes, args.kills, arguments, out)
            if contents(out) != whole:
                sys.exit(f"{processes} processes: the folder differs from the undisturbed run's")
            figures[f"{processes} processes"] = there
            print(
                f"{processes} processes, {args.kills} kills: {there} of {NUM_SAMPLES} samples were "
                "there after each; at last equal",
                flush=True,
            )
    print(results.write("bulk_kills", {"samples": NUM_SAMPLES, "there after each kill": figures}))


if __name__ == "__main__":
    main()
