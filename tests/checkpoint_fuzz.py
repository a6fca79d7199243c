"""Mutated checkpoints: python tests/checkpoint_fuzz.py NUMBER SEED, in a process of its own.

Every file either loads or is refused in one sentence, and none costs memory. What breaks the
process, or raises anything else, shows in its exit status.
"""

import io
import json
import random
import resource
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from peer_fixtures import FOLDER, NAMES
from safetensors import safe_open
from safetensors.torch import save

from ddpm_fast.checkpoint import CheckpointError, Model, load_model, save_model
from ddpm_fast.families import diffusers_writer
from ddpm_fast.lucid_unet import LucidUNet, LucidUNetConfig
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.unet import UNet
from ddpm_fast.unet_config import UNetConfig

MAX_GROWTH = 200 << 10  # KiB, as getrusage counts
TINY = {"sample_size": (4, 4), "base_channels": 4, "channel_mult": (1, 1), "norm_groups": 2}
TINY |= {"num_res_blocks": 1, "attention_levels": (False, True), "in_channels": 1}


def saved(state: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def originals(folder: Path) -> dict[str, bytes]:
    """Small files to begin with. Those of most families have the right names and tiny tensors."""
    model = Model(UNet(UNetConfig(**TINY)), NoiseSchedule.linear(20, 1e-3, 0.2))
    save_model(folder / "ours", model)
    found = {"ours": (folder / "ours").read_bytes()}
    tiny = LucidUNetConfig(1, (4, 4), 4, 4, (1, 2), (False, True), (1, 2), (2, 2), 1)
    model.unet = LucidUNet(tiny)
    save_model(folder / "ours", model)
    found["ours, lucid"] = (folder / "ours").read_bytes()
    for name in NAMES:
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
        state = {k: torch.zeros([min(n, 4) for n in shape]) for k, shape in shapes.items()}
        found[f"{name}.safetensors"] = save(state)
        few = dict(list(state.items())[:12])  # an archive has a record for each
        found[f"{name}.pt"] = saved({"ema": few, "step": 3})
        found[f"{name}, legacy"] = saved(few, _use_new_zipfile_serialization=False)
    return found


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes, most of them near the beginning, where formats are."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 600))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, rng.randbytes(8)))
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 4:
            del data[at : at + rng.randrange(1, 20)]
        else:
            data[at:at] = data[at : at + rng.randrange(1, 100)]
    return bytes(data)


def repacked(content: bytes, rng: random.Random) -> bytes:
    """A torch archive with one record damaged and its checksums right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        pickle = next(name for name in names if name.endswith("data.pkl"))
        target = pickle if rng.random() < 0.8 else rng.choice(names)
        for name in names:
            data = old.read(name)
            new.writestr(name, damaged(data, rng) if name == target else data)
    return out.getvalue()


def check(path: Path, what: str) -> bool:
    """Whether it loads; anything but a sentence is raised again with its description."""
    try:
        load_model(path)
        return True
    except CheckpointError as error:
        text = str(error)
        if "\n" in text or len(text) > 800:
            raise AssertionError(f"{what}: {text!r}") from error
        return False
    except Exception as error:
        raise AssertionError(what) from error


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(number: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    rng, loaded = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, path = originals(folder), folder / "m.pt"
        pipeline = folder / "pipeline"
        unet = UNet(UNetConfig(**TINY))
        schedule = NoiseSchedule.linear(20, 1e-3, 0.2)
        diffusers_writer.write(pipeline, unet, schedule, "epsilon", "fixed_small", True)
        parts = [p for p in pipeline.glob("*/*") if p.is_file()]
        before = peak()
        for i in range(number):
            if rng.random() < 0.15:
                part = rng.choice(parts)
                whole = part.read_bytes()
                part.write_bytes(damaged(whole, rng))
                loaded += check(pipeline, f"{i}: {part.name}")
                part.write_bytes(whole)
                continue
            name = rng.choice(sorted(files))
            archive = name.endswith(".pt") and rng.random() < 0.7
            path.write_bytes((repacked if archive else damaged)(files[name], rng))
            loaded += check(path, f"{i}: {name}")
        growth = peak() - before
    if growth > MAX_GROWTH:
        raise AssertionError(f"memory grew by {growth >> 10} MiB")
    print(json.dumps({"files": number, "loaded": loaded, "growth_mib": growth >> 10}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
