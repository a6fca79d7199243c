"""OpenAI's diffusion object, as code around improved- or guided-diffusion uses it.

    python examples/openai_diffusion.py

An MLP learns single numbers of two classes (0 near -0.6, 1 near 0.4) with learned variances, by
`training_losses`, and draws them in 25 of the 100 steps: with labels as model_kwargs, with a
classifier's gradient, by DDIM, and as a `Sampler`. In a project that has an object of theirs,
`diffusion = from_openai(diffusion)` is all that changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot

from ddpm_fast.hosts.openai import GaussianDiffusion, SpacedDiffusion
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.spacing import space_timesteps

CENTRES, SPREAD = (-0.6, 0.4), 0.12
NO_CLASS = 2
PROCESS = {
    "betas": NoiseSchedule.linear(100, 1e-3, 0.12).betas,
    "model_mean_type": "EPSILON",  # or the members of their enums
    "model_var_type": "LEARNED_RANGE",
    "loss_type": "RESCALED_MSE",
}


class Denoiser(nn.Module):
    """(eps, variance) from (x_t, timesteps, y)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.register_buffer("frequencies", 0.5 ** torch.arange(1, 7))
        self.layers = nn.Sequential(
            *(nn.Linear(1 + 12 + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        angles = timesteps[:, None] * self.frequencies
        return self.layers(torch.cat((x, angles.sin(), angles.cos(), one_hot(y, 3)), 1))


def classifier_gradient(x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
    """grad of log p(class 1 | x): their cond_fn, which gets the model_kwargs, too."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(logsigmoid(20 * x).sum(), x)[0]


def train(model: Denoiser, steps: int) -> None:
    diffusion, optimizer = GaussianDiffusion(**PROCESS), torch.optim.AdamW(model.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y = torch.randint(2, (256,))
        x_start = torch.tensor(CENTRES)[y, None] + SPREAD * torch.randn(256, 1)
        y = torch.where(torch.rand(256) < 0.3, NO_CLASS, y)
        t = torch.randint(diffusion.num_timesteps, (256,))
        losses = diffusion.training_losses(model, x_start, t, model_kwargs={"y": y})
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
        decay.step()


def main(train_steps: int = 800, num_samples: int = 1000) -> dict[str, Tensor]:
    """Trains and draws; the numbers drawn in each way, (num_samples,)."""
    torch.manual_seed(0)
    model = Denoiser()
    train(model, train_steps)
    diffusion = SpacedDiffusion(space_timesteps(100, "25"), **PROCESS)
    shape, found = (num_samples, 1), {}
    labels = {"class 0": 0, "class 1": 1, "no class": NO_CLASS}
    labels = {name: {"y": torch.full((num_samples,), y)} for name, y in labels.items()}
    for name, kwargs in labels.items():
        found[name] = diffusion.p_sample_loop(model, shape, model_kwargs=kwargs)
    ones, none = labels["class 1"], labels["no class"]
    found["class 1, ddim"] = diffusion.ddim_sample_loop(model, shape, model_kwargs=ones)
    found["no class, guided to 1"] = diffusion.p_sample_loop(
        model, shape, model_kwargs=none, cond_fn=classifier_gradient
    )
    sampler = diffusion.sampler(model.eval(), (1,), conditions={"y": torch.tensor(0)})
    found["class 1, sampler"] = sampler.sample(num_samples, seed=0, conditions=ones)
    for name, x in found.items():
        share = (x > -0.1).float().mean()
        print(f"{name}: mean {x.mean():+.2f}, spread {x.std():.2f}, {share:.0%} of class 1")
    return {name: x.flatten() for name, x in found.items()}


if __name__ == "__main__":
    main()
