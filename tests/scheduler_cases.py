"""diffusers' schedulers beside ours, in runs of which one can tell how far they are apart."""

from __future__ import annotations

import diffusers
import torch

from ddpm_fast.hosts import diffusers as ours

SHAPE = (2, 1, 4, 4)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(kind: str, **config):
    """diffusers' scheduler, and ours made from its configuration."""
    theirs = getattr(diffusers, kind)(**config)
    return theirs, getattr(ours, kind).from_config(theirs.config)


def denoise(scheduler, x: torch.Tensor, t: int) -> torch.Tensor:
    """What a perfect network predicts if the data are normal numbers of deviation 0.8, which the
    clip then cuts; with extra channels for a learned variance.

    It brings states together: an untrained network drives them apart, also diffusers' in float32
    and in float64, so that rounding alone would decide the end.
    """
    ac = scheduler.alphas_cumprod[t]
    x_0 = ac.sqrt() * 0.64 * x / (0.64 * ac + 1 - ac)
    eps = (x - ac.sqrt() * x_0) / (1 - ac).sqrt()
    v = ac.sqrt() * eps - (1 - ac).sqrt() * x_0
    output = {"epsilon": eps, "sample": x_0, "v_prediction": v}[scheduler.config.prediction_type]
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        output = torch.cat((output, torch.sin(3 * x)), 1)
    return output


def chain(scheduler, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0, and what the generator draws next."""
    drawing = generator()
    x = torch.randn(SHAPE, generator=drawing)
    for t in scheduler.timesteps:
        output = denoise(scheduler, x, t)
        x = scheduler.step(output, t, x, generator=drawing, **settings).prev_sample
    return x, torch.rand(3, generator=drawing)


def same_chains(theirs, mine, **settings) -> None:
    (want, want_next), (got, got_next) = chain(theirs, **settings), chain(mine, **settings)
    assert (got - want).abs().max() < 1e-4
    assert torch.equal(got_next, want_next)
