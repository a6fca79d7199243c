"""What a network is given beside x_t and t: class labels, and named tensors of a host project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import shown
from .loop import FirstState


def class_labels(
    index: Tensor,
    classes: Sequence[int] | None,
    num_classes: int | None,
    null_class: int | None,
    guided: bool,
) -> Tensor | None:
    """The label of every sample: the class list repeated over the sample indices."""
    if num_classes is None:
        if classes is not None:
            raise ValueError("classes were asked for, but this model was trained without them")
        return None
    if classes is None:
        if guided:
            raise ValueError("guidance is towards a class: give classes, or leave it at 1")
        if null_class is None:
            raise ValueError(
                f"this model always needs a class: give some of 0 to {num_classes - 1}"
            )
        return torch.full_like(index, null_class)
    if not len(classes):
        raise ValueError("classes must have at least one; None asks for none")
    for label in classes:
        if isinstance(label, bool) or label not in range(num_classes):
            raise ValueError(f"there is no class {label}: this model has 0 to {num_classes - 1}")
    classes = torch.tensor([int(label) for label in classes], dtype=torch.int64)
    return classes[index % len(classes)]


def _named(what: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    values = {} if values is None else values
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{what} must be a dict from names to values, but are {shown(values)}")
    return dict(values)


def check_examples(examples: Mapping[str, Tensor] | None, classes: bool) -> dict[str, Tensor]:
    """One sample's value of each condition, by name; ValueError if they are none."""
    examples = _named("the sampler's conditions", examples)
    for name, example in examples.items():
        if not isinstance(example, Tensor):
            raise ValueError(
                f"condition {name} wants one sample's tensor, to know its shape and dtype, but"
                f" {shown(example)} was given"
            )
    if classes and "class_labels" in examples:
        raise ValueError("class_labels come from classes: leave them out of conditions")
    return examples


def check_conditions(
    examples: Mapping[str, Tensor],
    given: Mapping[str, FirstState] | None,
    num_samples: int | None,
) -> None:
    """ValueError where a run's conditions are not those that the sampler was made for.

    A function of the indices is not called; what it returned is to be checked when it was.
    """
    given = _named("a run's conditions", given)
    if given.keys() != examples.keys():
        raise ValueError(
            f"this sampler takes the conditions {sorted(examples) or 'none'}, but the run was given"
            f" {sorted(given) or 'none'}"
        )
    for name, value in given.items():
        if callable(value):
            continue
        if num_samples is None:
            raise ValueError(
                f"condition {name} as a tensor wants a known number of indices: give a function"
            )
        shape, dtype = (num_samples, *examples[name].shape), examples[name].dtype
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            got = type(value).__name__
            if isinstance(value, Tensor):
                got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"condition {name} must be {dtype} of shape {shape}, got {got}")
