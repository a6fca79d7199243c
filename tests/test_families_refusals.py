"""Checkpoints that are no model of a known code base, or not all of one: refused, and named."""

import pytest
import torch
from checkpoint_cases import refuses
from peer_fixtures import NAMES, contained, fixture, write_checkpoint
from safetensors.torch import save_file


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_belong_is_named(name, tmp_path):
    made = fixture(name)
    if name.startswith("diffusers"):
        path = write_checkpoint(name, tmp_path)
        file = path / "unet" / "diffusion_pytorch_model.safetensors"

        def save(state):
            save_file(state, file)
    else:
        path = tmp_path / "m.pt"

        def save(state):
            torch.save(state, path)

    prefix = "model." if name == "lucidrains" else ""
    weights = [key.removeprefix(prefix) for key, value in made.state.items() if value.ndim == 4]
    key = weights[-4]
    save(made.state | {f"{prefix}extra.weight": torch.zeros(3)})
    refuses(path, "1 of its tensors could not be placed: 'extra.weight'", **made.choices)
    save({k: v for k, v in made.state.items() if k != prefix + key})
    refuses(path, f"lacks '{key}'", **made.choices)
    save(made.state | {prefix + key: torch.zeros(3, 3)})
    refuses(path, f"{key}' has shape", **made.choices)
    save(made.state | {prefix + key: made.state[prefix + key].long()})
    refuses(path, f"{key}' is of torch.int64, which is no weight", **made.choices)
    bad = made.state[prefix + key].clone()
    bad.flatten()[1] = float("nan")
    save(made.state | {prefix + key: bad})
    refuses(path, "not finite", **made.choices)


def test_networks_that_are_not_ours_are_refused(tmp_path):
    path, made = tmp_path / "m.pt", fixture("guided_diffusion")
    torch.save({k: v for k, v in made.state.items() if "output_blocks" not in k}, path)
    refuses(path, "a classifier is no diffusion model")
    first = made.state["input_blocks.0.0.weight"]
    torch.save(made.state | {"input_blocks.0.0.weight": torch.cat((first, first), 1)}, path)
    refuses(path, "upsamplers are not supported")
    made = fixture("lucidrains")
    weight = made.state["model.init_conv.weight"]
    torch.save(made.state | {"model.init_conv.weight": torch.cat((weight, weight), 1)}, path)
    refuses(path, "self-conditioning is not supported")
    torch.save({k: v for k, v in made.state.items() if k.startswith("model.")}, path)
    refuses(path, "lacks 'betas': give the trainer's file")
    norm = "model.downs.0.0.block1.norm.g"
    torch.save({k: v for k, v in made.state.items() if k != norm}, path)
    refuses(path, r"only lucidrains' versions 2\.x are read")
    table = "time_embedding.timembedding.0.weight"
    made = fixture("w86763777")
    torch.save(made.state | {table: made.state[table] + 0.1}, path)
    refuses(path, "is not the sinusoidal embedding")
    torch.save(fixture("diffusers").state, path)
    refuses(path, "without its config.json: give the folder")
    torch.save({"a.weight": torch.zeros(3), "b": torch.zeros(2)}, path)
    refuses(path, "of no known family .*: its 2 tensors could not be placed: 'a.weight', 'b'")
    torch.save({"step": 3}, path)
    refuses(path, "of no known family .*: there are none")


def test_an_average_that_lacks_a_tensor_is_refused(tmp_path):
    container = contained("score_sde", fixture("score_sde").state)
    container["ema"]["shadow_params"].pop()
    torch.save(container, tmp_path / "m.pth")
    refuses(tmp_path / "m.pth", "weights, but averages of")
