"""w86763777/pytorch-ddpm: its ckpt.pt, or the network's state dict."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..unet import Stage, UNet, timestep_embedding
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

NAME = "w86763777/pytorch-ddpm"
MARKER = "downblocks.0.block1.0.weight"
TABLE = "time_embedding.timembedding.0.weight"
BLOCK = {
    "norm1": "block1.0",
    "conv1": "block1.2",
    "time": "temb_proj.1",
    "norm2": "block2.0",
    "conv2": "block2.3",
    "shortcut": "shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": ("proj_q", "proj_k", "proj_v"), "proj": "proj"}
ENDS = {
    "time_mlp.0": "time_embedding.timembedding.1",
    "time_mlp.2": "time_embedding.timembedding.3",
    "conv_in": "head",
    "norm_out": "tail.0",
    "conv_out": "tail.2",
}


def read(weights: Weights, choices: Choices, stem: str) -> Reading:
    tensors = weights.network()
    there = modules(tensors)
    base = shape_of(tensors, "head.weight", 4)[0]

    def steps() -> Iterator[tuple[int, bool] | None]:
        for i in range(count_parts(there, "downblocks")):
            if f"downblocks.{i}.main" in there:
                yield None
                continue
            out = shape_of(tensors, f"downblocks.{i}.block1.2.weight", 4)[0]
            yield out, f"downblocks.{i}.attn" in there

    fields = down_path(steps(), base) | ends(tensors, "head", "tail.2")
    timesteps = _check_table(tensors)
    choices.note(f"embedding interleaved with shift 0: its table of {timesteps} timesteps is that")
    choices.note("norm eps 1e-5 in 32 groups, symmetric padding, one head: their code")
    size = pick_size(choices, 32, "their CIFAR-10 models' size")
    variance = "learned" if fields["learn_sigma"] else "fixed_large"
    variance = pick_variance(choices, variance, fields["learn_sigma"], "their default")
    schedule = pick_schedule(choices, "linear", timesteps, "their default, T by the table", False)
    choices.note("pred_xstart is not clipped: their sampler clips a value that it does not use")
    config = UNetConfig(
        sample_size=size,
        norm_eps=1e-5,
        embedding_order="interleaved",
        embedding_shift=0.0,
        downsample_padding="symmetric",
        dropout=0.0,
        **fields,
    )
    unet = meta_unet(config, len(tensors))
    tensors.pop(TABLE)
    state = to_ours(unet, names(unet), tensors)
    prediction = pick_prediction(choices, "what their trainer always regresses")
    return Reading(unet, state, schedule, prediction, variance, clip_denoised=False)


def _check_table(tensors: dict[str, Tensor]) -> int:
    """T, the rows of the embedding's table; ValueError unless it is the formula's."""
    timesteps, channels = shape_of(tensors, TABLE, 2)
    if channels % 2:
        raise ValueError(f"its embedding has an odd number of channels, {channels}")
    last = min(timesteps - 1, 1 << 20)
    t = torch.tensor([0, last // 2, last])
    wanted = timestep_embedding(t, channels, "interleaved", 0.0)
    if not torch.allclose(tensors[TABLE][t].float(), wanted, atol=1e-3):
        raise ValueError(f"its table {TABLE!r} is not the sinusoidal embedding: it was trained")
    return timesteps


def names(unet: UNet) -> dict[str, Name]:
    """Their names of our modules; their blocks are in lists with our numbers."""
    found = dict(ENDS)
    for place in places(unet):
        way, _, index = place.ours.partition(".")
        prefix = f"{way}blocks.{index}"
        parts = BLOCK if isinstance(place.module, Stage) else {"conv": "main"}
        found |= place.names(prefix, parts, ATTENTION, f"{prefix}.attn")
    return found
