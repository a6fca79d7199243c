"""Reading and writing models: safetensors with the whole configuration in the file's metadata.

A safetensors file is numbers and JSON, so nothing in it is ever executed. Checkpoints of other code
bases are read by `families`.
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
from torch import Tensor

from . import families
from .families import diffusers
from .families.layout import meta_unet
from .families.reading import ChoiceError, Choices
from .lucid_unet import LucidUNet, LucidUNetConfig
from .pickles import is_pickle
from .schedule import PREDICTION_TYPES, VARIANCE_TYPES, NoiseSchedule
from .tensor_files import (
    WEIGHT_DTYPES,
    CheckpointError,
    read_metadata,
    read_tensors,
    write_tensors,
)
from .unet import UNet
from .unet_config import UNetConfig

FORMAT = "ddpm_fast.model.1"
SHIPPED = ("mnist",)


@dataclass
class Model:
    """A trained network and what it was trained for.

    prediction_type, variance_type, clip_denoised: as in `plan`. provenance: JSON-able, how it was
    trained; for a checkpoint of another code base, its `family`, and `conventions`: sentences that
    say what was chosen in reading it, and why. name, sha256: of what it was read from.
    """

    unet: UNet | LucidUNet
    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    provenance: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    sha256: str = ""
    clip_denoised: bool = True

    @property
    def config(self) -> UNetConfig | LucidUNetConfig:
        return self.unet.config

    @property
    def conventions(self) -> list[str]:
        """The sentences of the provenance, fit to be printed whatever a file has there."""
        sentences = self.provenance.get("conventions", [])
        found = [s for s in sentences if isinstance(s, str)] if isinstance(sentences, list) else []
        return ["".join(c for c in s if c.isprintable())[:400] for s in found[:100]]


def save_model(
    path: str | os.PathLike[str], model: Model, dtype: torch.dtype = torch.float32
) -> None:
    """Write `model` to `path`, its weights stored as `dtype` (float16 halves the file).

    Raises ValueError for weights that are not finite in that dtype, OSError if it cannot write.
    """
    config = {
        "lucid_unet" if isinstance(model.unet, LucidUNet) else "unet": model.config.to_dict(),
        "schedule": model.schedule.config(),
        "prediction_type": model.prediction_type,
        "variance_type": model.variance_type,
        "clip_denoised": model.clip_denoised,
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
    """The file of a shipped model's name or of a training run, or else the path itself."""
    if name in SHIPPED:
        return Path(str(resources.files(__package__) / "models" / f"{name}.safetensors"))
    path = Path(name)
    if os.path.isfile(path / "model.safetensors"):
        return path / "model.safetensors"
    # Unlike Path's, these answer for a name too long to be one, too.
    if not os.path.isfile(path) and not (os.path.isdir(path) and diffusers.find(path)):
        raise ValueError(
            f"there is no model {name!r}: give the path of a model file, the folder of a training "
            f"run or of a diffusers model, or the name of a shipped model ({', '.join(SHIPPED)})"
        )
    return path


def _configured(path: Path, metadata: dict[str, str], num_tensors: int) -> Model:
    """The model that the metadata of our own file describes, its weights without memory yet."""
    try:
        config = json.loads(metadata["config"])
        provenance = json.loads(metadata.get("provenance", "{}"))
        prediction, variance = config["prediction_type"], config["variance_type"]
        if prediction not in PREDICTION_TYPES or variance not in VARIANCE_TYPES:
            raise ValueError(f"prediction type {prediction!r}, variance type {variance!r}")
        clip = config.get("clip_denoised", True)
        if not isinstance(provenance, dict) or not isinstance(clip, bool):
            raise ValueError("its provenance is no dict, or clip_denoised is no true or false")
        if "lucid_unet" in config:
            with torch.device("meta"):
                unet = LucidUNet(LucidUNetConfig.from_dict(config["lucid_unet"]))
        else:
            unet = meta_unet(UNetConfig.from_dict(config["unet"]), num_tensors)
        if unet.config.learn_sigma != variance.startswith("learned"):
            raise ValueError(f"variance type {variance!r} and {unet.config.learn_sigma=}")
        schedule = NoiseSchedule.from_config(config["schedule"])
        return Model(unet, schedule, prediction, variance, provenance, clip_denoised=clip)
    except KeyError as error:
        raise CheckpointError(f"{path} describes no valid model: it lacks {error}") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _invalid(path, "describes no valid model", error) from None


def _invalid(path: Path, what: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:400]
    return CheckpointError(f"{path} {what}: {reason}")


def load_model(
    name: str | os.PathLike[str], device: torch.device | str = "cpu", **choices: Any
) -> Model:
    """Read a model, ready to sample: float32 weights on `device`, eval mode.

    Args:
        name: "mnist" (shipped), a .safetensors file, a training run's folder, or a checkpoint of
            another code base (`families.FAMILIES`): a PyTorch file or a diffusers folder, known by
            what is in it. Nothing in a file is ever executed.
        choices: what such a checkpoint does not tell and its family's published default is wrong
            for: `families.reading.HINTS`. provenance["conventions"] says what was chosen.
    Raises ValueError in one sentence if there is no such file or no such choice, CheckpointError if
    it is truncated, of another format, of the wrong shapes, or holds a number that is not finite.
    """
    path, chosen = model_path(os.fspath(name)), Choices(choices)
    read = [path]
    if not path.is_dir() and not is_pickle(path) and read_metadata(path).get("format") == FORMAT:
        tensors, metadata = read_tensors(path, "model")
        model = _configured(path, metadata, len(tensors))
        chosen.refuse_rest("ddpm_fast")
    else:
        model, tensors, read = _foreign(path, chosen)
    weights = _checked_weights(path, model.unet, tensors)
    model.unet.load_state_dict({k: v.to(device) for k, v in weights.items()}, assign=True)
    model.unet.eval().requires_grad_(False)
    model.name = os.fspath(name)
    model.sha256 = _sha256(read)
    return model


def _sha256(paths: list[Path]) -> str:
    """Of the files' contents, one after the other; a large one is never in memory as a whole."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _foreign(path: Path, chosen: Choices) -> tuple[Model, dict[str, Tensor], list[Path]]:
    """The model of another code base's checkpoint, its tensors, and the files they are from."""
    try:
        reading, read = families.read(path, chosen)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, (CheckpointError, ChoiceError)):
            raise
        raise _invalid(path, "cannot be read", error) from None
    provenance = {"family": reading.family, "conventions": chosen.notes}
    model = Model(
        reading.network,
        reading.schedule,
        reading.prediction_type,
        reading.variance_type,
        provenance,
        clip_denoised=reading.clip_denoised,
    )
    return model, reading.tensors, read


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
