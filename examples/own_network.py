"""A network of one's own under the sampler: one without conditions, and one with two.

    python examples/own_network.py

The networks stand for trained ones: they are the exact eps of data of which all is known, images
whose pixels are normal around a given picture, so the samples' mean and spread are known, too.
The conditional one is given a label and a small image for each sample, and draws around that
image, enlarged, and lighter by the label.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

SPREAD = 0.2  # of a pixel


class MyUNet(nn.Module):
    """eps = E[noise | x_t] for x_0 ~ N(mean, SPREAD^2)."""

    def __init__(self) -> None:
        super().__init__()
        alphas_cumprod = NoiseSchedule.linear(1000, 1e-4, 0.02).alphas_cumprod
        self.register_buffer("alphas_cumprod", torch.tensor(alphas_cumprod, dtype=torch.float32))
        gradient = torch.linspace(-0.3, 0.3, 32).expand(3, 32, 32)
        self.register_buffer("mean", gradient.contiguous())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.eps(x_t, t, self.mean)

    def eps(self, x_t: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        signal = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        variance = signal * SPREAD**2 + 1 - signal
        return (1 - signal).sqrt() * (x_t - signal.sqrt() * mean) / variance


class MyConditionalUNet(MyUNet):
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, low_res: Tensor) -> Tensor:
        return self.eps(x_t, t, conditional_mean(y, low_res))


def conditional_mean(y: Tensor, low_res: Tensor) -> Tensor:
    return interpolate(low_res, scale_factor=4) + 0.1 * y.view(-1, 1, 1, 1)


def draw_conditions(count: int) -> tuple[Tensor, Tensor]:
    """Labels 0 to 2, int64 (count,), and images (count, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    return torch.arange(count) % 3, 0.6 * torch.rand(count, 3, 8, 8, generator=generator) - 0.3


def main() -> tuple[Tensor, Tensor]:
    """Samples without conditions, and how far those with conditions are from their means."""
    unet = MyUNet().eval()  # yours: (x_t, t) -> eps
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)  # the one it was trained with
    sampler = Sampler(unet, schedule, sample_shape=(3, 32, 32), method="ddim", steps=50)
    x = sampler.sample(16, seed=0)

    unet, (y, low_res) = MyConditionalUNet().eval(), draw_conditions(16)
    one = {"y": y[0], "low_res": low_res[0]}  # of one sample: shapes and dtypes
    sampler = Sampler(unet, schedule, (3, 32, 32), method="ddim", steps=50, conditions=one)
    conditional = sampler.sample(16, seed=0, conditions={"y": y, "low_res": low_res})

    rest = conditional - conditional_mean(y, low_res)
    for name, off in (("without conditions", x - MyUNet().mean), ("with conditions", rest)):
        print(f"{name}: off by {off.mean():+.3f} on average, spread {off.std():.3f} of {SPREAD}")
    return x, rest


if __name__ == "__main__":
    main()
