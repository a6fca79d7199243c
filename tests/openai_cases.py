"""What OpenAI's diffusion object computes in many settings: run on theirs it makes the fixture.

    python tests/openai_cases.py GUIDED_DIFFUSION  # a checkout of openai/guided-diffusion

The same functions run on ours in test_hosts_openai.py, and what they return is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FIXTURE = Path(__file__).parent / "fixtures" / "openai_diffusion.npz"
MEANS = ("EPSILON", "START_X", "PREVIOUS_X")
VARIANCES = ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE")
LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")
SHAPE = (2, 3, 4, 4)
BETAS = np.linspace(2e-3, 0.3, 24)
SPACED = (0, 1, 4, 9, 15, 23)
TYPES = {"model_mean_type": "EPSILON", "model_var_type": "FIXED_LARGE", "loss_type": "MSE"}

Settings = dict[str, Any]
Make = Callable[[Settings], Any]  # a diffusion object


class Network(nn.Module):
    """A smooth function of all that it is given, with 2 C channels if `learned`.

    Its one weight stands for all of them. Arithmetic only, so machines agree on it.
    """

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.gain, self.learned = nn.Parameter(torch.tensor(0.8)), learned

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Tensor:
        time = (timesteps.float() / 50.0).view(-1, 1, 1, 1)
        h = self.gain * x / (1 + 0.1 * x * x) + 0.1 * x.roll(1, -1) + 0.3 * time
        if y is not None:
            h = h + 0.1 * y.view(-1, 1, 1, 1)
        if low_res is not None:
            h = h - 0.2 * low_res
        return torch.cat((h, (h - 1.5) / 2), 1) if self.learned else h


def classifier(x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
    """grad of log p(y | x) of a normal around the label, wider with time."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        target = 0.0 if y is None else 0.2 * y.view(-1, 1, 1, 1)
        width = 1 + timesteps.float().view(-1, 1, 1, 1) / 10
        return torch.autograd.grad((-(x - target).square() / width).sum(), x)[0]


def denoised(x: Tensor) -> Tensor:
    return 0.9 * x - 0.05


def conditions(**more: Tensor) -> Settings:
    low_res = torch.linspace(-1, 1, 96).view(SHAPE)
    return {"y": torch.tensor([1, 3]), "low_res": low_res} | more


def chain(make: Make, settings: Settings, loop: str, **arguments: Any) -> Iterator[Tensor]:
    """The states half way and at the end, pred_xstart in between, and what is drawn after it."""
    diffusion = make(settings)
    torch.manual_seed(7)
    network = Network("LEARNED" in settings["model_var_type"])
    steps = list(getattr(diffusion, loop)(network, SHAPE, **arguments))
    middle = steps[len(steps) // 2]
    yield from (middle["sample"], middle["pred_xstart"], steps[-1]["sample"])
    yield torch.randn(4)


def reverse(make: Make, settings: Settings, **arguments: Any) -> Iterator[Tensor]:
    """DDIM from x_0 up to the last level."""
    diffusion, x = make(settings), draw(1).clamp(-1, 1)
    network = Network("LEARNED" in settings["model_var_type"])
    for i in range(diffusion.num_timesteps):
        with torch.no_grad():
            out = diffusion.ddim_reverse_sample(network, x, torch.tensor([i] * 2), **arguments)
        x = out["sample"]
        if i in (0, diffusion.num_timesteps // 2, diffusion.num_timesteps - 1):
            yield x


def draw(seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(SHAPE).astype(np.float32))


def losses(make: Make, settings: Settings, **arguments: Any) -> Iterator[Tensor]:
    """Each term, at t = 0 too, and the loss's gradient; noise given, and drawn."""
    diffusion, x_start = make(settings), (draw(2) / 2).clamp(-1, 1)
    for t, noise in (([0, 5], draw(3)), ([3, 2], None)):
        torch.manual_seed(8)
        network = Network("LEARNED" in settings["model_var_type"])
        terms = diffusion.training_losses(
            network, x_start, torch.tensor(t), noise=noise, **arguments
        )
        terms["loss"].mean().backward()
        yield from (terms[name].detach() for name in sorted(terms))
        yield network.gain.grad


def likelihood(make: Make, settings: Settings) -> Iterator[Tensor]:
    torch.manual_seed(9)
    terms = make(settings).calc_bpd_loop(
        Network("LEARNED" in settings["model_var_type"]), (draw(2) / 2).clamp(-1, 1)
    )
    yield from (terms[name] for name in sorted(terms))


def parts(make: Make, settings: Settings) -> Iterator[Tensor]:
    """The functions that other code calls by themselves."""
    diffusion, x, t = make(settings), draw(4), torch.tensor([0, 3])
    torch.manual_seed(10)
    yield diffusion.q_sample(x, t)
    yield from diffusion.q_mean_variance(x, t)
    yield from diffusion.q_posterior_mean_variance(x, x / 2, t)
    out = diffusion.p_mean_variance(Network("LEARNED" in settings["model_var_type"]), x, t)
    yield from (value.detach() for _, value in sorted(out.items()))
    yield diffusion._predict_eps_from_xstart(x, t, x / 2)
    yield diffusion._predict_xstart_from_eps(x, t, x / 2)
    yield diffusion._predict_xstart_from_xprev(x, t, x / 2)
    yield torch.tensor(diffusion.betas)
    yield torch.tensor(diffusion.alphas_cumprod_next)
    yield torch.tensor(diffusion.timestep_map)


def cases() -> Iterator[tuple[str, Callable[[Make], Iterator[Tensor]]]]:
    """Names, and what to run with a function that makes a diffusion object of some settings."""

    def case(name: str, run: Callable, changes: Settings, **arguments: Any) -> tuple:
        return name, lambda make: run(make, TYPES | changes, **arguments)

    ddpm, ddim = "p_sample_loop_progressive", "ddim_sample_loop_progressive"
    for mean in MEANS:
        for variance in VARIANCES:
            types = {"model_mean_type": mean, "model_var_type": variance}
            for name, loop, arguments in (
                ("ddpm", ddpm, {}),
                ("ddpm unclipped", ddpm, {"clip_denoised": False}),
                ("ddim", ddim, {}),
                ("ddim eta 0.5", ddim, {"eta": 0.5}),
            ):
                if loop == ddim and variance in ("FIXED_SMALL", "LEARNED"):  # as the other two
                    continue
                yield case(f"{name} {mean} {variance}", chain, types, loop=loop, **arguments)
            for loss in LOSSES:
                yield case(f"{loss} {mean} {variance}", losses, types | {"loss_type": loss})
    spaced = {"use_timesteps": SPACED}
    rescaled = spaced | {"rescale_timesteps": True}
    hooks = {
        "conditions": {"model_kwargs": conditions()},
        "noise": {"noise": draw(5)},
        "cond_fn": {"cond_fn": classifier, "model_kwargs": {"y": torch.tensor([1, 3])}},
        "denoised_fn": {"denoised_fn": denoised},
    }
    for name, loop in (("ddpm", ddpm), ("ddim", ddim)):
        for hook, arguments in hooks.items():
            yield case(f"{name} {hook}", chain, rescaled, loop=loop, **arguments)
        yield case(f"{name} spaced", chain, spaced, loop=loop)
        yield case(f"{name} rescaled", chain, {"rescale_timesteps": True}, loop=loop)
        learned = {"model_var_type": "LEARNED_RANGE"} | spaced
        yield case(f"{name} cond_fn learned", chain, learned, loop=loop, **hooks["cond_fn"])
    yield case("losses conditions", losses, rescaled, model_kwargs=conditions())
    for mean in MEANS:
        yield case(f"reverse {mean}", reverse, {"model_mean_type": mean})
        yield case(f"parts {mean}", parts, spaced | {"model_mean_type": mean})
    yield case("reverse denoised_fn", reverse, rescaled, denoised_fn=denoised)
    for variance in VARIANCES:
        yield case(f"likelihood {variance}", likelihood, rescaled | {"model_var_type": variance})


def their_maker(folder: str) -> Make:
    sys.path.insert(0, folder)
    from guided_diffusion import gaussian_diffusion as theirs
    from guided_diffusion.respace import SpacedDiffusion

    enums = {
        "model_mean_type": theirs.ModelMeanType,
        "model_var_type": theirs.ModelVarType,
        "loss_type": theirs.LossType,
    }

    def make(settings: Settings) -> Any:
        found = {k: enums[k][v] if k in enums else v for k, v in settings.items()}
        return SpacedDiffusion(**{"use_timesteps": range(len(BETAS)), "betas": BETAS} | found)

    return make


def together(parts: Iterator[Tensor]) -> np.ndarray:
    """All numbers of a case, in a row."""
    return torch.cat([part.float().flatten() for part in parts]).numpy()


if __name__ == "__main__":
    make = their_maker(sys.argv[1])
    found = {name: together(run(make)) for name, run in cases()}
    np.savez_compressed(FIXTURE, **found)
    print(f"{len(found)} cases, {FIXTURE.stat().st_size} bytes")
