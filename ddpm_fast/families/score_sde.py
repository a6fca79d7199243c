"""yang-song/score_sde_pytorch: its `ddpm` network, Ho et al.'s with one attention per level on the
way up. Its other networks (ncsnpp) are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..unet import Stage, UNet
from ..unet_config import UNetConfig
from .ho import CONVENTIONS, image_size_of
from .layout import (
    Name,
    count_parts,
    down_path,
    ends,
    meta_unet,
    modules,
    places,
    shape_of,
    to_ours,
)
from .reading import Choices, Reading, Weights, pick_prediction, pick_schedule, pick_variance

NAME = "score_sde (ddpm)"
MARKER = "all_modules.0.weight"
BLOCK = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "shortcut": "NIN_0",
}
ATTENTION = {"norm": "GroupNorm_0", "qkv": ("NIN_0", "NIN_1", "NIN_2"), "proj": "NIN_3"}
FIRST = 3  # after the time MLP's two layers and the first convolution


def read(weights: Weights, choices: Choices, stem: str) -> Reading:
    tensors = _renamed(_averaged(weights, choices))
    fields = _fields(tensors)
    choices.note(CONVENTIONS)
    choices.note("attention follows the last block of a level on the way up: their code")
    size = image_size_of(choices, fields["attention_levels"])
    variance = "learned" if fields["learn_sigma"] else "fixed_large"
    variance = pick_variance(choices, variance, fields["learn_sigma"], "their ancestral sampler's")
    schedule = pick_schedule(choices, "linear", 1000, "their VP SDE's", scaled=True)
    choices.note("pred_xstart is not clipped: their samplers do not")
    config = UNetConfig(sample_size=size, dropout=0.0, up_attention="last", **fields)
    unet = meta_unet(config, len(tensors))
    state = to_ours(unet, names(unet), tensors)
    prediction = pick_prediction(choices, "theirs is -eps / std, divided after the network")
    return Reading(unet, state, schedule, prediction, variance, clip_denoised=False)


def _averaged(weights: Weights, choices: Choices) -> dict[str, Tensor]:
    """The network's tensors: the averaged ones, which a checkpoint lists without their names.

    They are in the order of the model's parameters, and so is its state dict, but for `sigmas`.
    """
    tensors = weights.network()
    tensors.pop("sigmas", None)
    shadow = "ema.shadow_params."
    if weights.asked or f"{shadow}0" not in weights.tensors:
        return tensors
    number = sum(key.startswith(shadow) for key in weights.tensors)
    if number != len(tensors):
        raise ValueError(f"it has {len(tensors)} weights, but averages of {number}")
    choices.note(f"weights {shadow[:-1]}: the averaged ones, in the order of {weights.prefix}*")
    return {key: weights.tensors[f"{shadow}{i}"] for i, key in enumerate(tensors)}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NIN layers as the linear layers they are: W is (in, out)."""
    found = {}
    for key, value in tensors.items():
        module, _, kind = key.rpartition(".")
        if kind == "W" and value.ndim == 2:
            found[f"{module}.weight"] = value.T
        else:
            found[f"{module}.bias" if kind == "b" else key] = value
    return found


def _fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a UNetConfig, from the row of all modules."""
    there = modules(tensors)
    number = count_parts(there, "all_modules")
    base = shape_of(tensors, f"all_modules.{FIRST - 1}.weight", 4)[0]

    def steps() -> Iterator[tuple[int, bool] | None]:
        middle = _middle(there, number)
        for i in range(FIRST, middle):
            if f"all_modules.{i}.NIN_3" in there:
                continue
            if f"all_modules.{i}.GroupNorm_0" not in there:
                yield None
                continue
            out = shape_of(tensors, f"all_modules.{i}.Conv_0.weight", 4)[0]
            yield out, i + 1 < middle and f"all_modules.{i + 1}.NIN_3" in there

    last = f"all_modules.{number - 1}"
    return down_path(steps(), base) | ends(tensors, f"all_modules.{FIRST - 1}", last)


def _middle(there: set[str], number: int) -> int:
    """The index of the first middle block.

    L levels have 2 (L - 1) resamplers and, with R blocks per level on the way down, R + 1 on the
    way up and two in the middle, 2 L R + L + 2 residual blocks.
    """
    parts = range(FIRST, number - 2)
    blocks = [i for i in parts if f"all_modules.{i}.Conv_1" in there]
    resamplers = [i for i in parts if i not in blocks and f"all_modules.{i}.NIN_3" not in there]
    levels = len(resamplers) // 2 + 1
    per_level, left = divmod(len(blocks) - 2 - levels, 2 * levels)
    if left or per_level < 1:
        raise ValueError(
            f"its {len(blocks)} residual blocks and {len(resamplers)} resamplers make no U-Net of "
            f"{levels} levels: only the network ddpm is read"
        )
    return blocks[per_level * levels]


def names(unet: UNet) -> dict[str, Name]:
    """Their names of our modules: everything in one row, in the order of use."""
    found: dict[str, Name] = {
        "time_mlp.0": "all_modules.0",
        "time_mlp.2": "all_modules.1",
        "conv_in": f"all_modules.{FIRST - 1}",
    }
    index = FIRST
    for place in places(unet):
        stage = isinstance(place.module, Stage)
        prefix, after = f"all_modules.{index}", f"all_modules.{index + 1}"
        parts = BLOCK if stage else {"conv": "Conv_0"}
        found |= place.names(prefix, parts, ATTENTION, after)
        index += 1 + (stage and place.module.attention is not None)
    return found | {"norm_out": f"all_modules.{index}", "conv_out": f"all_modules.{index + 1}"}
