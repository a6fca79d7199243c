"""lucidrains/denoising-diffusion-pytorch 2.x: the trainer's model-N.pt, or a GaussianDiffusion's
state dict, whose buffers tell the schedule and the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lucid_unet import LucidUNet, LucidUNetConfig
from ..schedule import NoiseSchedule
from .layout import Name, count_parts, modules, shape_of, to_ours
from .reading import Choices, Reading, Weights, pick_size, pick_variance

NAME = "lucidrains/denoising-diffusion-pytorch"
MARKER = "init_conv.weight"
BLOCK = {
    "conv1": "block1.proj",
    "norm1": "block1.norm",
    "time": "mlp.1",
    "conv2": "block2.proj",
    "norm2": "block2.norm",
    "shortcut": "res_conv",
}
ATTENTION = {"": "", ".norm": ".norm", ".qkv": ".to_qkv", ".proj": ".to_out"}
LINEAR_ATTENTION = ATTENTION | {".proj": ".to_out.0", ".norm_out": ".to_out.1"}
ENDS = {
    "time_mlp.0": "time_mlp.1",
    "time_mlp.2": "time_mlp.3",
    "conv_in": "init_conv",
    "conv_out": "final_conv",
}


def read(weights: Weights, choices: Choices, stem: str) -> Reading:
    tensors = weights.network()
    if "downs.0.0.block1.norm.g" not in tensors:
        raise ValueError("its blocks have no RMSNorm: only lucidrains' versions 2.x are read")
    fields = _fields(tensors)
    choices.note("embedding sin_cos with shift 1, RMS norms, norms after convolutions: their code")
    size = pick_size(choices, 128, "their README's example")
    config = LucidUNetConfig(sample_size=size, **fields)
    with torch.device("meta"):
        network = LucidUNet(config)
    state = to_ours(network, names(network), _renamed(tensors))
    # The network is `model` in a GaussianDiffusion, whose buffers are beside it.
    outer = weights.prefix.removesuffix("model.")
    schedule = _schedule(weights.tensors, outer, choices)
    prediction = _objective(weights.tensors, outer, schedule, choices)
    variance = "learned_range" if config.learn_sigma else "fixed_small"
    variance = pick_variance(choices, variance, config.learn_sigma, "their sampler's")
    return Reading(network, state, schedule, prediction, variance)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms' weights as vectors, and the learned keys and values, under our names."""
    found = {}
    for key, value in tensors.items():
        module, _, kind = key.rpartition(".")
        if kind == "g":
            found[f"{module}.weight"] = value.flatten()
        else:
            found[f"{module}.memory" if kind == "mem_kv" else key] = value
    return found


def _fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a LucidUNetConfig that shapes tell."""
    levels = count_parts(modules(tensors), "downs")
    init, in_channels, *_ = shape_of(tensors, MARKER, 4)
    out_channels = shape_of(tensors, "final_conv.weight", 4)[0]
    if "time_mlp.0.weights" in tensors:
        raise ValueError("its timestep embedding is learned or random: that is not supported")
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"it takes {in_channels} channels and gives {out_channels}: self-conditioning is not "
            f"supported"
        )
    base = shape_of(tensors, "time_mlp.1.weight", 2)[1]
    mult, full, heads, widths, memory = [], [], [], [], set()
    for level in range(levels):
        resample = f"downs.{level}.3"
        key = f"{resample}.1.weight" if f"{resample}.1.weight" in tensors else f"{resample}.weight"
        channels = shape_of(tensors, key, 4)[0]
        if channels % base:
            raise ValueError(f"level {level} gives {channels} channels, no multiple of {base}")
        mult.append(channels // base)
        full.append(f"downs.{level}.2.to_out.weight" in tensors)
        shape = shape_of(tensors, f"downs.{level}.2.mem_kv", 4)
        heads.append(shape[1])
        widths.append(shape[3] if full[-1] else shape[2])
        memory.add(shape[2] if full[-1] else shape[3])
    if len(memory) != 1:
        raise ValueError(f"its attentions have {sorted(memory)} learned keys: wanted one number")
    return {
        "in_channels": in_channels,
        "base_channels": base,
        "init_channels": init,
        "channel_mult": tuple(mult),
        "full_attention": tuple(full),
        "num_heads": tuple(heads),
        "head_channels": tuple(widths),
        "memory": memory.pop(),
        "learn_sigma": out_channels == 2 * in_channels,
    }


def _buffer(tensors: Mapping[str, Tensor], key: str) -> np.ndarray:
    if key not in tensors:
        raise ValueError(f"it lacks {key!r}: give the trainer's file, not the network's weights")
    values = tensors[key]
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"{key!r} is no list of numbers")
    return values.double().numpy()


def _schedule(tensors: Mapping[str, Tensor], outer: str, choices: Choices) -> NoiseSchedule:
    """By its betas, which it stores in float32: the float64 ones of a named schedule if equal."""
    betas = _buffer(tensors, f"{outer}betas")
    schedule = NoiseSchedule(betas)
    number, name = len(betas), "its own betas"
    named = {
        "linear": NoiseSchedule.linear(number, 0.1 / number, min(20 / number, 1.0)),
        "cosine": NoiseSchedule.cosine(number),
    }
    for candidate, exact in named.items():
        if np.allclose(exact.betas, betas, rtol=1e-6, atol=0):
            schedule, name = exact, candidate
    choices.note(f"{number} timesteps, schedule {name}: the buffer {outer}betas")
    return schedule


def _objective(
    tensors: Mapping[str, Tensor], outer: str, schedule: NoiseSchedule, choices: Choices
) -> str:
    """By the loss's weights: 1, snr or snr / (1 + snr), where no published clipping reaches."""
    weight = _buffer(tensors, f"{outer}loss_weight")
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    at = int((snr < 0.5).argmax())
    ratios = {"epsilon": 1.0, "sample": snr[at], "v_prediction": snr[at] / (1.0 + snr[at])}
    fits = [name for name, ratio in ratios.items() if np.allclose(weight[at : at + 1], ratio, 0.02)]
    if len(weight) != len(snr) or len(fits) != 1:
        return choices.pick("prediction_type", "v_prediction", "their default; not by its buffers")
    return choices.pick("prediction_type", fits[0], f"by the buffer {outer}loss_weight")


def names(network: LucidUNet) -> dict[str, Name]:
    """Their names of our modules."""
    found = dict(ENDS)

    def block(ours: str, theirs: str) -> None:
        found.update({f"{ours}.{mine}": f"{theirs}.{name}" for mine, name in BLOCK.items()})

    def attention(ours: str, theirs: str, full: bool) -> None:
        parts = ATTENTION if full else LINEAR_ATTENTION
        found.update({f"{ours}{mine}": f"{theirs}{name}" for mine, name in parts.items()})

    full = network.config.full_attention
    last = len(full) - 1
    for way in ("down", "up"):
        for index in range(last + 1):
            ours, theirs = f"{way}.{index}", f"{way}s.{index}"
            block(f"{ours}.block1", f"{theirs}.0")
            block(f"{ours}.block2", f"{theirs}.1")
            attention(
                f"{ours}.attention", f"{theirs}.2", full[index if way == "down" else last - index]
            )
            # At the lowest level, and after the highest, it is a convolution alone.
            found[f"{ours}.resample.1"] = f"{theirs}.3" + ("" if index == last else ".1")
    block("middle1", "mid_block1")
    block("middle2", "mid_block2")
    attention("middle_attention", "mid_attn", True)
    block("last", "final_res_block")
    return found
