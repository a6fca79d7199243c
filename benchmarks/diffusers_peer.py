"""Our weights in diffusers' UNet2DModel, so that both compute the same function."""

from __future__ import annotations

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from ddpm_fast.checkpoint import Model
from ddpm_fast.unet import Attention, ResBlock, Stage, UNet

RESNET = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2"}
RESNET |= {"conv2": "conv2", "shortcut": "conv_shortcut"}


def _copy(out: dict[str, Tensor], prefix: str, module: torch.nn.Module) -> None:
    out.update({f"{prefix}.{k}": v for k, v in module.state_dict().items()})


def _resnet(out: dict[str, Tensor], prefix: str, block: ResBlock) -> None:
    for ours, theirs in RESNET.items():
        _copy(out, f"{prefix}.{theirs}", getattr(block, ours))


def _attention(out: dict[str, Tensor], prefix: str, attention: Attention) -> None:
    _copy(out, f"{prefix}.group_norm", attention.norm)
    weights = attention.qkv.weight.flatten(1).chunk(3)
    for name, weight, bias in zip("qkv", weights, attention.qkv.bias.chunk(3), strict=True):
        out[f"{prefix}.to_{name}.weight"], out[f"{prefix}.to_{name}.bias"] = weight, bias
    out[f"{prefix}.to_out.0.weight"] = attention.proj.weight.flatten(1)
    out[f"{prefix}.to_out.0.bias"] = attention.proj.bias


def _stages(out: dict[str, Tensor], prefix: str, stages: list[Stage]) -> None:
    attentions = [s.attention for s in stages if s.attention is not None]
    for i, stage in enumerate(stages):
        _resnet(out, f"{prefix}.resnets.{i}", stage.block)
    for i, attention in enumerate(attentions):
        _attention(out, f"{prefix}.attentions.{i}", attention)


def _weights(unet: UNet) -> dict[str, Tensor]:
    config, out = unet.config, {}
    _copy(out, "conv_in", unet.conv_in)
    _copy(out, "time_embedding.linear_1", unet.time_mlp[0])
    _copy(out, "time_embedding.linear_2", unet.time_mlp[2])
    if config.null_class == "row":  # DDPMPipeline gives no class, so the null row is a bias
        null = unet.class_embedding.weight[-1]
        out["time_embedding.linear_2.bias"] = out["time_embedding.linear_2.bias"] + null
    for prefix, modules in (("down_blocks", unet.down), ("up_blocks", unet.up)):
        stages, level = [], 0
        for module in modules:
            if isinstance(module, Stage):
                stages.append(module)
                continue
            sampler = "downsamplers" if prefix == "down_blocks" else "upsamplers"
            _copy(out, f"{prefix}.{level}.{sampler}.0", module)
            _stages(out, f"{prefix}.{level}", stages)
            stages, level = [], level + 1
        _stages(out, f"{prefix}.{level}", stages)
    _stages(out, "mid_block", list(unet.middle))
    _copy(out, "conv_norm_out", unet.norm_out)
    _copy(out, "conv_out", unet.conv_out)
    return out


def to_diffusers(model: Model) -> DDPMPipeline:
    """A pipeline that computes the same eps, and the same chain, without a class."""
    c = model.config
    kinds = ["AttnDownBlock2D" if a else "DownBlock2D" for a in c.attention_levels]
    unet = UNet2DModel(
        sample_size=c.sample_size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        layers_per_block=c.num_res_blocks,
        block_out_channels=c.level_channels,
        down_block_types=kinds,
        up_block_types=[k.replace("Down", "Up") for k in reversed(kinds)],
        add_attention=c.mid_attention,
        attention_head_dim=c.level_channels[-1] // c.num_heads,
        norm_num_groups=c.norm_groups,
        norm_eps=c.norm_eps,
        freq_shift=int(c.embedding_shift),
        flip_sin_to_cos=c.embedding_order == "cos_sin",
        downsample_padding=0 if c.downsample_padding == "asymmetric" else 1,
    )
    unet.load_state_dict(_weights(model.unet))
    scheduler = DDPMScheduler(
        num_train_timesteps=model.schedule.num_timesteps,
        trained_betas=model.schedule.betas.tolist(),
        prediction_type=model.prediction_type,
        variance_type=model.variance_type,
        clip_sample=True,
    )
    pipeline = DDPMPipeline(unet.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
