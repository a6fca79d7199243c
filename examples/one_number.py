"""Diffusion of one number: a small MLP learns a two-peak distribution, and samples it.

    python examples/one_number.py

The data are single numbers, tensors of shape (N, 1): 40 % near -0.6 and 60 % near 0.4. The
network predicts the noise (Ho et al. 2020, algorithm 1), the sampler draws new numbers (algorithm
2), and the Kolmogorov-Smirnov distance says how far their distribution is from the truth.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ddpm_fast.reference import p_sample_loop, q_sample
from ddpm_fast.schedule import NoiseSchedule

WEIGHTS, CENTRES, WIDTHS = (0.4, 0.6), (-0.6, 0.4), (0.1, 0.15)


def draw_data(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` numbers of the two-peak distribution, shape (count, 1)."""
    right = (torch.rand(count, 1, generator=generator) < WEIGHTS[1]).long()
    spread = torch.randn(count, 1, generator=generator)
    return torch.tensor(CENTRES)[right] + torch.tensor(WIDTHS)[right] * spread


def true_cdf(x: np.ndarray) -> np.ndarray:
    """The truth: the share of the distribution below each x."""
    erf = np.vectorize(math.erf)
    peaks = zip(WEIGHTS, CENTRES, WIDTHS, strict=True)
    return sum(w * 0.5 * (1 + erf((x - c) / (s * math.sqrt(2)))) for w, c, s in peaks)


def kolmogorov_smirnov(samples: np.ndarray) -> float:
    """Largest distance between the samples' distribution function and the true one, 0 .. 1."""
    truth = true_cdf(np.sort(samples))
    steps = np.arange(len(samples) + 1) / len(samples)
    return float(max((steps[1:] - truth).max(), (truth - steps[:-1]).max()))


class Denoiser(nn.Module):
    """eps from (x_t, t): an MLP on x_t and a sinusoidal embedding of t."""

    def __init__(self, width: int = 64, num_frequencies: int = 6):
        super().__init__()
        self.register_buffer("frequencies", 0.5 ** torch.arange(1, num_frequencies + 1))
        self.layers = nn.Sequential(
            nn.Linear(1 + 2 * num_frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        return self.layers(torch.cat([x_t, angles.sin(), angles.cos()], dim=1))


def main(train_steps: int = 2000, num_samples: int = 5000, seed: int = 0) -> float:
    """Trains, samples, prints a histogram; returns the Kolmogorov-Smirnov distance."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the network's initial weights
    schedule = NoiseSchedule.linear(100, beta_start=1e-3, beta_end=0.12)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train_steps)
    for _ in range(train_steps):
        x_start = draw_data(512, generator)
        t = torch.randint(schedule.num_timesteps, (512,), generator=generator)
        noise = torch.randn(512, 1, generator=generator)
        loss = (model(q_sample(schedule, x_start, t, noise), t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()

    # With only 100 steps, fixed_large is closer than fixed_small, which makes the peaks narrow.
    options = {"variance_type": "fixed_large", "generator": generator}
    samples = p_sample_loop(model, (num_samples, 1), schedule, **options)
    samples = samples.flatten().double().numpy()
    counts, edges = np.histogram(samples, bins=24, range=(-1.2, 1.2))
    for number, left in zip(counts, edges, strict=False):
        print(f"{left:5.1f} {'#' * round(400 * number / num_samples)}")
    distance = kolmogorov_smirnov(samples)
    print(f"Kolmogorov-Smirnov distance to the truth: {distance:.4f}")
    return distance


if __name__ == "__main__":
    main()
