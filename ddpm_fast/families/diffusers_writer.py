"""Writing a model as a folder that diffusers' DDPMPipeline.from_pretrained loads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import write_text
from ..schedule import NoiseSchedule
from ..tensor_files import write_tensors
from ..unet import UNet
from ..unet_config import UNetConfig
from .diffusers import DOWN, UP, WEIGHTS, names
from .layout import to_theirs

INDEX = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def write(
    folder: str | os.PathLike[str],
    unet: UNet,
    schedule: NoiseSchedule,
    prediction_type: str,
    variance_type: str,
    clip_denoised: bool,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Write the model; returns sentences about what diffusers will do otherwise.

    Raises ValueError, before anything is written, for what a UNet2DModel or a DDPMScheduler cannot
    be; OSError if it cannot write. The index comes last, so that a part of a model is none.
    """
    network = _network(unet)
    if variance_type == "learned":
        raise ValueError(
            "diffusers takes variance type 'learned' for the variance itself, not its logarithm: "
            "this model cannot be written for it"
        )
    process = _process(schedule) | {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_sample": clip_denoised,
    }
    state = {key: value.to(dtype) for key, value in _state(unet).items()}
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key!r} is not finite in {dtype}: the model was not written")
    folder = Path(folder)
    for part in (folder / "unet", folder / "scheduler"):
        part.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "unet" / WEIGHTS[0], state, {"format": "pt"})
    for path, values in (
        (folder / "unet" / "config.json", network),
        (folder / "scheduler" / "scheduler_config.json", process),
        (folder / "model_index.json", INDEX),
    ):
        write_text(path, json.dumps(values, indent=2) + "\n")
    if unet.config.num_classes is None:
        return []
    return ["DDPMPipeline passes no class labels: call its unet with class_labels yourself"]


def _network(unet: UNet) -> dict[str, Any]:
    """The UNet2DModel's config.json."""
    if not isinstance(unet, UNet):
        raise ValueError("a UNet2DModel is no lucidrains U-Net: it can only be written as ours")
    c = unet.config
    wrong = {
        "two spatial dimensions": c.dims != 2,
        "a whole embedding_shift": c.embedding_shift != int(c.embedding_shift),
        "base_channels as the embedding's": c.time_channels[0] != c.base_channels,
        "base_channels at the first level": c.channel_mult[0] != 1,
        "unscaled timesteps": c.timestep_scale != 1,
        "attention after each block": c.up_attention != "every" and any(c.attention_levels),
    }
    for needed, fails in wrong.items():
        if fails:
            raise ValueError(f"a UNet2DModel has {needed}: this model can only be written as ours")
    updown = "resnet" if c.resblock_updown else "conv"
    square = c.sample_size[0] == c.sample_size[1]
    down = [_block_type(DOWN, attends, updown) for attends in c.attention_levels]
    up = [_block_type(UP, attends, updown) for attends in reversed(c.attention_levels)]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": c.sample_size[0] if square else list(c.sample_size),
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": int(c.embedding_shift),
        "flip_sin_to_cos": c.embedding_order == "cos_sin",
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": list(c.level_channels),
        "layers_per_block": c.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": int(c.downsample_padding == "symmetric"),
        "downsample_type": updown,
        "upsample_type": updown,
        "dropout": c.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_channels(c),
        "norm_num_groups": c.norm_groups,
        "attn_norm_num_groups": c.norm_groups if c.mid_attention_norm else None,
        "norm_eps": c.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if c.scale_shift_norm else "default",
        "add_attention": c.mid_attention,
        "class_embed_type": None,
        "num_class_embeds": _label_rows(c),
    }


def _block_type(types: dict[str, tuple[bool, str | None]], attends: bool, updown: str) -> str:
    """The block that attends or not, and resamples in this way."""
    return next(t for t, (a, way) in types.items() if a == attends and way in (None, updown))


def _head_channels(config: UNetConfig) -> int | None:
    """attention_head_dim, which is one for all levels; None is one head each."""
    if config.head_channels is not None or config.num_heads == 1:
        return config.head_channels
    channels = {
        channels
        for channels, attends in zip(config.level_channels, config.attention_levels, strict=True)
        if attends
    }
    if config.mid_attention:
        channels.add(config.level_channels[-1])
    if len(channels) > 1:
        raise ValueError(
            f"a UNet2DModel has heads of one width, and {config.num_heads} heads at levels of "
            f"{sorted(channels)} channels have several: this model can only be written as ours"
        )
    return channels.pop() // config.num_heads if channels else None


def _label_rows(config: UNetConfig) -> int | None:
    if config.num_classes is None:
        return None
    return config.num_classes + (config.null_class != "none")


def _process(schedule: NoiseSchedule) -> dict[str, Any]:
    """The betas of the scheduler's configuration."""
    config = schedule.config()
    if config["trained_betas"] is not None:
        config["beta_schedule"] = "linear"  # any name it knows; the list alone decides
    return {"_class_name": "DDPMScheduler"} | config


def _state(unet: UNet) -> dict[str, Tensor]:
    """The weights under their names, in their shapes and their order of heads."""
    config, ours = unet.config, {}
    for key, value in unet.state_dict().items():
        module, _, kind = key.rpartition(".")
        layer = module.rpartition(".")[2]
        if layer == "qkv" and config.qkv_order == "heads":
            heads = value.shape[0] // 3 // config.head_channels if config.head_channels else None
            rows = value.reshape(heads or config.num_heads, 3, -1, *value.shape[1:])
            value = rows.transpose(0, 1).reshape(value.shape)
        if key == "time_mlp.0.weight" and config.embedding_order == "interleaved":
            value = torch.cat((value[:, ::2], value[:, 1::2]), 1)  # diffusers' sines come first
        if layer in ("qkv", "proj") and kind == "weight":
            value = value.flatten(1)
        if module == "class_embedding" and config.null_class == "zero":
            value = F.pad(value, (0, 0, 0, 1))
        ours[key] = value
    return to_theirs(ours, names(unet))
