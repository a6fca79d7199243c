"""U-Nets to be prepared, what they are given, and how far a prepared one may be off."""

import torch

from ddpm_fast import backend
from ddpm_fast.fused import is_packable
from ddpm_fast.ops import is_conv2d_fastest
from ddpm_fast.unet import UNet

CPU = torch.device("cpu")
T = torch.tensor([0, 1, 10, 100, 500, 999])
F32, BF16 = torch.float32, torch.bfloat16
BOUND = {F32: 1e-5, BF16: 1e-2}
# Of the tiny network, in all that a configuration says.
CONFIGS = [
    {},
    {"norm_groups": 8},
    {"num_heads": 2},
    {"num_heads": 4, "qkv_order": "heads"},
    {"qkv_order": "heads"},
    {"head_channels": 8},
    {"mid_attention": False, "attention_levels": (False, False)},
    {"attention_levels": (True, True), "sample_size": (32, 24)},
    {"scale_shift_norm": True},
    {"resblock_updown": True},
    {"resblock_updown": True, "scale_shift_norm": True, "num_heads": 2},
    {"downsample_padding": "symmetric"},
    {"in_channels": 3, "learn_sigma": True},
    {"num_classes": 3, "null_class": "row"},
    {"num_classes": 3, "null_class": "zero", "scale_shift_norm": True},
    {"num_classes": 4},
    {"embedding_order": "cos_sin", "embedding_shift": 0.0, "norm_eps": 1e-3},
    {"embedding_order": "interleaved"},
    {"embedding_channels": 24, "timestep_scale": 2.5},
    {"scale_shift_norm": True, "mid_attention_norm": False},
    {"up_attention": "last", "num_res_blocks": 2, "attention_levels": (True, True)},
    {"channel_mult": (1,), "attention_levels": (True,)},
    {"channel_mult": (1, 3, 2), "attention_levels": (False, True, False), "num_res_blocks": 2},
    {"sample_size": (16,)},
    {"sample_size": (16,), "resblock_updown": True, "scale_shift_norm": True},
    {"sample_size": (6,), "downsample_padding": "symmetric", "num_heads": 2},
]


def randomized(config, seed=0):
    """A network whose layers keep their input's spread; no norm and no bias is plain."""
    unet = UNet(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            mean = float("norm" in name and name.endswith("weight"))
            parameter.normal_(mean, 0.3, generator=generator)
    return unet


def with_unit_gain(config, seed=0):
    """As PyTorch initialises it, but the layers that start as zero keep their input's spread."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet(config).eval().requires_grad_(False)
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return unet


def inputs(config, n=6, seed=1):
    """(x, t, class_labels)"""
    x = torch.randn(n, *config.sample_shape, generator=torch.Generator().manual_seed(seed))
    labels = None
    if config.num_classes:
        labels = torch.arange(n) % (config.num_classes + (config.null_class != "none"))
    return x, T.repeat(2)[:n], labels


def run(network, dtype, x, *rest):
    return network(x.to(dtype), *rest).double()


def has_fused_layers(dtype):
    return backend.extension is not None and (is_conv2d_fastest(dtype) or is_packable(dtype))


def error(got, want):
    return float((got - want).norm() / want.norm())
