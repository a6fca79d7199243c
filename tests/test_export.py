"""torch.export: what is read back computes what the modules did."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_fast import ops
from ddpm_fast.plan import make_plan
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import export_step

pytestmark = pytest.mark.usefixtures("extension")  # whose operator is in a program


def test_the_example(tmp_path, capsys):
    """The two steps' programs give the same bits, and the sampler's digits; the U-Net's, which is
    asked for them one by one, those of the U-Net."""
    got = export_step.main(tmp_path, steps=3)
    model = export_step.load_model("mnist")
    sampler = Sampler.from_model(model, steps=3, fused=False)
    digits = torch.arange(10)
    wanted = sampler.sample(10, classes=digits.tolist())
    assert torch.equal(got["fused"], got["portable"])
    torch.testing.assert_close(got["fused"], wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for x, digit, output in zip(got["fused"], digits, got["unet"], strict=True):
            assert torch.equal(model.unet(x[None], torch.tensor([0]), digit[None])[0], output)
    assert "portable_step.pt2: 6." in capsys.readouterr().out


class Affine(nn.Module):
    """A network of 1 or 2 channels that takes no time to export."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 0.3, channels).view(-1, 1, 1))

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return x_t * self.gain + 0.1 * (t + class_labels).view(-1, 1, 1, 1) / 100


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_steps_of_any_batch_size(tmp_path, variance_type):
    """Also of a learned variance; its exponential is torch's in the portable program."""
    learned = variance_type == "learned_range"
    schedule = NoiseSchedule.linear(100, 1e-3, 0.2)
    plan = make_plan(schedule, "ddpm", 10, variance_type=variance_type)
    unet, tolerance = Affine(2 if learned else 1), 1e-6 if learned else 0.0
    modules = export_step.FusedStep(unet, plan), export_step.PortableStep(unet, plan)
    examples = [arguments(2), arguments(2)]
    programs = [
        export_step.export(module, given[i], tmp_path / "step.pt2")
        for i, (module, given) in enumerate(zip(modules, examples, strict=True))
    ]
    with torch.no_grad():
        for size in (1, 2, 5):
            given = arguments(size)
            results = [run(*given[i]) for i, run in enumerate(programs)]
            wanted = modules[0](*given[0])
            assert torch.equal(results[0], wanted)
            torch.testing.assert_close(results[1], wanted, rtol=tolerance, atol=tolerance)


def arguments(size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of a fused and of a portable step: at different rows, with the same noise."""
    row, index, seed = torch.arange(size), 7 + torch.arange(size), torch.full((size,), 3)
    x = ops.randn(seed, index, (1, 8, 8))
    draws = [ops.randn(seed[n : n + 1], index[n : n + 1], (1, 8, 8), n + 1) for n in range(size)]
    labels = torch.arange(size) % 3
    return (x, row, seed, index, labels), (x, row, torch.cat(draws), labels)


def test_a_portable_step_asks_for_its_noise():
    """A program cannot look whether a row needs it, as the module does."""
    plan = make_plan(NoiseSchedule.linear(100, 1e-3, 0.2), "ddim", 10)
    x, row, _, labels = arguments(2)[1]
    step = export_step.PortableStep(Affine(1), plan)
    with torch.no_grad():
        assert step(x, row, None, labels).shape == x.shape
    with pytest.raises(ValueError, match="noise must be given"):
        torch.export.export(step, (x, row, None, labels))
