"""Reading and writing models: safetensors with the whole configuration in the file's metadata.

A safetensors file is numbers and JSON, so nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .arguments import shown
from .files import replacing
from .plan import PREDICTION_TYPES, VARIANCE_TYPES
from .schedule import NoiseSchedule
from .unet import UNet
from .unet_config import UNetConfig

FORMAT = "ddpm_fast.model.1"
SHIPPED = ("mnist",)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """A model file that cannot be read; the message is one sentence for the user."""


@dataclass
class Model:
    """A trained network and what it was trained for.

    prediction_type, variance_type: as in `plan`. provenance: JSON-able, how it was trained. name,
    sha256: of the file it was read from.
    """

    unet: UNet
    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    provenance: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    sha256: str = ""

    @property
    def config(self) -> UNetConfig:
        return self.unet.config


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file; CheckpointError in one sentence if none."""
    if not path.is_file():
        raise CheckpointError(f"there is no {kind} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # besides SafetensorError, torch's own for what it cannot hold
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is not a readable safetensors file (truncated or of another format): {reason}"
        ) from None


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, whole or not at all; OSError if it cannot be written."""
    with replacing(path) as partial:
        arrays = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        try:
            save_file(arrays, partial, metadata)
        except SafetensorError as error:  # a full disk is no OSError there
            raise OSError(f"{path} cannot be written: {error}") from None


def save_model(
    path: str | os.PathLike[str], model: Model, dtype: torch.dtype = torch.float32
) -> None:
    """Write `model` to `path`, its weights stored as `dtype` (float16 halves the file).

    Raises ValueError for weights that are not finite in that dtype, OSError if it cannot write.
    """
    config = {
        "unet": model.config.to_dict(),
        "schedule": model.schedule.config(),
        "prediction_type": model.prediction_type,
        "variance_type": model.variance_type,
    }
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config),
        "provenance": json.dumps(model.provenance),
    }
    # state_dict's convolution weights may be channels_last; the file is always in logical order.
    tensors = {name: value.to(dtype) for name, value in model.unet.state_dict().items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name!r} is not finite in {dtype}: the model was not saved")
    write_tensors(path, tensors, metadata)


def model_path(name: str) -> Path:
    """The file of a shipped model's name, or the path itself."""
    if name in SHIPPED:
        return Path(str(resources.files(__package__) / "models" / f"{name}.safetensors"))
    path = Path(name)
    if os.path.isfile(path / "model.safetensors"):
        return path / "model.safetensors"
    if not os.path.isfile(path):  # unlike Path's, also for a name too long to be one
        raise ValueError(
            f"there is no model {name!r}: give the path of a model file, the folder of a training "
            f"run, or the name of a shipped model ({', '.join(SHIPPED)})"
        )
    return path


def _configured(path: Path, metadata: dict[str, str], num_tensors: int) -> Model:
    """The model that the metadata describes, its weights without memory yet."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a ddpm_fast model (format {FORMAT!r} wanted, "
            f"{shown(metadata.get('format'))} found)"
        )
    try:
        config = json.loads(metadata["config"])
        provenance = json.loads(metadata.get("provenance", "{}"))
        prediction, variance = config["prediction_type"], config["variance_type"]
        if prediction not in PREDICTION_TYPES or variance not in VARIANCE_TYPES:
            raise ValueError(f"prediction type {prediction!r}, variance type {variance!r}")
        if not isinstance(provenance, dict):
            raise ValueError("its provenance is no dict")
        unet_config = UNetConfig.from_dict(config["unet"])
        if unet_config.learn_sigma != variance.startswith("learned"):
            raise ValueError(f"variance type {variance!r} and {unet_config.learn_sigma=}")
        blocks = len(unet_config.channel_mult) * (2 * unet_config.num_res_blocks + 1) + 2
        if 10 * blocks > num_tensors:  # each has ten; a small file must not cost long work
            raise ValueError(f"{blocks} residual blocks, but {num_tensors} tensors are there")
        with torch.device("meta"):
            unet = UNet(unet_config)
        schedule = NoiseSchedule.from_config(config["schedule"])
        return Model(unet, schedule, prediction, variance, provenance)
    except KeyError as error:
        raise CheckpointError(f"{path} describes no valid model: it lacks {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} describes no valid model: {reason}") from None


def load_model(name: str | os.PathLike[str], device: torch.device | str = "cpu") -> Model:
    """Read a model, ready to sample: float32 weights on `device`, eval mode.

    Args:
        name: "mnist" (shipped), a .safetensors file, or a training run's folder.
    Raises ValueError in one sentence if there is no such file, CheckpointError if it is truncated,
    of another format, of the wrong shapes, or holds a number that is not finite.
    """
    path = model_path(os.fspath(name))
    tensors, metadata = read_tensors(path, "model")
    model = _configured(path, metadata, len(tensors))
    weights = _checked_weights(path, model.unet, tensors)
    model.unet.load_state_dict({k: v.to(device) for k, v in weights.items()}, assign=True)
    model.unet.eval().requires_grad_(False)
    model.name = os.fspath(name)
    model.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return model


def _checked_weights(path: Path, unet: UNet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as float32, if they are exactly the network's and finite."""
    wanted = {key: value.shape for key, value in unet.state_dict().items()}
    for key in sorted(wanted.keys() | tensors.keys()):
        shown = ascii(key)[:100]
        if key not in tensors or key not in wanted:
            lack = "lacks" if key in wanted else "has an unknown tensor"
            raise CheckpointError(f"{path} {lack} {shown}: its weights and configuration disagree")
        if tensors[key].shape != wanted[key]:
            raise CheckpointError(
                f"{path} has {shown} of shape {tuple(tensors[key].shape)} where its configuration "
                f"wants {tuple(wanted[key])}"
            )
        if tensors[key].dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{path} has {shown} of {tensors[key].dtype}, which is no weight")
        if not tensors[key].float().isfinite().all():
            raise CheckpointError(
                f"{path} has {shown} with values that are not finite: it cannot be sampled"
            )
    return {key: value.float() for key, value in tensors.items()}
