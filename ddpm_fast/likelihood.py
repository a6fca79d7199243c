"""The variational bound of a model in bits per dimension (Sohl-Dickstein et al. 2015; Ho et al.
2020, equations 5 and 13; Nichol and Dhariwal 2021): its terms, for training and for judging.

Plain differentiable tensor operations. Samples are (N, C, ...), data in [-1, 1] made of 256 levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import PMeanVariance, q_mean_variance, q_posterior_mean_variance
from .schedule import NoiseSchedule

HALF_BIN = 1.0 / 255.0  # of the 256 levels
EDGE = 0.999  # beyond it is the first or the last level, whose bin has no end
LEAST = 1e-12  # probability whose logarithm is taken


def mean_flat(x: Tensor) -> Tensor:
    """The mean of each sample, (N,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats."""
    ratio = logvar1 - logvar2
    return 0.5 * ((mean1 - mean2).square() * torch.exp(-logvar2) + torch.exp(ratio) - 1.0 - ratio)


def _normal_cdf(x: Tensor) -> Tensor:
    """Page's approximation (1977) of the normal distribution function, which Ho's code uses."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log of N(means, exp(log_scales)^2) over the bin of each x (Ho et al. 2020, equation 13).

    All of one shape, which the result has; nats.
    """
    precision = torch.exp(-log_scales)
    below = _normal_cdf(precision * (x - means - HALF_BIN))
    above = _normal_cdf(precision * (x - means + HALF_BIN))
    inside = torch.where(x > EDGE, 1.0 - below, above - below)
    return torch.where(x < -EDGE, above, inside).clamp(min=LEAST).log()


def vb_terms_bpd(
    schedule: NoiseSchedule, x_start: Tensor, x_t: Tensor, t: Tensor, p: PMeanVariance
) -> Tensor:
    """The bound's term at t of each sample, (N,): L_{t-1}, and where t = 0 L_0.

    p: `p_mean_variance` at x_t.
    """
    mean, _, log_variance = q_posterior_mean_variance(schedule, x_start, x_t, t)
    kl = normal_kl(mean, log_variance, p.mean, p.log_variance)
    nll = -discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance)
    return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)


def prior_bpd(schedule: NoiseSchedule, x_start: Tensor) -> Tensor:
    """The bound's term L_T of each sample, (N,), which no training changes."""
    t = torch.full((len(x_start),), schedule.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = q_mean_variance(schedule, x_start, t)
    zero = torch.zeros_like(mean)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)
