"""The shipped digits in diffusers' pipelines: its schedulers and pipelines, made fast.

    python examples/diffusers_pipelines.py

Needs diffusers. Writes the model as a folder that diffusers loads; draws with DDPMPipeline before
and after `accelerate`, and with DDIMPipeline before and after its scheduler is replaced. The same
seeds give the same pictures: at most one grey level of 255 apart.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace

import diffusers
import numpy as np
import torch

from ddpm_fast.checkpoint import load_model
from ddpm_fast.families import diffusers_writer
from ddpm_fast.hosts.diffusers import DDIMScheduler, accelerate
from ddpm_fast.unet import UNet


def write_digits(folder: str) -> None:
    """The shipped model as a diffusers folder, without its classes: DDPMPipeline passes none.

    "No class" is a row of the class embedding; what is always added can be part of a bias.
    """
    model = load_model("mnist")
    weights = model.unet.state_dict()
    no_class = weights.pop("class_embedding.weight")[-1]
    weights["time_mlp.2.bias"] = weights["time_mlp.2.bias"] + no_class
    unet = UNet(replace(model.config, num_classes=None, null_class="none"))
    unet.load_state_dict(weights)
    process = model.schedule, model.prediction_type, model.variance_type, model.clip_denoised
    diffusers_writer.write(folder, unet, *process)


def draw(pipe: diffusers.DiffusionPipeline, num_images: int, steps: int) -> np.ndarray:
    """uint8 (N, H, W); prints how long it took."""
    pipe.set_progress_bar_config(disable=True)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(42)
    images = pipe(batch_size=num_images, generator=generator, num_inference_steps=steps).images
    print(f"{type(pipe).__module__}: {time.perf_counter() - began:.1f} s")
    return np.stack([np.asarray(image) for image in images])


def grey_levels(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two sets of pictures."""
    return int(np.abs(a.astype(int) - b).max())


def main(num_images: int = 16, steps: int = 100) -> tuple[int, int]:
    """The largest difference in grey levels: of `accelerate`, and of the scheduler alone."""
    with tempfile.TemporaryDirectory() as folder:
        write_digits(folder)
        pipe = diffusers.DDPMPipeline.from_pretrained(folder)
        ddim = diffusers.DDIMPipeline.from_pretrained(folder)
    before = draw(pipe, num_images, steps)
    accelerate(pipe)
    by_accelerate = grey_levels(before, draw(pipe, num_images, steps))
    before = draw(ddim, num_images, steps)
    ddim.scheduler = DDIMScheduler.from_config(ddim.scheduler.config)
    by_scheduler = grey_levels(before, draw(ddim, num_images, steps))
    print(f"largest difference in grey levels: {by_accelerate} and {by_scheduler}")
    return by_accelerate, by_scheduler


if __name__ == "__main__":
    main()
