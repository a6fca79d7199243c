"""diffusers' pipelines around a tiny network, what they draw, and how equal two drawings are."""

from __future__ import annotations

import diffusers
import numpy as np
import torch

NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
STEPS = {"num_inference_steps": 7}


def network(**config) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**(NETWORK | config)).eval()


def ddpm(**config):
    return diffusers.DDPMPipeline(network(**config), diffusers.DDPMScheduler())


def ddim():
    return diffusers.DDIMPipeline(network(), diffusers.DDIMScheduler())


def draw(pipe, seed: int | list[int] = 3, **settings):
    """Images, (N, H, W, C) or what output_type says, and what the generators draw next."""
    pipe.set_progress_bar_config(disable=True)
    made = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
    settings = {"batch_size": 3, "output_type": "np"} | STEPS | settings
    images = pipe(generator=made if isinstance(seed, list) else made[0], **settings).images
    return images, [torch.rand(1, generator=g).item() for g in made]


def same(one, other) -> None:
    """Within 1e-4 of the range of 1, which is 0.03 grey levels."""
    (a, a_next), (b, b_next) = one, other
    assert np.abs(a - b).max() < 1e-4 and a_next == b_next
