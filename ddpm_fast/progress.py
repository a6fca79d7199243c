"""One progress bar for all processes of a run."""

from __future__ import annotations

import time

from torch import Tensor
from tqdm import tqdm

from .distributed import World

SECONDS = 0.2  # between two looks at what the others have done
FORMAT = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"


class Progress:
    """The bar, shown by the process that leads: images/s, time left, and what was there counts.

    A step of one sample is the fraction of an image that it is, so the bar moves in small runs too.
    """

    def __init__(self, world: World, total: int, missing: int, num_steps: int, quiet: bool) -> None:
        self._world, self._num_steps = world, num_steps
        self._there, self._steps, self._looked = total - missing, 0, 0.0
        self._done = 0  # steps of the batch in hand
        self._bar = tqdm(
            total=total,
            initial=total - missing,
            disable=quiet or not world.leads,
            unit=" images",
            bar_format=FORMAT,
            smoothing=0,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def callback(self, index: Tensor, done: int, x: Tensor) -> None:
        """Of `Sampler.batches`."""
        self._steps += len(index) * (done - self._done if done else 0)
        self._done = done
        if time.monotonic() >= self._looked + SECONDS:
            self.look()

    def look(self) -> None:
        """Tell the others what was done here since the last look, and show what all have done."""
        steps = self._world.count_steps(self._steps)
        self._steps, self._looked = 0, time.monotonic()
        self._bar.update(self._there + steps / self._num_steps - self._bar.n)

    def wait_for_others(self) -> None:
        """Of the process that leads: until all others have left."""
        while not self._world.others_left():
            self.look()
            time.sleep(SECONDS)
        self.look()
