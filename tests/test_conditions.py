"""What a network of one's own is given beside x_t and t."""

from __future__ import annotations

import pytest
import torch
from recording import recorded
from torch import Tensor

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

GIVEN = {"y": torch.arange(5), "image": torch.linspace(-1, 1, 30).view(5, 2, 3)}
EXAMPLES = {name: value[0] for name, value in GIVEN.items()}


def network(x: Tensor, t: Tensor, y: Tensor, image: Tensor, class_labels: Tensor = 0) -> Tensor:
    return 0.3 * x + 0.1 * (y + class_labels).view(-1, 1, 1) + 0.5 * image


def sampler(called=network, **settings) -> Sampler:
    settings = {"steps": 3, "backend": "cpu", "conditions": EXAMPLES} | settings
    return Sampler(called, NoiseSchedule.linear(20, 1e-2, 0.3), (2, 3), **settings)


def test_each_sample_has_its_own_row():
    """In a padded batch, in several, and alone: as a network that has the values built in."""
    whole = sampler().sample(5, seed=2, conditions=GIVEN)
    assert torch.equal(sampler().sample(5, seed=2, batch_size=2, conditions=GIVEN), whole)
    for i in range(5):
        y, image = GIVEN["y"][i : i + 1], GIVEN["image"][i : i + 1]
        alone = sampler(lambda x, t, y=y, image=image: network(x, t, y, image), conditions=None)
        assert torch.equal(alone.sample(1, start=i, seed=2), whole[i : i + 1])


def test_rows_follow_the_order_of_the_indices_and_functions_the_indices():
    whole = sampler().sample(5, seed=2, conditions=GIVEN)
    order = torch.tensor([4, 0, 3])
    rows = {name: value[order] for name, value in GIVEN.items()}
    functions = {name: lambda i, v=value: v[i] for name, value in GIVEN.items()}
    for conditions in (rows, functions, GIVEN | {"y": functions["y"], "image": rows["image"]}):
        stream = sampler().stream(order.tolist(), seed=2, batch_size=2, conditions=conditions)
        for i, x in stream:
            assert torch.equal(x, whole[i])


def test_guidance_gives_them_to_both_halves():
    classes = {"num_classes": 2, "null_class": 2, "guidance_scale": 3.0}

    def seen(x: Tensor, t: Tensor, y: Tensor, image: Tensor, class_labels: Tensor) -> Tensor:
        halves.append((y.tolist(), class_labels.tolist()))
        assert torch.equal(*image.chunk(2))
        return network(x, t, y, image, class_labels)

    halves = []
    conditions = {name: value[:2] for name, value in GIVEN.items()}
    sampler(seen, **classes).sample(2, classes=[1, 0], conditions=conditions)
    assert halves[-1] == ([0, 1, 0, 1], [1, 0, 2, 2])


def test_a_captured_loop_takes_new_values():
    """They lie in buffers: what was captured with the values of one run serves the next."""
    captured, eager = sampler(), sampler()
    executor = recorded(captured)
    negated = {name: -value for name, value in GIVEN.items()}
    for conditions in (GIVEN, negated):
        runs = [one.sample(5, batch_size=3, conditions=conditions) for one in (captured, eager)]
        assert torch.equal(*runs)
    assert executor.log.count(("capture", 1)) == 1


def test_their_buffers_are_counted():
    """Of three samples: int64 y, float32 image of six."""
    with_them, without = sampler(), sampler(conditions=None, called=lambda x, t: x)
    for one in (with_them, without):
        one.capture([3]) if one is without else one.sample(3, conditions=first(3))
    assert with_them.memory_held - without.memory_held == 3 * (8 + 6 * 4)


def first(count: int) -> dict[str, Tensor]:
    return {name: value[:count] for name, value in GIVEN.items()}


@pytest.mark.parametrize(
    "conditions, message",
    [
        (None, r"takes the conditions \['image', 'y'\], but the run was given none"),
        ({"y": GIVEN["y"]}, r"was given \['y'\]"),
        (GIVEN | {"z": GIVEN["y"]}, "'z'"),
        (GIVEN | {"y": GIVEN["y"][:4]}, r"y must be torch.int64 of shape \(5,\), got .*\(4,\)"),
        (GIVEN | {"y": GIVEN["y"].float()}, "y must be torch.int64 .* got torch.float32"),
        (GIVEN | {"image": GIVEN["image"][:, :1]}, "image must be"),
        (GIVEN | {"y": [0, 1, 2, 3, 4]}, "got list"),
        ([GIVEN["y"]], r"a run's conditions must be a dict from names to values, but are \[tensor"),
        (GIVEN | {1: GIVEN["y"]}, "a run's conditions must be a dict"),
        (GIVEN | {"y": lambda i: i[:1]}, r"y must be torch.int64 of shape \(5,\)"),
    ],
)
def test_other_conditions_are_refused_in_a_sentence(conditions, message):
    with pytest.raises(ValueError, match=message) as error:
        sampler().sample(5, conditions=conditions)
    assert "\n" not in str(error.value)


def test_bad_settings_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="condition y wants one sample's tensor"):
        sampler(conditions={"y": 3})
    for conditions in ([GIVEN["y"][0]], {1: GIVEN["y"][0]}):
        with pytest.raises(ValueError, match="the sampler's conditions must be a dict"):
            sampler(conditions=conditions)
    with pytest.raises(ValueError, match="come from classes"):
        sampler(conditions={"class_labels": GIVEN["y"][0]}, num_classes=3)
    with pytest.raises(ValueError, match="give a function"):
        next(sampler().batches(iter([0, 1]), batch_size=2, conditions=GIVEN))
