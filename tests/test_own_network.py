"""The example of a network of one's own, and the README's lines about it."""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import own_network

README = Path(__file__).parents[1] / "README.md"


def check_spread(off: torch.Tensor) -> None:
    """Of 49,152 pixels mean and spread are known to 0.5 % of SPREAD. DDIM's samples of a normal are
    narrower than it, the less the more steps: with these 50 they have 0.885 of its spread."""
    assert abs(off.mean().item()) < 0.02 * own_network.SPREAD
    assert abs(off.std().item() / own_network.SPREAD - 0.885) < 0.02


def test_samples_are_the_data_s(capsys):
    x, rest = own_network.main()
    check_spread(x - own_network.MyUNet().mean)
    check_spread(rest)
    printed = capsys.readouterr().out
    assert "without conditions" in printed and "with conditions" in printed


def test_the_readme_s_lines_do_what_they_say():
    section = README.read_text().split("## In your project")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    blocks = [block for block in blocks if "UNet()" in block]
    y, low_res = own_network.draw_conditions(16)
    names = vars(own_network) | {"y": y, "low_res": low_res}
    for block in blocks:
        exec(block, names)
    check_spread(names["x"] - own_network.conditional_mean(y, low_res))
    assert len(blocks) == 2 and len(blocks[0].splitlines()) <= 10
