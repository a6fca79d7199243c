"""torch.export: the U-Net, and a whole step (network and update), written, read back and run.

    python examples/export_step.py FOLDER

Three programs, for any batch size:
- unet.pt2: (x_t, t, class_labels) -> what the network predicts;
- fused_step.pt2: (x_t, row, seed, sample_index, class_labels) -> x_{t-1}. It draws the noise of the
  contract itself; whoever runs it imports `ddpm_fast.ops`, for the operator;
- portable_step.pt2: (x_t, row, noise, class_labels) -> x_{t-1}, in torch's own operators alone.
`row` (N,) is each sample's step of the plan, whose table the program holds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_fast import ops, reference
from ddpm_fast.checkpoint import load_model
from ddpm_fast.plan import Plan, make_plan


class Step(nn.Module):
    """The network and the table of a plan."""

    def __init__(self, unet: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("coefficients", plan.coefficients)
        self.register_buffer("index", plan.index)

    def predict(self, x_t: Tensor, row: Tensor, class_labels: Tensor) -> Tensor:
        return self.unet(x_t, self.index[row, 0].long(), class_labels)


class FusedStep(Step):
    def forward(
        self, x_t: Tensor, row: Tensor, seed: Tensor, sample_index: Tensor, class_labels: Tensor
    ) -> Tensor:
        output = self.predict(x_t, row, class_labels)
        table = (self.coefficients, self.index)
        return ops.p_sample_step(x_t, output, *table, row, seed, sample_index)


class PortableStep(Step):
    def forward(self, x_t: Tensor, row: Tensor, noise: Tensor, class_labels: Tensor) -> Tensor:
        output = self.predict(x_t, row, class_labels)
        unused = torch.zeros_like(x_t)  # the pred_xstart before, which multistep methods read
        table = (self.coefficients, self.index)
        return reference.step(*table, row, x_t, output, noise, unused)[0]


@torch.no_grad()
def export(module: nn.Module, arguments: tuple[Tensor, ...], path: Path) -> nn.Module:
    """Write the module's program for batches of any size; what is read back."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = tuple({0: batch} for _ in arguments)
    torch.export.save(torch.export.export(module, arguments, dynamic_shapes=shapes), path)
    return torch.export.load(path).module()


# Example arguments: of two samples, because of one the batch size would be part of the program; a
# new tensor each, because one given twice would be one argument to it.
def state() -> Tensor:
    return torch.zeros(2, 1, 28, 28)


def rows() -> Tensor:
    return torch.tensor([0, 1])


@torch.no_grad()
def main(folder: Path, steps: int = 25) -> dict[str, Tensor]:
    """The three programs written into `folder`, and what they computed.

    fused, portable: digits 0 to 9, drawn by each step's program; unet: what it says of these.
    """
    model = load_model("mnist")
    plan = make_plan(model.schedule, "ddpm", steps, prediction_type=model.prediction_type)
    unet = export(model.unet, (state(), rows(), rows()), folder / "unet.pt2")
    fused = FusedStep(model.unet, plan)
    fused = export(fused, (state(), *(rows() for _ in range(4))), folder / "fused_step.pt2")
    portable = PortableStep(model.unet, plan)
    portable = export(portable, (state(), rows(), state(), rows()), folder / "portable_step.pt2")

    digits = torch.arange(10)
    seed = torch.zeros_like(digits)
    x = {"fused": ops.randn(seed, digits, (1, 28, 28))}
    x["portable"] = x["fused"]
    for i in range(steps):
        row = torch.full_like(digits, i)
        noise = ops.randn(seed, digits, (1, 28, 28), step=i + 1)
        x["fused"] = fused(x["fused"], row, seed, digits, digits)
        x["portable"] = portable(x["portable"], row, noise, digits)
    one_by_one = zip(x["fused"].split(1), digits.split(1), strict=True)
    x["unet"] = torch.cat([unet(one, torch.tensor([0]), digit) for one, digit in one_by_one])
    for path in sorted(folder.glob("*.pt2")):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference of the two: {(x['fused'] - x['portable']).abs().max():.1e}")
    return x


if __name__ == "__main__":
    main(Path(sys.argv[1]))
