"""Checks of arguments: each returns the value, or raises ValueError in one sentence."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def shown(value: Any) -> str:
    """`value` for an error sentence: on one line, not long."""
    return " ".join(repr(value).split())[:80]


def one_of(name: str, value: Any, options: Iterable[str]) -> str:
    """`value` if it is one of `options`, else ValueError listing them."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(
            f"{name} must be one of {', '.join(options)}, but {shown(value)} was given."
        )
    return value


def count(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int in [low, high] (whole numbers only, no bool), else ValueError."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, but {shown(value)} was given.") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, but {shown(number)} was given.")
    return number


def real(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> float:
    """`value` as a finite float in [low, high], else ValueError."""
    is_real = isinstance(value, (int, float, np.integer, np.floating))
    if is_real and not isinstance(value, bool) and abs(value) <= 1e300 and low <= value <= high:
        return float(value)
    wanted = "a finite number" if low == -np.inf else f"a number between {low} and {high}"
    raise ValueError(f"{name} must be {wanted}, but {shown(value)} was given.")


def from_fields(cls: type[T], values: Any) -> T:
    """A dataclass from a dict of some of its fields, else ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"a U-Net's config must be a dict, but it is {shown(values)}.")
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(
            f"unknown U-Net fields {shown(unknown)}; this file needs a newer ddpm_fast"
        )
    return cls(**values)
