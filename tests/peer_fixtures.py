"""The checkpoints of tests/fixtures: an original's input and output, and weights made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "fixtures"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights of the given shapes, in which no norm and no bias is trivial.

    RandomState's stream never changes (NumPy's policy, NEP 19), so a fixture need not hold them.
    """
    random, found = np.random.RandomState(seed), {}
    for key, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) > 1 and shape[0] > 1:
            values /= np.sqrt(np.prod(shape[1:], dtype=np.float32))
        elif key.endswith(("bias", ".b")):
            values *= 0.3
        else:  # of a norm
            values = 1 + 0.3 * values
        found[key] = torch.from_numpy(values)
    return found


class Fixture(NamedTuple):
    """state: the checkpoint's tensors. inputs: x, t and, with classes, y. eps: what came out.

    choices: arguments for what the shapes do not tell. about: JSON that belongs to the checkpoint.
    """

    state: dict[str, Tensor]
    inputs: list[Tensor]
    eps: Tensor
    choices: dict[str, Any]
    about: dict[str, Any]


def fixture(name: str) -> Fixture:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        names = file.keys()
        tensors = {key: file.get_tensor(key) for key in names}
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    state = random_weights(about.pop("shapes"), about.pop("seed"))
    state |= {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    inputs = [tensors[key] for key in ("x", "t", "y") if key in tensors]
    return Fixture(state, inputs, tensors["eps"], about.pop("choices"), about)


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def contained(name: str, state: dict[str, Tensor]) -> Any:
    """The state as that code base's training script saves it, the weights that follow it zero."""
    if name == "w86763777":
        table = {key: state[key] for key in state if "timembedding.0" in key}
        follows = zeros(state) | table
        return {"net_model": follows, "ema_model": state, "step": 5, "x_T": torch.zeros(2, 3)}
    if name == "score_sde":
        shadow = [value for key, value in state.items() if key != "sigmas"]
        return {
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
            "model": prefixed("module.", zeros(state)),
            "ema": {"decay": 0.9999, "num_updates": 3, "shadow_params": shadow},
            "step": 3,
        }
    if name == "lucidrains":
        ema = {"initted": torch.tensor(True), "step": torch.tensor(3)}
        ema |= prefixed("online_model.", zeros(state)) | prefixed("ema_model.", state)
        return {"step": 3, "model": zeros(state), "ema": ema, "scaler": None, "version": "2.3.4"}
    return state


def write_checkpoint(name: str, folder: Path) -> Path:
    """The fixture as its code base leaves it; returns what to give to load_model."""
    made = fixture(name)
    if not name.startswith("diffusers"):
        torch.save(contained(name, made.state), folder / f"{name}.pt")
        return folder / f"{name}.pt"
    pipeline = folder / name
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "scheduler").mkdir()
    save_file(made.state, pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    (pipeline / "unet" / "config.json").write_text(json.dumps(made.about["config"]))
    (pipeline / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDPMScheduler"} | made.about["scheduler"])
    )
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    return pipeline
