"""The noise schedule: float64 tables under the published names.

Vocabulary and formulas: Ho et al. 2020 (DDPM, arXiv:2006.11239), Nichol & Dhariwal 2021 (IDDPM,
arXiv:2102.09672), as OpenAI's guided-diffusion writes them. Everything raises ValueError, in one
sentence, on what is no schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_fast.arguments import count, one_of, real, shown

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")  # of a stored model
# What a step can be made of: also the mean of x_{t-1}, the PREVIOUS_X of OpenAI's code.
STEP_PREDICTION_TYPES = (*PREDICTION_TYPES, "previous_x")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")

MAX_TIMESTEPS = 2**20 - 1  # the noise contract counts steps in 20 bits, and step 0 draws x_T


def _check_betas(betas: Any) -> np.ndarray:
    try:
        array = np.asarray(betas)
        kind = array.dtype.kind
    except Exception:  # ragged lists, device tensors: whatever NumPy cannot read
        kind = "O"
    if kind not in "fiu":
        raise ValueError(
            f"betas must be a one-dimensional sequence of real numbers, but a"
            f" {type(betas).__name__} was given that NumPy does not read as one."
        )
    if array.ndim != 1 or not 1 <= array.size <= MAX_TIMESTEPS:
        raise ValueError(
            f"betas must be one-dimensional with 1 to {MAX_TIMESTEPS} entries, but their shape is"
            f" {array.shape}; pass one beta per training step."
        )
    array = array.astype(np.float64)
    # So written that NaN is wrong, and a beta so small that float64 takes 1 - beta for 1.
    wrong = ~((1.0 - array < 1.0) & (array <= 1.0))
    if wrong.any():
        t = int(wrong.argmax())
        raise ValueError(
            f"every beta must lie in (0, 1], and be 1e-15 or more, but the one of timestep {t} is"
            f" {array[t]}; correct beta_start and beta_end, or the list."
        )
    return array


class NoiseSchedule:
    """The tables of a diffusion of T steps: read-only float64 arrays of shape (T,).

    `NoiseSchedule(betas)` takes T numbers in (0, 1]; `linear`, `scaled_linear`, `cosine` and
    `sigmoid` make the published ones. A beta of 1 (a last step without signal) is allowed: the
    entries that are then infinite are so without a warning, and whoever would use one refuses.
    Every table is Ho et al. 2020's, named as in guided-diffusion (gaussian_diffusion.py).
    """

    def __init__(self, betas: Sequence[float] | np.ndarray):
        betas = _check_betas(betas)
        ac = np.cumprod(1.0 - betas)
        self._set_tables(betas, ac, np.append(1.0, ac[:-1]))

    def _set_tables(self, betas: np.ndarray, ac: np.ndarray, ac_prev: np.ndarray) -> None:
        self._recipe: dict[str, Any] | None = None
        alphas = 1.0 - betas
        self.alphas_cumprod_next = np.append(ac[1:], 0.0)
        self.num_timesteps: int = len(betas)
        self.betas, self.alphas = betas, alphas
        self.alphas_cumprod, self.alphas_cumprod_prev = ac, ac_prev
        # q(x_t | x_0), equation 4, and its inverse for x_0.
        self.sqrt_alphas_cumprod = np.sqrt(ac)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - ac)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - ac)
        with np.errstate(divide="ignore"):  # no signal left: 1 / 0 is meant to be inf
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / ac)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / ac - 1.0)
        # q(x_{t-1} | x_t, x_0), equations 6 and 7.
        self.posterior_variance = betas * (1.0 - ac_prev) / (1.0 - ac)
        # The variance of t = 0 is 0, so its logarithm takes that of t = 1 (there being only one
        # step, its beta), as guided-diffusion does.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(ac_prev) / (1.0 - ac)
        self.posterior_mean_coef2 = (1.0 - ac_prev) * np.sqrt(alphas) / (1.0 - ac)
        for table in vars(self).values():
            if isinstance(table, np.ndarray):
                table.setflags(write=False)

    @classmethod
    def of_levels(
        cls, betas: np.ndarray, alphas_cumprod: np.ndarray, alphas_cumprod_prev: np.ndarray
    ) -> NoiseSchedule:
        """Steps that each say for themselves from where to where they lead; float64 (S,).

        By rising timestep. betas is 1 - alphas_cumprod / alphas_cumprod_prev, as far as whoever
        gives them has rounded it. Nothing is checked: what comes of a beta of 0, or of two steps
        without signal, may not be finite.
        """
        schedule = cls.__new__(cls)
        with np.errstate(divide="ignore", invalid="ignore"):
            schedule._set_tables(betas, alphas_cumprod, alphas_cumprod_prev)
        return schedule

    @classmethod
    def _named(cls, betas: np.ndarray, name: str, start: float, end: float) -> NoiseSchedule:
        schedule = cls(betas)
        schedule._recipe = {"beta_schedule": name, "beta_start": start, "beta_end": end}
        return schedule

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Ho et al. 2020: beta from `beta_start` to `beta_end` in equal steps, for any T.

        The numbers are taken as given (guided-diffusion scales them by 1000 / T: pass those).
        """
        steps = count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
        start, end = real("beta_start", beta_start), real("beta_end", beta_end)
        return cls._named(np.linspace(start, end, steps), "linear", start, end)

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Latent diffusion (Rombach et al. 2022): sqrt(beta) in equal steps."""
        steps = count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
        start, end = real("beta_start", beta_start, 0.0, 1.0), real("beta_end", beta_end, 0.0, 1.0)
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
        return cls._named(betas, "scaled_linear", start, end)

    @classmethod
    def cosine(
        cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """IDDPM equation 17: alphas_cumprod ~ cos^2((t/T + s) / (1 + s) * pi/2), beta capped.

        `s` >= 0 keeps the first betas from vanishing; `max_beta` is in (0, 1].
        """
        steps = count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
        s, max_beta = real("s", s, 0.0, 1e6), real("max_beta", max_beta, 0.0, 1.0)
        alpha_bar = np.cos((np.arange(steps + 1) / steps + s) / (1.0 + s) * np.pi / 2) ** 2
        schedule = cls(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta))
        if (s, max_beta) == (0.008, 0.999):  # the ones diffusers' name stands for
            schedule._recipe = {"beta_schedule": "squaredcos_cap_v2"}
        return schedule

    @classmethod
    def sigmoid(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """GeoDiff's and diffusers' "sigmoid" (Xu et al. 2022, arXiv:2203.02923).

        *beta* = sigmoid(-6 .. 6) * (beta_end - beta_start) + beta_start. The "sigmoid" of
        lucidrains and of Jabri et al. 2022 shapes *alphas_cumprod*: another schedule, not this.
        """
        steps = count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
        start, end = real("beta_start", beta_start), real("beta_end", beta_end)
        betas = (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps))) + start
        return cls._named(betas, "sigmoid", start, end)

    def respace(self, timesteps: Sequence[int] | np.ndarray) -> NoiseSchedule:
        """The schedule of the kept `timesteps` (strictly increasing), as IDDPM section 4 has it.

        betas are recomputed from alphas_cumprod (guided-diffusion respace.py, SpacedDiffusion);
        alphas_cumprod itself stays, to the last bit. Refuses two kept steps without signal.
        """
        kept = np.asarray(timesteps)
        if kept.ndim != 1 or kept.size == 0 or kept.dtype.kind not in "iu":
            raise ValueError("timesteps must be a list of at least one whole number.")
        if kept[0] < 0 or kept[-1] >= self.num_timesteps or (np.diff(kept) <= 0).any():
            raise ValueError(
                f"timesteps must increase strictly within 0 to {self.num_timesteps - 1}, but they"
                f" run from {kept[0]} to {kept[-1]} or repeat."
            )
        if len(kept) == self.num_timesteps:
            return self
        ac = self.alphas_cumprod[kept]
        ac_prev = np.append(1.0, ac[:-1])
        if len(ac) > 1 and ac[-2] == 0:
            raise ValueError(
                f"no signal is left from timestep {kept[int((ac == 0).argmax())]} on, so it must"
                f" be the last one kept; leave out the later timesteps."
            )
        return NoiseSchedule.of_levels(_check_betas(1.0 - ac / ac_prev), ac, ac_prev)

    def config(self) -> dict[str, Any]:
        """A JSON-able description under diffusers' key names; `from_config` restores every bit."""
        recipe = self._recipe or {"beta_schedule": "trained", "trained_betas": self.betas.tolist()}
        return {"num_train_timesteps": self.num_timesteps, "trained_betas": None, **recipe}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of `config()`, or of a diffusers scheduler's configuration.

        Missing keys mean what they mean to diffusers; those that do not shape betas are ignored.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"a schedule's config must be a dict, but it is {shown(config)}.")
        if config.get("rescale_betas_zero_snr"):
            raise ValueError(
                "rescale_betas_zero_snr is not supported; pass the rescaled betas as trained_betas."
            )
        steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
        if betas is not None:  # as to diffusers, the list alone decides
            return cls(betas)
        makers = {"linear": cls.linear, "scaled_linear": cls.scaled_linear, "sigmoid": cls.sigmoid}
        names = (*makers, "squaredcos_cap_v2")
        name = one_of("beta_schedule", config.get("beta_schedule", "linear"), names)
        if name == "squaredcos_cap_v2":
            return cls.cosine(steps)
        return makers[name](steps, config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
