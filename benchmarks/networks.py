"""The networks that are measured: the shipped model, and Ho et al.'s for CIFAR-10."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.checkpoint import Model, load_model
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.unet import UNet
from ddpm_fast.unet_config import UNetConfig

TIMESTEPS = [0, 1, 10, 100, 500, 999]


def with_random_weights(config: UNetConfig) -> Model:
    """Weights that keep the spread of what passes through."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for name, p in unet.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5)
        else:
            p.normal_(float("norm" in name and name.endswith("weight")), 0.3)
    return Model(unet, NoiseSchedule.linear(1000, 1e-4, 0.02))


MODELS = {
    "cifar10": lambda: with_random_weights(UNetConfig()),
    "mnist": lambda: load_model("mnist"),
}


def inputs(model: Model, n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, *model.config.sample_shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([TIMESTEPS[i % len(TIMESTEPS)] for i in range(n)])


def flop_of(model: Model) -> int:
    """Of one image's convolutions and linear layers, as the trained network has them."""
    # Here, since it loads Triton, whose memory would count in an engine's process.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.unet(*inputs(model, 1))
    counted = counter.get_flop_counts()["Global"]
    return counted[torch.ops.aten.convolution] + counted[torch.ops.aten.addmm]
