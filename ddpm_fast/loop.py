"""One batch on its way from x_T to x_0: the buffers, and the step that is run or captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops
from .device import memory_format

if TYPE_CHECKING:
    from .sampler import Sampler


class Loop:
    """The buffers of one batch, and the step that advances them; nothing in it waits on the host.

    `step` is what is captured: the network and the update, with the row counter on the device.
    """

    def __init__(self, sampler: Sampler, batch_size: int, conditional: bool) -> None:
        device, self.sampler, self.batch_size = sampler.device, sampler, batch_size
        self.x = torch.zeros(batch_size, *sampler.sample_shape, device=device)
        self.row = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.seed = torch.zeros_like(self.row)
        self.index = torch.zeros_like(self.row)
        self.status = torch.zeros(4, dtype=torch.int32, device=device)
        self.guidance = torch.ones(1, device=device) if sampler.guided else None
        copies = 2 if sampler.guided else 1
        self.labels = torch.zeros(copies * batch_size, dtype=torch.int64, device=device)
        # What the network is given: the step leaves its result here too, in the network's dtype.
        order = memory_format(device, sampler.dtype, self.x.ndim)
        self.input = torch.empty(
            copies * batch_size,
            *sampler.sample_shape,
            dtype=sampler.dtype,
            device=device,
            memory_format=order,
        )
        self.conditions = {"class_labels": self.labels} if conditional else {}

    def start(self, seed: int, index: Tensor, labels: Tensor | None) -> None:
        """Draw x_T of the samples `index` and go back to the first row."""
        sampler = self.sampler
        self.seed.fill_(_as_int64(seed))
        self.index.copy_(index)
        self.row.zero_()
        self.status.zero_()
        if labels is not None:
            self.labels[: self.batch_size].copy_(labels)
        if self.guidance is not None:
            self.guidance.fill_(sampler.guidance_scale)
            self.labels[self.batch_size :].fill_(sampler.null_class)
        shape = list(sampler.sample_shape)
        self.x.copy_(ops.randn(self.seed, self.index, shape, backend=sampler.backend))
        self.input.copy_(self.x if self.guidance is None else torch.cat((self.x, self.x)))

    def step(self) -> None:
        """One row of the plan for the whole batch."""
        sampler = self.sampler
        t = sampler.timesteps.index_select(0, self.row)
        t = t if self.guidance is None else torch.cat((t, t))
        output = sampler.network(self.input, t, **self.conditions)
        ops.p_sample_step_(
            self.x,
            output,
            sampler.plan.coefficients,
            sampler.plan.index,
            self.row,
            self.seed,
            self.index,
            guidance_scale=self.guidance,
            status=self.status,
            next_input=self.input,
            backend=sampler.backend,
        )
        self.row.add_(1)


def _as_int64(seed: int) -> int:
    """The signed number of the same 64 bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
