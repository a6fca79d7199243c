"""One batch on its way from x_T to x_0: the buffers, and the step that is run or captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import noise, ops
from .device import memory_format
from .inference import FusedUNet
from .plan import Plan
from .workers import on_a_worker

if TYPE_CHECKING:
    from .sampler import Sampler

BAD_ROW = 1  # of the status word; csrc/include/ddpm_fast/arguments.h

# What a run starts from, or is given of each sample: all of its samples' (N, *shape), or a function
# from some of their indices (B,) to these samples' (B, *shape).
FirstState = Tensor | Callable[[Tensor], Tensor]


class Loop:
    """The buffers of one batch, and the step that advances them; nothing in it waits on the host.

    `step` is what is captured: the network and the update, with the row counter on the device.
    """

    def __init__(self, sampler: Sampler, batch_size: int, given_noise: bool = False) -> None:
        device, self.sampler, self.batch_size = sampler.device, sampler, batch_size
        copies = 2 if sampler.guided else 1  # of each sample, in what the network is given
        self.x = torch.zeros(batch_size, *sampler.sample_shape, device=device)
        self.rows = torch.zeros(copies * batch_size, dtype=torch.int64, device=device)
        self.row = self.rows[:batch_size]
        self.t = torch.zeros_like(self.rows)
        self.seed = torch.zeros_like(self.row)
        self.index = torch.zeros_like(self.row)
        self.status = torch.zeros(4, dtype=torch.int32, device=device)
        # Written by each step for the next; no plan's first step reads it.
        self.previous_pred_xstart = torch.zeros_like(self.x) if sampler.plan.multistep else None
        # Of a run that brings its own; else the step makes its noise itself.
        self.noise = torch.zeros_like(self.x) if given_noise else None
        self.guidance = torch.ones(1, device=device) if sampler.guided else None
        self.labels = torch.zeros_like(self.rows)
        # What the network is given: the step leaves its result here too, in the network's dtype.
        network = sampler.network
        dtype = network.input_dtype if isinstance(network, FusedUNet) else sampler.dtype
        order = memory_format(device, dtype, self.x.ndim)
        self.input = torch.empty(
            copies * batch_size,
            *sampler.sample_shape,
            dtype=dtype,
            device=device,
            memory_format=order,
        )
        self.named = {
            name: torch.zeros(len(self.rows), *one.shape, dtype=one.dtype, device=device)
            for name, one in sampler.conditions.items()
        }
        self.uses_workers = False  # as the network does; `start` asks it
        labels = {} if sampler.num_classes is None else {"class_labels": self.labels}
        self.conditions = self.named | labels

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        tensors = [v for v in vars(self).values() if isinstance(v, Tensor) and v is not self.row]
        tensors += self.named.values()
        return sum(v.untyped_storage().nbytes() for v in tensors)

    def rewind(self) -> None:
        """Back to the first row, with nothing to report."""
        self.rows.zero_()
        self.status.zero_()

    def start(
        self,
        seed: int,
        index: Tensor,
        labels: Tensor | None,
        x_T: Tensor | None = None,
        x_start: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make the state that the first row takes of the samples `index`: x_T, given or drawn, or
        x_start noised as the plan says; then go back to the first row.

        conditions: the network's, by name, each (B, *shape).
        """
        sampler = self.sampler
        self.seed.fill_(_as_int64(seed))
        self.index.copy_(index)
        self.rewind()
        network, size = sampler.network, len(self.input)
        self.uses_workers = isinstance(network, FusedUNet) and network.uses_workers(size)
        if labels is not None:
            self.labels[: self.batch_size].copy_(labels)
        if self.guidance is not None:
            self.guidance.fill_(sampler.guidance_scale)
            self.labels[self.batch_size :].fill_(sampler.null_class)
        for name, value in (conditions or {}).items():
            for half in self.named[name].split(self.batch_size):
                half.copy_(value)
        if x_T is not None:
            self.x.copy_(x_T)
        elif x_start is not None:
            self.x.copy_(x_start)
            if sampler.plan.strength is not None:  # an inversion starts from x_start as it is
                self.x.copy_(self._noised(self.x, sampler.plan.start))
        else:
            self.x.copy_(self._draw(noise.SAMPLING))
        self.input.copy_(self.x if self.guidance is None else torch.cat((self.x, self.x)))

    def _draw(self, stream: int) -> Tensor:
        shape, backend = list(self.sampler.sample_shape), self.sampler.backend
        return ops.randn(self.seed, self.index, shape, stream=stream, backend=backend)

    def _noised(self, x_start: Tensor, coefficients: Tensor) -> Tensor:
        """q_sample with the noise that the contract keeps for editing."""
        level = torch.zeros_like(self.row)
        drawn, backend = self._draw(noise.EDITING), self.sampler.backend
        arguments = (x_start, coefficients, level, self.seed, self.index)
        return ops.q_sample(*arguments, noise=drawn, backend=backend)[0]

    def take_noise(self, noise: Tensor | None) -> None:
        """That of the next step; None where it uses none. ValueError for another shape."""
        if noise is None:
            return
        if noise.shape != self.noise.shape:
            want, got = tuple(self.noise.shape), tuple(noise.shape)
            raise ValueError(f"noise must be of shape {want}, but {got} was given")
        self.noise.copy_(noise)

    def step(self) -> None:
        """One row of the plan for the whole batch; it allocates nothing, but for the network."""
        sampler = self.sampler
        torch.index_select(sampler.timesteps, 0, self.rows, out=self.t)
        output = sampler.network(self.input, self.t, **self.conditions)
        if output.untyped_storage().data_ptr() == self.input.untyped_storage().data_ptr():
            output = output.clone()  # its input, or a view of it: the step writes there
        if self.uses_workers:
            on_a_worker(self._update, output)
        else:
            self._update(output)
        self.rows.add_(1)

    def _update(self, output: Tensor) -> None:
        sampler = self.sampler
        ops.p_sample_step_(
            self.x,
            output,
            sampler.plan.coefficients,
            sampler.plan.index,
            self.row,
            self.seed,
            self.index,
            noise=self.noise,
            guidance_scale=self.guidance,
            previous_pred_xstart=self.previous_pred_xstart,
            status=self.status,
            next_input=self.input,
            backend=sampler.backend,
        )

    def check_result(self) -> None:
        """RuntimeError for what the steps reported: one look, after the run, that waits for it."""
        code, row, position, _ = self.status.tolist()
        steps = self.sampler.plan.num_steps
        if code == BAD_ROW:
            raise RuntimeError(f"the step was given row {row} of {steps}: a defect")
        if code:
            dtype = str(self.sampler.dtype).removeprefix("torch.")
            raise RuntimeError(
                f"sample {int(self.index[position])} has a value that is not finite after step "
                f"{row + 1} of {steps}: the network's weights are broken, or it overflows in "
                f"{dtype}{'' if dtype == 'float32' else ' (try float32)'}"
            )


def rows(given: FirstState | None, index: Tensor, place: Tensor) -> Tensor | None:
    """Of what was given of all samples, what belongs to a batch.

    index: its samples' (B,); place: their places (B,) in the order in which they were asked for.
    """
    if given is None:
        return None
    return given(index) if callable(given) else given[place.to(given.device)]


def check_first_state(
    plan: Plan, shape: Sequence[int | None], x_T: FirstState | None, x_start: FirstState | None
) -> None:
    """Raise ValueError where the plan starts from another thing, or it is not of `shape`.

    A function of the indices is not called; what it returned is to be checked when it was.
    """
    if plan.start is not None and (x_start is None or x_T is not None):
        how = f"method {plan.method}" if plan.strength is None else f"strength {plan.strength}"
        raise ValueError(f"{how} starts from x_start: give it, and no x_T")
    if plan.start is None and x_start is not None:
        raise ValueError(
            "x_start was given, but this sampler starts from x_T: make it with a strength above 0 "
            "(1 is all steps), or with method ddim_inverse"
        )
    name, x = ("x_T", x_T) if x_start is None else ("x_start", x_start)
    if x is None or callable(x):
        return
    if shape[0] is None:
        raise ValueError(f"{name} as a tensor wants a known number of indices: give a function")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape != tuple(shape):
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating-point tensor of shape {shape}, got {got}")
    if not x.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")


def _as_int64(seed: int) -> int:
    """The signed number of the same 64 bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
