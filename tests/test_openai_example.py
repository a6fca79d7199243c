"""The example of OpenAI's diffusion object learns its two classes, and draws them in every way."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import openai_diffusion


def test_classes_are_drawn_as_asked(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers of 48 units gain nothing from more
    try:
        found = openai_diffusion.main(train_steps=700, num_samples=500)
    finally:
        torch.set_num_threads(threads)
    means = {"class 0": -0.6, "class 1": 0.4, "class 1, ddim": 0.4, "class 1, sampler": 0.4}
    for name, mean in means.items():
        x = found[name]
        assert abs(x.mean() - mean) < 0.08 and x.std() < 0.2, name
    of_class_1 = {name: (x > -0.1).float().mean() for name, x in found.items()}
    assert 0.35 < of_class_1["no class"] < 0.65  # a classifier moves nearly all of these
    assert of_class_1["no class, guided to 1"] > 0.9
    assert "guided to 1: mean" in capsys.readouterr().out
