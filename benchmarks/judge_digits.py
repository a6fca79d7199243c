"""How good the shipped model's digits are, judged by a classifier trained here on MNIST.

    python benchmarks/judge_digits.py --data MNIST_FOLDER [--model mnist] [--steps 1000]
        [--num-samples 1000] [--num-frechet 2000]

The classifier (a small CNN, some minutes on two cores) is kept in --cache. Figures: the share of
samples recognised with more than 0.9 confidence, the share of each class, the share drawn as asked,
and the Frechet distance of the classifier's 128 features to the training set's, beside that of as
many real test digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import results
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_fast.checkpoint import load_model
from ddpm_fast.data import read_idx
from ddpm_fast.device import resolve_device, resolve_dtype
from ddpm_fast.images import to_uint8
from ddpm_fast.sampler import Sampler


class Classifier(nn.Module):
    """Four convolutions and two linear layers; `features` are the 128 before the last."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width in ((1, 32), (32, 64)):
            for a, b in ((channels, width), (width, width)):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(F.dropout(features, 0.4, self.training)), features


def scaled(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).float().div(127.5).sub(1).unsqueeze(1)


def jittered(x: Tensor) -> Tensor:
    """Small random rotations, scalings and shifts, as a handwriting classifier wants."""
    n = len(x)
    angle, scale = 0.2 * torch.randn(n), 1 + 0.08 * torch.randn(n)
    matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1) * scale[:, None]
    theta = torch.cat((matrix.view(n, 2, 2), 0.1 * torch.randn(n, 2, 1)), 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train(data: Path, epochs: int, cache: Path) -> Classifier:
    """The classifier, trained once."""
    model = Classifier()
    if cache.exists():
        model.load_state_dict(load_file(cache))
        return model.eval()
    torch.manual_seed(0)
    x, y = scaled(read_idx(data / "train-images-idx3-ubyte.gz")), labels(data, "train")
    batch, total = 128, epochs * (len(x) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total)
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
            F.cross_entropy(model(jittered(x[index]))[0], y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), cache)
    return model.eval()


def labels(data: Path, kind: str) -> Tensor:
    return torch.from_numpy(read_idx(data / f"{kind}-labels-idx1-ubyte.gz").astype(np.int64))


@torch.no_grad()
def judge(model: Classifier, x: Tensor) -> tuple[Tensor, np.ndarray]:
    """Class probabilities (N, 10) and features (N, 128)."""
    parts = [model(part) for part in x.split(500)]
    probabilities = torch.cat([p.softmax(1) for p, _ in parts])
    return probabilities, torch.cat([f for _, f in parts]).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Frechet distance of the Gaussians with the moments of a and b."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr sqrt(ca cb) is the sum of the roots of the eigenvalues of the product.
    roots = np.sqrt(np.clip(np.linalg.eigvals(ca @ cb).real, 0, None))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * roots.sum())


def draw(args: argparse.Namespace, count: int, seed: int, classes: list[int] | None) -> Tensor:
    device = resolve_device("auto")
    dtype = resolve_dtype(args.dtype, device)
    sampler = Sampler.from_model(load_model(args.model, device), steps=args.steps, dtype=dtype)
    with tqdm(total=-(-count // 50) * (sampler.plan.num_steps + 1), unit="step") as bar:
        x = sampler.sample(
            count,
            seed=seed,
            classes=classes,
            batch_size=50,
            callback=lambda index, done, x: bar.update(),
        )
    return scaled(to_uint8(x)[..., 0])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--model", default="mnist")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--dtype", default="auto", help="of the network")
    p.add_argument("--num-samples", type=int, default=1000)
    p.add_argument("--num-frechet", type=int, default=2000)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--cache", type=Path, default=Path("runs/classifier.safetensors"))
    p.add_argument("--name", default="digits")
    args = p.parse_args()
    model = train(args.data, args.epochs, args.cache)
    test = scaled(read_idx(args.data / "t10k-images-idx3-ubyte.gz"))
    probabilities, real = judge(model, test)
    right = probabilities.argmax(1) == labels(args.data, "t10k")
    figures = {
        "steps": args.steps,
        "dtype": args.dtype,
        "classifier_accuracy": float(right.float().mean()),
        "real_recognised": float((probabilities.max(1).values > 0.9).float().mean()),
    }
    free = draw(args, max(args.num_samples, args.num_frechet), 1000, None)
    probabilities, features = judge(model, free)
    first = probabilities[: args.num_samples]
    share = first.argmax(1).bincount(minlength=10) / len(first)
    figures["num_samples"] = args.num_samples
    figures["recognised"] = float((first.max(1).values > 0.9).float().mean())
    figures["class_shares"] = [round(float(s), 4) for s in share]
    if args.num_frechet:
        train_features = judge(model, scaled(read_idx(args.data / "train-images-idx3-ubyte.gz")))[1]
        n = args.num_frechet
        figures["num_frechet"] = n
        figures["frechet"] = frechet(features[:n], train_features)
        figures["frechet_of_real"] = frechet(real[:n], train_features)
    asked = draw(args, args.num_samples, 2000, list(range(10)))
    wanted = torch.arange(args.num_samples) % 10
    figures["drawn_as_asked"] = float((judge(model, asked)[0].argmax(1) == wanted).float().mean())
    for name, value in figures.items():
        print(f"{name:20} {value}")
    print(results.write(args.name, figures))


if __name__ == "__main__":
    main()
