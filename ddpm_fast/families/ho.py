"""Ho et al.'s TensorFlow models as ported by pesser/pytorch_diffusion, and ermongroup/ddim, whose
networks have the same names.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..unet import Stage, UNet
from ..unet_config import UNetConfig
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
from .reading import (
    Choices,
    Reading,
    Weights,
    pick_prediction,
    pick_schedule,
    pick_size,
    pick_variance,
)

NAME = "Ho et al. as ported by pesser"
MARKER = "temb.dense.0.weight"
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "nin_shortcut",
}
ATTENTION = {"norm": "norm", "qkv": ("q", "k", "v"), "proj": "proj_out"}
ENDS = {
    "time_mlp.0": "temb.dense.0",
    "time_mlp.2": "temb.dense.1",
    "conv_in": "conv_in",
    "norm_out": "norm_out",
    "conv_out": "conv_out",
}
CONVENTIONS = (
    "embedding sin_cos with shift 1, norm eps 1e-6 in 32 groups, asymmetric padding, one head: "
    "their code"
)


def image_size_of(choices: Choices, attention_levels: tuple[bool, ...]) -> tuple[int, int]:
    """By the level with attention: in Ho et al.'s models that is the one of 16x16."""
    where = [level for level, attends in enumerate(attention_levels) if attends]
    if len(where) == 1:
        size, why = 16 << where[0], f"attention at level {where[0]}, which is the one of 16x16"
    else:
        size, why = 32, "their CIFAR-10 models' size; not one level has attention"
    return pick_size(choices, size, why)


def read(weights: Weights, choices: Choices, stem: str) -> Reading:
    tensors = weights.network()
    there = modules(tensors)
    base = shape_of(tensors, "conv_in.weight", 4)[0]

    def steps() -> Iterator[tuple[int, bool] | None]:
        for level in range(count_parts(there, "down")):
            if level:
                yield None
            for i in range(count_parts(there, f"down.{level}.block")):
                out = shape_of(tensors, f"down.{level}.block.{i}.conv1.weight", 4)[0]
                yield out, f"down.{level}.attn.{i}" in there

    fields = down_path(steps(), base) | ends(tensors, "conv_in", "conv_out")
    choices.note(CONVENTIONS)
    size = image_size_of(choices, fields["attention_levels"])
    variance = "fixed_large" if size == (32, 32) else "fixed_small"
    why = "Ho et al.'s choice for CIFAR-10; for their larger images it is fixed_small"
    if fields["learn_sigma"]:
        variance, why = "learned", "by the output's channels"
    variance = pick_variance(choices, variance, fields["learn_sigma"], why)
    schedule = pick_schedule(choices, "linear", 1000, "Ho et al.'s", scaled=False)
    unet = meta_unet(UNetConfig(sample_size=size, dropout=0.0, **fields), len(tensors))
    state = to_ours(unet, names(unet), tensors)
    return Reading(unet, state, schedule, pick_prediction(choices, "Ho et al.'s"), variance)


def names(unet: UNet) -> dict[str, Name]:
    """Their names of our modules."""
    found = dict(ENDS)
    for place in places(unet):
        if place.way == "middle":
            prefix, attention = f"mid.block_{place.block + 1}", "mid.attn_1"
        elif isinstance(place.module, Stage):
            level = f"{place.way}.{place.level}"
            prefix, attention = f"{level}.block.{place.block}", f"{level}.attn.{place.block}"
        else:
            prefix, attention = f"{place.way}.{place.level}.{place.way}sample", ""
        parts = BLOCK if isinstance(place.module, Stage) else {"conv": "conv"}
        found |= place.names(prefix, parts, ATTENTION, attention)
    return found
