"""diffusers: a folder with a UNet2DModel, and a scheduler's configuration beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import count, one_of, shown
from ..schedule import PREDICTION_TYPES, NoiseSchedule
from ..unet import Stage, UNet
from ..unet_config import UNetConfig
from .layout import Name, meta_unet, places, to_ours
from .reading import Choices, Reading, pick_size, pick_variance

NAME = "diffusers"
MARKER = "time_embedding.linear_1.weight"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MAX_JSON = 1 << 22
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": ("to_q", "to_k", "to_v"), "proj": "to_out.0"}
# Before diffusers 0.15, and so in the first files of the hub.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ENDS = {
    "time_mlp.0": "time_embedding.linear_1",
    "time_mlp.2": "time_embedding.linear_2",
    "class_embedding": "class_embedding",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
# Per block type: whether it attends, and how it resamples (None: by downsample_type).
DOWN = {
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
}
UP = {
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnUpBlock2D": (True, None),
}
# UNet2DModel's own defaults: what a missing key means.
DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# Fields that have one value here: another makes a network that UNet is not.
ONLY = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1, 1.0),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
# Schedulers' fields likewise: they change the steps themselves.
SCHEDULER_ONLY = {
    "thresholding": (False,),
    "clip_sample_range": (1, 1.0),
    "rescale_betas_zero_snr": (False,),
}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}


def find(path: Path) -> tuple[Path, Path | None] | None:
    """The folder of the network in `path`, and the scheduler's configuration; None if neither.

    `path` is a pipeline's folder, or that of its U-Net (`unet`, `unet_ema`).
    """
    for unet in (path / "unet", path):
        if (unet / "config.json").is_file():
            break
    else:
        return None
    for folder in (path / "scheduler", path, path.parent / "scheduler"):
        if (folder / "scheduler_config.json").is_file():
            return unet, folder / "scheduler_config.json"
    return unet, None


def weights_file(unet: Path) -> Path:
    for name in WEIGHTS:
        if (unet / name).is_file():
            return unet / name
    others = sorted(unet.glob("diffusion_pytorch_model.*.safetensors"))
    if len(others) == 1:  # a variant, such as fp16
        return others[0]
    raise ValueError(f"{unet} has a config.json but none of {', '.join(WEIGHTS)}")


def read_json(path: Path) -> dict[str, Any]:
    """A configuration; ValueError in one sentence if it is none."""
    with path.open("rb") as file:
        content = file.read(MAX_JSON + 1)
    try:
        values = json.loads(content) if len(content) <= MAX_JSON else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no configuration: it must be a JSON object below 4 MB")
    return values


def _only(where: str, values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, options in allowed.items():
        value = values.get(name, options[0])
        if not any(value == option and isinstance(value, type(option)) for option in options):
            raise ValueError(f"{name}={shown(value)} of the {where} is not supported")


def read(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    choices: Choices,
) -> Reading:
    """The model of a UNet2DModel's tensors and configurations."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind not in ("UNet2DModel", "UNetUnconditionalModel"):
        raise ValueError(f"its network is a {shown(kind)}; only a UNet2DModel is read")
    config = DEFAULTS | config
    _only("network", config, ONLY)
    fields = _fields(config, choices)
    choices.note(
        f"embedding {fields['embedding_order']} with shift {fields['embedding_shift']}, norm eps "
        f"{fields['norm_eps']}, {fields['downsample_padding']} padding: its config.json"
    )
    unet = meta_unet(UNetConfig(**fields), len(tensors))
    state = to_ours(unet, names(unet), _renamed(tensors))
    if scheduler is None:
        choices.note("no scheduler_config.json: DDPMScheduler's defaults")
    schedule, *rest = _process(scheduler or {}, fields["learn_sigma"], choices)
    return Reading(unet, state, schedule, *rest)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The attention's layers under their present names."""
    found = {}
    for key, value in tensors.items():
        module, _, kind = key.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in OLD_ATTENTION:
            key = f"{parent}.{OLD_ATTENTION[last]}.{kind}"
        found[key] = value
    return found


def _fields(config: Mapping[str, Any], choices: Choices) -> dict[str, Any]:
    """The fields of a UNetConfig."""
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(config[name], (list, tuple)) or not config[name]:
            raise ValueError(f"{name} of its configuration is no list: {shown(config[name])}")
    channels = config["block_out_channels"]
    if not all(type(c) is int and 0 < c < 2**16 for c in channels):
        raise ValueError(f"block_out_channels of its configuration are {shown(channels)}")
    if config["time_embedding_dim"] not in (None, 4 * channels[0]):
        raise ValueError("time_embedding_dim of the network is not supported")
    attention, updown = _levels(config)
    in_channels, out_channels = config["in_channels"], config["out_channels"]
    count("in_channels", in_channels, 1, 2**12)
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"it takes {shown(in_channels)} channels and gives {shown(out_channels)}")
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups = config["attn_norm_num_groups"]
    if groups not in (None, config["norm_num_groups"]):
        raise ValueError("attn_norm_num_groups beside another norm_num_groups is not supported")
    size, why = config["sample_size"], "its config.json"
    if size is None:
        size, why = 32, "a guess: its config.json has none"
    return _classes(config, choices) | {
        "sample_size": pick_size(choices, size, why),
        "in_channels": in_channels,
        "learn_sigma": out_channels != in_channels,
        "base_channels": channels[0],
        "channel_mult": tuple(c / channels[0] for c in channels),
        "num_res_blocks": config["layers_per_block"],
        "attention_levels": attention,
        "mid_attention": config["add_attention"],
        "mid_attention_norm": not scale_shift or groups is not None,
        "head_channels": config["attention_head_dim"],
        "dropout": config["dropout"],
        "norm_groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
        "embedding_order": "cos_sin" if config["flip_sin_to_cos"] else "sin_cos",
        "embedding_shift": config["freq_shift"],
        "downsample_padding": "symmetric" if config["downsample_padding"] else "asymmetric",
        "scale_shift_norm": scale_shift,
        "resblock_updown": updown,
    }


def _classes(config: Mapping[str, Any], choices: Choices) -> dict[str, Any]:
    rows = config["num_class_embeds"]
    if rows is None:
        return {}
    null = choices.pick("null_class", "none", "a UNet2DModel has none")
    if type(rows) is not int:
        raise ValueError(f"num_class_embeds of its configuration is {shown(rows)}")
    return {"num_classes": rows - (null == "row"), "null_class": null}


def _levels(config: Mapping[str, Any]) -> tuple[tuple[bool, ...], bool]:
    """The levels with attention, and whether residual blocks resample."""
    down = [DOWN[one_of("a down_block_type", t, DOWN)] for t in config["down_block_types"]]
    up = [UP[one_of("an up_block_type", t, UP)] for t in config["up_block_types"]]
    attention = tuple(attends for attends, _ in down)
    if attention != tuple(attends for attends, _ in reversed(up)):
        raise ValueError("its way down and its way up attend at other levels: not supported")
    # The last block of each way has no resampler.
    ways = {way or config["downsample_type"] for _, way in down[:-1]}
    ways |= {way or config["upsample_type"] for _, way in up[:-1]}
    if len(ways) > 1:
        raise ValueError("its levels resample in different ways: not supported")
    return attention, ways == {"resnet"}


def _process(
    config: Mapping[str, Any], learn_sigma: bool, choices: Choices
) -> tuple[NoiseSchedule, str, str, bool]:
    """Schedule, prediction type, variance type and clipping, as DDPMScheduler reads them."""
    kind = config.get("_class_name", "DDPMScheduler")
    if config and not {"num_train_timesteps", "beta_schedule", "trained_betas"} & config.keys():
        raise ValueError(f"its scheduler is a {shown(kind)}, which has no betas")
    if str(kind).startswith(("ScoreSde", "KarrasVe", "EDM", "Flow", "CM", "LCM")):
        raise ValueError(f"its scheduler is a {shown(kind)}, which is no DDPM's")
    _only("scheduler", config, SCHEDULER_ONLY)
    schedule = NoiseSchedule.from_config(config)
    where = f"its {shown(kind)[1:-1]}"
    # Before diffusers 0.5 it was a switch.
    old = "sample" if config.get("predict_epsilon") is False else "epsilon"
    prediction = one_of("prediction_type", config.get("prediction_type", old), PREDICTION_TYPES)
    prediction = choices.pick("prediction_type", prediction, where)
    variance = config.get("variance_type", "fixed_small") or "fixed_small"
    variance = VARIANCES[one_of("variance_type of its scheduler", variance, VARIANCES)]
    if learn_sigma:
        variance = "learned_range"
    variance = pick_variance(choices, variance, learn_sigma, where)
    clip = config.get("clip_sample", True) is not False
    choices.note(f"{schedule.num_timesteps} timesteps, clip {clip}: {where}")
    return schedule, prediction, variance, clip


def names(unet: UNet) -> dict[str, Name]:
    """Their names of our modules."""
    found, levels = dict(ENDS), len(unet.config.channel_mult)
    for place in places(unet):
        block, stage = place.block, isinstance(place.module, Stage)
        if place.way == "middle":
            level = "mid_block"
        else:
            number = place.level if place.way == "down" else levels - 1 - place.level
            level = f"{place.way}_blocks.{number}"
        prefix = f"{level}.resnets.{block}" if stage else f"{level}.{place.way}samplers.0"
        parts = BLOCK if stage or unet.config.resblock_updown else {"conv": "conv"}
        found |= place.names(prefix, parts, ATTENTION, f"{level}.attentions.{block}")
    return found
