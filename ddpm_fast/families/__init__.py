"""The field's checkpoints: one module per family, and the table of them.

A module has NAME, MARKER (a tensor that only its networks have), `read`, and `names`, their names
of our modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..tensor_files import read_any
from . import diffusers, ho, lucidrains, openai, score_sde, w86763777
from .layout import listed
from .reading import ChoiceError, Choices, Reading, Weights

# A bare state dict of diffusers' lacks the configuration that its folder has.
FAMILIES = (openai, ho, score_sde, w86763777, lucidrains)


def read(path: Path, choices: Choices) -> tuple[Reading, list[Path]]:
    """The model at `path`, and the files it was read from.

    path: a file of any family, or a diffusers folder. Raises ValueError in one sentence for what is
    none, naming the tensors that have no place.
    """
    if path.is_dir():
        found = diffusers.find(path)
        file = diffusers.weights_file(found[0])
        tensors = read_any(file)
    else:
        file, tensors = path, read_any(path)
        # The weights in a diffusers folder, given by themselves.
        found = diffusers.find(path.parent) if diffusers.MARKER in tensors else None
    if found is None:
        reading, read = _read_tensors(tensors, choices, path.stem), [path]
    else:
        unet, scheduler = found
        choices.note(f"family {diffusers.NAME}: it has a config.json")
        config = diffusers.read_json(unet / "config.json")
        process = None if scheduler is None else diffusers.read_json(scheduler)
        reading = diffusers.read(tensors, config, process, choices)
        reading.family = diffusers.NAME
        read = [file, unet / "config.json", *([scheduler] if scheduler else [])]
    choices.refuse_rest(reading.family)
    return reading, read


def _read_tensors(tensors: Mapping[str, Tensor], choices: Choices, stem: str) -> Reading:
    """The model of a file's tensors, by their path in it; `stem` is the file's name."""
    for family in FAMILIES:
        prefixes = [k[: -len(family.MARKER)] for k in tensors if _ends_with(k, family.MARKER)]
        if prefixes:
            choices.note(f"family {family.NAME}: it has {family.MARKER}")
            asked = choices.has("weights")
            weights = Weights(tensors, _pick_prefix(prefixes, choices), asked)
            reading = family.read(weights, choices, stem)
            reading.family = family.NAME
            return reading
    if any(_ends_with(key, diffusers.MARKER) for key in tensors):
        raise ValueError("it is a diffusers network without its config.json: give the folder")
    known = ", ".join(family.NAME for family in (*FAMILIES, diffusers))
    raise ValueError(
        f"it is of no known family (ddpm_fast, {known}): its {len(tensors)} tensors could not be "
        f"placed: {listed(tensors) or 'there are none'}"
    )


def _ends_with(key: str, marker: str) -> bool:
    return key == marker or key.endswith("." + marker)


def _pick_prefix(prefixes: list[str], choices: Choices) -> str:
    """Which of several sets of weights: the one asked for, else the averaged one."""
    if len(prefixes) == 1 and not choices.has("weights"):
        return prefixes[0]

    def rank(prefix: str) -> tuple[bool, bool, int]:
        # An EMA object may hold the model that it follows, too.
        return "ema" not in prefix, "online" in prefix, len(prefix)

    best = min(prefixes, key=rank)
    why = "the averaged ones are better" if "ema" in best else "the first of several"
    chosen = choices.pick("weights", best.rstrip("."), f"{why}; there are {listed(prefixes)}")
    for prefix in prefixes:
        if prefix.rstrip(".") == str(chosen).rstrip("."):
            return prefix
    there = listed(p.rstrip(".") for p in prefixes)
    raise ChoiceError(f"it has no weights {chosen!r}; it has {there}")
