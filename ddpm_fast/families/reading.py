"""What is read out of a foreign checkpoint, and what was chosen on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..arguments import count, one_of
from ..schedule import PREDICTION_TYPES, VARIANCE_TYPES, NoiseSchedule
from ..unet_config import NULL_CLASSES, QKV_ORDERS

# What a checkpoint may leave open; each is an argument of load_model and an option of convert.
HINTS = {
    "image_size": "height and width that it was trained on: one number, or two",
    "num_heads": "heads of each attention",
    "head_channels": "channels of each head, instead of a number of heads",
    "qkv_order": "layout of the attention's projection",
    "timesteps": "T of the noise schedule",
    "schedule": "noise schedule: linear or cosine",
    "prediction_type": "what the network predicts",
    "variance_type": "of the reverse process",
    "rescale_timesteps": "the network was given t * 1000 / T",
    "null_class": "what the label after the last class means; row: the embedding's last row",
    "weights": "prefix of the weights to read, where a file holds several sets",
}
OPTIONS = {
    "qkv_order": QKV_ORDERS,
    "schedule": ("linear", "cosine"),
    "prediction_type": PREDICTION_TYPES,
    "variance_type": VARIANCE_TYPES,
    "null_class": tuple(name for name in NULL_CLASSES if name != "zero"),
}
COUNTS = {"num_heads": 2**12, "head_channels": 2**14, "timesteps": 2**20 - 1}


class ChoiceError(ValueError):
    """What was asked for is no choice; not the checkpoint's fault."""


class Weights(NamedTuple):
    """All tensors of a file by their path in it, and the prefix of those of the network.

    asked: whether that prefix was asked for, and nothing better is to be looked for.
    """

    tensors: Mapping[str, Tensor]
    prefix: str
    asked: bool

    def network(self) -> dict[str, Tensor]:
        n = len(self.prefix)
        return {k[n:]: v for k, v in self.tensors.items() if k.startswith(self.prefix)}


@dataclass
class Reading:
    """A foreign checkpoint as one of ours.

    network: without memory yet. tensors: its state dict. family: a module's NAME. The rest as in
    `checkpoint.Model`.
    """

    network: nn.Module
    tensors: dict[str, Tensor]
    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip_denoised: bool = True
    family: str = ""


class Choices:
    """What was asked for, what was chosen, and why: `notes` are short sentences for the user.

    given: some of HINTS; None is not asked for. Raises ValueError for values that are none.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = {name: value for name, value in given.items() if value is not None}
        self.notes: list[str] = []
        try:
            for name, value in self.given.items():
                one_of("an argument for a checkpoint", name, HINTS)
                if name in OPTIONS:
                    one_of(name, value, OPTIONS[name])
                elif name == "image_size":
                    for side in _sides(value):
                        count(name, side, 1, 2**16)
                elif name in COUNTS:
                    count(name, value, 1, COUNTS[name])
        except ValueError as error:
            raise ChoiceError(str(error)) from None

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def pick(self, name: str, default: Any, why: str) -> Any:
        """The value asked for, or the default and the reason for it."""
        option = "convert --" + name.replace("_", "-")
        if name in self.given:
            value = self.given.pop(name)
            self.note(f"{name} {value}: as asked for")
            return value
        self.note(f"{name} {default}: {why} ({option})")
        return default

    def has(self, name: str) -> bool:
        return name in self.given

    def refuse_rest(self, family: str) -> None:
        """ChoiceError if something was asked for that the checkpoint leaves no choice in."""
        if self.given:
            raise ChoiceError(
                f"{', '.join(self.given)} cannot be chosen for this checkpoint ({family}): its "
                f"shapes or its configuration say it"
            )


def _sides(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)


def pick_size(choices: Choices, default: Any, why: str) -> tuple[int, int]:
    """Height and width: those asked for, else `default`, which may be one number, too."""
    height, width = _sides(choices.pick("image_size", default, why))
    return height, width


def pick_schedule(
    choices: Choices, name: str, timesteps: int, why: str, scaled: bool
) -> NoiseSchedule:
    """Ho et al.'s linear schedule, or the cosine one.

    scaled: linear betas are 1000 / T times Ho et al.'s, as OpenAI's code and lucidrains' have it.
    """
    timesteps = choices.pick("timesteps", timesteps, why)
    if choices.pick("schedule", name, why) == "cosine":
        return NoiseSchedule.cosine(timesteps)
    scale = 1000 / timesteps if scaled else 1.0
    return NoiseSchedule.linear(timesteps, scale * 1e-4, scale * 0.02)


def pick_variance(choices: Choices, default: str, learned: bool, why: str) -> str:
    """`default`, or what was asked for; ValueError unless the output has the channels for it."""
    asked = choices.has("variance_type")
    variance = choices.pick("variance_type", default, why)
    if variance.startswith("learned") != learned:
        error = ChoiceError if asked else ValueError
        channels = "the same channels as" if not learned else "twice the channels of"
        raise error(f"variance type {variance!r} is none for an output of {channels} the input")
    return variance


def pick_prediction(choices: Choices, why: str) -> str:
    """epsilon, or what was asked for."""
    return choices.pick("prediction_type", "epsilon", why)
