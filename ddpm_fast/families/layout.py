"""How another code base names the parts of our U-Net, and the way there and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..tensor_files import WEIGHT_DTYPES
from ..unet import Stage, UNet
from ..unet_config import UNetConfig

# The name of a module there; three names where it keeps queries, keys and values apart.
Name = str | tuple[str, str, str]
Names = Mapping[str, Name]


class Place(NamedTuple):
    """A stage or resampler of our U-Net: its name, and where it stands.

    way: down, middle or up. block: its number within the level; a resampler comes after the last.
    """

    ours: str
    way: str
    level: int
    block: int
    module: nn.Module

    def names(
        self, prefix: str, block: Names, attention: Names | None = None, attention_prefix: str = ""
    ) -> dict[str, Name]:
        """The modules within it: those of its block below `prefix`, and of its attention."""
        if not isinstance(self.module, Stage):
            return _below(self.ours, prefix, block)
        found = _below(f"{self.ours}.block", prefix, block)
        if self.module.attention is not None and attention is not None:
            found |= _below(f"{self.ours}.attention", attention_prefix, attention)
        return found


def _below(ours: str, prefix: str, names: Names) -> dict[str, Name]:
    def named(name: Name) -> Name:
        if isinstance(name, tuple):
            return tuple(f"{prefix}.{n}" for n in name)
        return f"{prefix}.{name}"

    return {f"{ours}.{mine}": named(theirs) for mine, theirs in names.items()}


def places(unet: UNet) -> Iterator[Place]:
    """The stages and resamplers in the order in which x_t passes them."""
    level = block = 0
    for index, module in enumerate(unet.down):
        yield Place(f"down.{index}", "down", level, block, module)
        level, block = (level, block + 1) if isinstance(module, Stage) else (level + 1, 0)
    for index, module in enumerate(unet.middle):
        yield Place(f"middle.{index}", "middle", level, index, module)
    block = 0
    for index, module in enumerate(unet.up):
        yield Place(f"up.{index}", "up", level, block, module)
        level, block = (level, block + 1) if isinstance(module, Stage) else (level - 1, 0)


def meta_unet(config: UNetConfig, num_tensors: int) -> UNet:
    """The network without memory; ValueError if a file of `num_tensors` cannot hold its weights.

    So a small file can ask for no long work: each residual block has ten tensors.
    """
    blocks = len(config.channel_mult) * (2 * config.num_res_blocks + 1) + 2
    if 10 * blocks > num_tensors:
        raise ValueError(f"{blocks} residual blocks, but {num_tensors} tensors are there")
    with torch.device("meta"):
        return UNet(config)


def listed(keys: Iterable[str]) -> str:
    """Keys for an error sentence: the first few, on one line."""
    keys = sorted(keys)
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(ascii(key)[:80] for key in keys[:4]) + more


def to_ours(network: nn.Module, names: Names, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict out of theirs.

    Raises ValueError for a tensor that is missing, has no place, is no weight, or does not fit.
    """
    found, used = {}, set()
    for key, wanted in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        name = names[module]
        keys = [f"{n}.{kind}" for n in ((name,) if isinstance(name, str) else name)]
        missing = [k for k in keys if k not in theirs]
        if missing:
            raise ValueError(f"it lacks {listed(missing)}, which its other tensors ask for")
        used.update(keys)
        found[key] = _fitted([theirs[k] for k in keys], keys, wanted.shape)
    left = theirs.keys() - used
    if left:
        raise ValueError(f"{len(left)} of its tensors could not be placed: {listed(left)}")
    return found


def _fitted(parts: list[Tensor], keys: list[str], shape: torch.Size) -> Tensor:
    """The parts, one below the other, in `shape`: a linear layer is a convolution of size 1."""
    wanted = (shape[0] // len(parts), *shape[1:])
    for key, part in zip(keys, parts, strict=True):
        if part.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{shown(key)} is of {part.dtype}, which is no weight")
        if _bare(part.shape) != _bare(wanted):
            raise ValueError(
                f"{shown(key)} has shape {tuple(part.shape)} where the others ask for {wanted}"
            )
    return torch.cat([part.reshape(wanted) for part in parts])


def _bare(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without the ones at its end."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def to_theirs(ours: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Their state dict out of ours: the way back, our shapes kept."""
    found = {}
    for key, value in ours.items():
        module, _, kind = key.rpartition(".")
        name = names[module]
        keys = (name,) if isinstance(name, str) else name
        for k, part in zip(keys, value.chunk(len(keys)), strict=True):
            found[f"{k}.{kind}"] = part
    return found


def modules(keys: Iterable[str]) -> set[str]:
    """The names of all modules that hold a tensor, at any depth."""
    found = set()
    for key in keys:
        parts = key.split(".")
        found.update(".".join(parts[:n]) for n in range(1, min(len(parts), 8)))
    return found


def count_parts(there: set[str], prefix: str) -> int:
    """How many of prefix.0, prefix.1, ... are among the modules."""
    number = 0
    while f"{prefix}.{number}" in there:
        number += 1
    return number


def shape_of(tensors: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that the configuration is read from; ValueError without it."""
    if key not in tensors:
        raise ValueError(f"it lacks {listed([key])}")
    shape = tuple(tensors[key].shape)
    if len(shape) != ndim or not all(shape):
        raise ValueError(f"{listed([key])} has shape {shape}, where {ndim} dimensions were wanted")
    return shape


def down_path(steps: Iterable[tuple[int, bool] | None], base_channels: int) -> dict[str, Any]:
    """Fields of a UNetConfig from what x_t passes on its way down.

    steps: (channels, whether attention follows) for a residual block, None for a resampler.
    """
    levels: list[list[tuple[int, bool]]] = [[]]
    for step in steps:
        if step is None:
            levels.append([])
        else:
            levels[-1].append(step)
    first = levels[0]
    if any(len(level) != len(first) or len(set(level)) != 1 for level in levels):
        raise ValueError(f"its levels are not alike: (channels, attention) {shown(levels)}")
    mult = [level[0][0] / base_channels for level in levels]
    return {
        "base_channels": base_channels,
        "channel_mult": tuple(mult),
        "num_res_blocks": len(first),
        "attention_levels": tuple(level[0][1] for level in levels),
    }


def ends(tensors: Mapping[str, Tensor], conv_in: str, conv_out: str) -> dict[str, Any]:
    """in_channels and learn_sigma, by the shapes of the first and the last convolution."""
    in_channels = shape_of(tensors, f"{conv_in}.weight", 4)[1]
    out_channels = shape_of(tensors, f"{conv_out}.weight", 4)[0]
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"it takes {in_channels} channels and gives {out_channels}: neither the same nor, for "
            f"a learned variance, twice as many"
        )
    return {"in_channels": in_channels, "learn_sigma": out_channels == 2 * in_channels}
