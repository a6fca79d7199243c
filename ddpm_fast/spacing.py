"""The choice of timesteps: OpenAI's language and spacing, diffusers' spacings, the quadratic one.

Everything raises ValueError, in one sentence, on what chooses no timesteps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ddpm_fast.arguments import count, one_of, shown
from ddpm_fast.schedule import MAX_TIMESTEPS

SPACINGS = ("openai", "leading", "trailing", "linspace", "quadratic")


def space_timesteps(num_timesteps: int, section_counts: int | str | Sequence[int]) -> np.ndarray:
    """OpenAI's choice of timesteps (guided-diffusion respace.py, `space_timesteps`), sorted.

    `section_counts`: a count; "250"; "10,15,20" or [10, 15, 20] (T cut into equal sections with so
    many steps each); "ddimN" (the stride of the DDIM paper that gives exactly N steps from 0 on).
    Except for "ddimN", a section's first and last timestep are kept; a count of 1 keeps the first.
    Returns a strictly increasing int64 array.
    """
    total = count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
    if isinstance(section_counts, str):
        text = section_counts.replace(" ", "")
        if not re.fullmatch(r"(ddim)?[0-9]{1,7}|[0-9]{1,7}(,[0-9]{1,7})+", text):
            raise ValueError(
                f'steps must be like "250", "10,15,20" or "ddim50", not {shown(section_counts)}.'
            )
        if text.startswith("ddim"):
            return _ddim_stride(total, int(text.removeprefix("ddim")))
        section_counts = [int(part) for part in text.split(",")]
    elif not isinstance(section_counts, (list, tuple, np.ndarray)):
        section_counts = [section_counts]
    counts = [count("a section's step count", number, 0, total) for number in section_counts]
    if sum(counts) < 1:
        raise ValueError(f"at least 1 step must be kept, but {shown(section_counts)} keeps none.")
    kept, start = [], 0
    for i, wanted in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if wanted > size:
            raise ValueError(
                f"section {i + 1} of {len(counts)} has {size} of the {total} timesteps, too few"
                f" for {wanted} steps; ask for at most {size} there."
            )
        stride = (size - 1) / (wanted - 1) if wanted > 1 else 1
        place = 0.0  # summed, not multiplied, to round where OpenAI's rounds
        for _ in range(wanted):
            kept.append(start + round(place))
            place += stride
        start += size
    return np.array(kept, dtype=np.int64)


def _ddim_stride(total: int, wanted: int) -> np.ndarray:
    for stride in range(1, total):
        if len(range(0, total, stride)) == wanted:
            return np.arange(0, total, stride, dtype=np.int64)
    raise ValueError(
        f'no whole stride over {total} timesteps gives exactly {wanted} steps; "{wanted}" without'
        f' "ddim" spaces them evenly.'
    )


def spaced(
    num_timesteps: int, steps: int, spacing: str = "openai", steps_offset: int = 0
) -> np.ndarray:
    """`steps` of `num_timesteps` timesteps, evenly or quadratically; strictly increasing int64.

    openai: `space_timesteps`, 0 to T-1 (1 step: 0). leading, trailing, linspace: as diffusers'
    DDPM and DDIM schedulers (Lin et al. 2023, table 2; its DPM-Solver++ has other leading and
    linspace); leading is i * (T // steps) + steps_offset, trailing counts back from T-1.
    quadratic: floor(c i^2) up to 0.8 T (Song et al. 2020, appendix D.2, and its code); where
    that repeats a timestep, the next free one is taken.
    """
    total = count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
    steps = count("steps", steps, 1, total)
    one_of("spacing", spacing, SPACINGS)
    steps_offset = count("steps_offset", steps_offset, 0, total)
    if steps_offset and spacing != "leading":
        raise ValueError(
            f"steps_offset belongs to spacing leading, but spacing {spacing} was given"
            f" steps_offset {steps_offset}."
        )
    if spacing == "openai":
        return space_timesteps(total, steps)
    if spacing == "leading":
        kept = np.arange(steps) * (total // steps) + steps_offset
        if kept[-1] >= total:
            raise ValueError(
                f"steps_offset {steps_offset} moves the last of {steps} timesteps to {kept[-1]},"
                f" past {total - 1}; take fewer steps or a smaller offset."
            )
    elif spacing == "trailing":
        # diffusers' own arange, so that halves round alike; cut where it yields one too many.
        kept = (np.round(np.arange(total, 0, -total / steps)) - 1)[:steps][::-1]
    elif spacing == "linspace":
        kept = np.round(np.linspace(0, total - 1, steps))
    else:
        squares = np.floor(np.linspace(0.0, np.sqrt(0.8 * total), steps) ** 2)
        kept = np.maximum(squares, np.arange(steps))  # convex, so this is strictly increasing
    return kept.astype(np.int64)


def timesteps_for(
    num_timesteps: int,
    steps: int | str | None = None,
    spacing: str | None = None,
    steps_offset: int = 0,
) -> np.ndarray:
    """The timesteps that are used, strictly increasing int64: the one entry for every caller.

    steps None: all T. A string: OpenAI's language (`space_timesteps`), which needs no spacing. A
    number: `spaced`, by default OpenAI's even spacing. steps_offset: diffusers', of a number of
    steps with spacing leading.
    """
    total = count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
    if spacing is not None:
        one_of("spacing", spacing, SPACINGS)
    if steps_offset and (steps is None or isinstance(steps, str)):
        raise ValueError(
            f"steps_offset belongs to a number of steps with spacing leading, but steps"
            f" {shown(steps)} was given steps_offset {shown(steps_offset)}."
        )
    if steps is None:
        return np.arange(total, dtype=np.int64)
    if isinstance(steps, str):
        if spacing not in (None, "openai"):
            raise ValueError(
                f"steps {shown(steps)} already says which timesteps, so spacing {spacing!r} cannot"
                f" apply; give the steps as a number, or no spacing."
            )
        return space_timesteps(total, steps)
    return spaced(total, steps, spacing or "openai", steps_offset)
