"""OpenAI's improved-diffusion (Nichol & Dhariwal 2021) and guided-diffusion (ADM; Dhariwal &
Nichol 2021): a state dict alone, without its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

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

NAME = "OpenAI improved-/guided-diffusion"
MARKER = "input_blocks.0.0.weight"
BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}
ENDS = {
    "time_mlp.0": "time_embed.0",
    "time_mlp.2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
# Their scripts' sizes by channel_mult; at 512 the first multiplier is 0.5.
IMAGE_SIZES = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}
DEFAULTS = {"num_heads": 4, "timesteps": 1000, "schedule": "linear"}
_HYBRID = {"timesteps": 4000, "schedule": "cosine"}
_LEGACY_LSUN = {"num_heads": 1}
_HEADS_OF_64 = {"head_channels": 64}
# The flags their READMEs give for the released files, where the shapes do not tell them.
RELEASED = {
    "imagenet64_uncond_100M_1500K": _HYBRID,
    "imagenet64_uncond_vlb_100M_1500K": _HYBRID,
    "imagenet64_cond_270M_250K": _HYBRID | {"rescale_timesteps": False},
    "cifar10_uncond_50M_500K": _HYBRID,
    "cifar10_uncond_vlb_50M_500K": _HYBRID,
    "lsun_uncond_100M_1200K_bs128": _LEGACY_LSUN,
    "lsun_uncond_100M_2400K_bs64": _LEGACY_LSUN,
    "64x64_diffusion": {"schedule": "cosine", "qkv_order": "qkv"} | _HEADS_OF_64,
    "128x128_diffusion": {},
    "256x256_diffusion": _HEADS_OF_64,
    "256x256_diffusion_uncond": _HEADS_OF_64,
    "512x512_diffusion": _HEADS_OF_64,
    "lsun_bedroom": _HEADS_OF_64,
    "lsun_cat": _HEADS_OF_64,
    "lsun_horse": _HEADS_OF_64,
    "lsun_horse_nodropout": _HEADS_OF_64,
}


def read(weights: Weights, choices: Choices, stem: str) -> Reading:
    """The model of a state dict; `stem`, the file's name, tells a released one's flags."""
    tensors = weights.network()
    fields = _fields(tensors)
    released = RELEASED.get(stem, {})
    why = f"as released under the name {stem}" if stem in RELEASED else "their scripts' default"
    choices.note(
        "embedding cos_sin with shift 0, norm eps 1e-5 in 32 groups, symmetric padding: their code"
    )
    mult, embedding = fields["channel_mult"], fields["embedding_channels"]
    published = tuple(m * fields["base_channels"] / embedding for m in mult)
    shown = ",".join(f"{m:g}" for m in published)
    size_why = f"their scripts' size for channel_mult {shown}"
    if published not in IMAGE_SIZES:
        size_why = f"their scripts' default; channel_mult {shown} is none of theirs"
    size = pick_size(choices, IMAGE_SIZES.get(published, 64), size_why)
    _pick_attention(choices, fields, released, why)
    classes = fields.pop("label_rows")
    if classes is not None:
        fields["null_class"] = choices.pick("null_class", "none", "their models have none")
        fields["num_classes"] = classes - (fields["null_class"] == "row")
    variance = "learned_range" if fields["learn_sigma"] else "fixed_large"
    variance = pick_variance(choices, variance, fields["learn_sigma"], "by the output's channels")
    settings = DEFAULTS | released
    schedule = pick_schedule(choices, settings["schedule"], settings["timesteps"], why, True)
    fields["timestep_scale"] = _timestep_scale(choices, fields, released, schedule.num_timesteps)
    config = UNetConfig(
        sample_size=size,
        norm_eps=1e-5,
        embedding_order="cos_sin",
        embedding_shift=0.0,
        downsample_padding="symmetric",
        dropout=0.0,
        **fields,
    )
    unet = meta_unet(config, len(tensors))
    state = to_ours(unet, names(unet), tensors)
    return Reading(unet, state, schedule, pick_prediction(choices, why), variance)


def _pick_attention(
    choices: Choices, fields: dict[str, Any], released: Mapping[str, Any], why: str
) -> None:
    """num_heads or head_channels, and qkv_order: the projection has the same shape in all cases."""
    if choices.has("head_channels") or (
        "head_channels" in released and not choices.has("num_heads")
    ):
        fields["head_channels"] = choices.pick("head_channels", released.get("head_channels"), why)
    else:
        heads = (DEFAULTS | released)["num_heads"]
        fields["num_heads"] = choices.pick("num_heads", heads, why)
    order = released.get("qkv_order", "heads")
    fields["qkv_order"] = choices.pick("qkv_order", order, why)


def _timestep_scale(
    choices: Choices, fields: dict[str, Any], released: Mapping[str, Any], timesteps: int
) -> float:
    """1000 / T for models trained with rescale_timesteps; at T = 1000 there is no difference."""
    if timesteps == 1000 and not choices.has("rescale_timesteps"):
        return 1.0
    old = not fields["resblock_updown"]
    why = f"{'improved' if old else 'guided'}-diffusion's default"
    rescale = released.get("rescale_timesteps", old)
    return 1000 / timesteps if choices.pick("rescale_timesteps", rescale, why) else 1.0


def _fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a UNetConfig that shapes tell, and label_rows."""
    there = modules(tensors)
    if "output_blocks" not in there:
        raise ValueError("it has no output_blocks: a classifier is no diffusion model")
    base, in_channels, *_ = shape_of(tensors, MARKER, 4)
    if in_channels == 6:
        raise ValueError(
            "it takes 6 channels, x_t and a low-resolution image: upsamplers are not supported"
        )
    blocks = count_parts(there, "input_blocks")
    updown, per_level = _upsamplers(there)
    num_res_blocks = per_level or blocks - 1

    def steps() -> Iterator[tuple[int, bool] | None]:
        for i in range(1, blocks):
            if i % (num_res_blocks + 1) == 0:
                yield None
                continue
            out = shape_of(tensors, f"input_blocks.{i}.0.in_layers.2.weight", 4)[0]
            yield out, f"input_blocks.{i}.1.qkv" in there

    fields = down_path(steps(), base) | ends(tensors, "input_blocks.0.0", "out.2")
    time = shape_of(tensors, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    channels = round(fields["channel_mult"][0] * base)
    label_rows = None
    if "label_emb" in there:
        label_rows = shape_of(tensors, "label_emb.weight", 2)[0]
    return fields | {
        "embedding_channels": shape_of(tensors, "time_embed.0.weight", 2)[1],
        "scale_shift_norm": time == 2 * channels,
        "resblock_updown": updown,
        "label_rows": label_rows,
    }


def _upsamplers(there: set[str]) -> tuple[bool, int]:
    """Whether residual blocks resample, and how many blocks come before the first upsampler.

    The way up tells both: a block that resamples has the names of one that does not.
    """
    for i in range(count_parts(there, "output_blocks")):
        for slot in (1, 2):
            if f"output_blocks.{i}.{slot}.conv" in there:
                return False, i
            if f"output_blocks.{i}.{slot}.in_layers" in there:
                return True, i
    return False, 0


def names(unet: UNet) -> dict[str, Name]:
    """Their names of our modules."""
    config, found = unet.config, dict(ENDS)
    levels, per_level = len(config.channel_mult), config.num_res_blocks + 1
    for place in places(unet):
        stage = isinstance(place.module, Stage)
        if place.way == "middle":
            prefix = f"middle_block.{2 * place.block}"
            attention = "middle_block.1"
        elif place.way == "down":
            block = f"input_blocks.{1 + place.level * per_level + place.block}"
            prefix, attention = f"{block}.0", f"{block}.1"
        else:
            # An upsampler is the last part of the block before it.
            number = (levels - 1 - place.level) * per_level + place.block - (not stage)
            slot = 0 if stage else 1 + config.attention_levels[place.level]
            prefix = f"output_blocks.{number}.{slot}"
            attention = f"output_blocks.{number}.1"
        parts = BLOCK
        if not stage and not config.resblock_updown:
            parts = {"conv": "op" if place.way == "down" else "conv"}
        found |= place.names(prefix, parts, ATTENTION, attention)
    return found
