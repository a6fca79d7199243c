"""What a U-Net's blocks take from the timestep and the class, computed once and kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .unet import UNet, embed

MAX_VALUES = 2**24  # float32 values kept at once: 64 MiB


class Projections:
    """The projections of all blocks side by side, in float32."""

    def __init__(self, unet: UNet) -> None:
        self.config = unet.config
        self.time_mlp = copy.deepcopy(unet.time_mlp).float()
        self.class_embedding = copy.deepcopy(unet.class_embedding)
        if self.class_embedding is not None:
            self.class_embedding.float()
        self.widths: list[int] = []  # of the projections, whose columns follow each other
        # Like the embedding's weights, whatever torch's default dtype and device.
        self._bias = self.time_mlp[0].bias.new_empty(0)
        self._weight = self._bias.new_empty(0, unet.config.time_channels[1])

    def add(self, weight: Tensor, bias: Tensor) -> int:
        """One more projection, (channels, width) and (channels); its place in `widths`."""
        self._weight = torch.cat((self._weight, weight.detach().float()))
        self._bias = torch.cat((self._bias, bias.detach().float()))
        self.widths.append(len(bias))
        return len(self.widths) - 1

    @torch.no_grad()
    def _compute(self, timesteps: list[float], label: int | None) -> Tensor:
        t = self._bias.new_tensor(timesteps)
        labels = None if label is None else torch.full_like(t, label, dtype=torch.int64)
        emb = embed(self.config, self.time_mlp, self.class_embedding, t, labels)
        return F.linear(emb, self._weight, self._bias)


class TimeTable(Projections):
    """A row of them for each (timestep, class).

    A row does not depend on what it was first asked for with: those of the expected timesteps are
    computed together for each class if all classes' fit, any other by itself.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__(unet)
        # Of the expected timesteps: each one's place, and the tables by class. Together, since
        # another thread may be reading.
        self._expected: tuple[dict[float, int], dict[int | None, Tensor]] = {}, {}
        self._others: dict[tuple[float, int | None], Tensor] = {}

    def expect(self, timesteps: Sequence[float]) -> None:
        """Be ready for these."""
        places = {t: i for i, t in enumerate(dict.fromkeys(timesteps))}
        tables = {}
        classes = (self.config.num_classes or 0) + 1
        if classes * len(places) * len(self._bias) > MAX_VALUES:
            places = {}
        elif not self.config.num_classes:
            tables[None] = self._compute(list(places), None)
        self._expected = places, tables

    def _row(self, t: float, label: int | None) -> Tensor:
        """(1, columns)."""
        places, tables = self._expected
        place = places.get(t)
        if place is not None:
            table = tables.get(label)
            if table is None:
                table = tables[label] = self._compute(list(places), label)
            return table[place : place + 1]
        row = self._others.get((t, label))
        if row is None:
            if len(self._others) * len(self._bias) > MAX_VALUES:
                self._others.clear()
            row = self._others[t, label] = self._compute([t], label)
        return row

    def __call__(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """The rows of t (N,) and class_labels (N,) or None; a single one where all are equal."""
        labels = [None] * len(t) if class_labels is None else class_labels.tolist()
        keys = list(zip(t.tolist(), labels, strict=True))
        rows = {key: self._row(*key) for key in dict.fromkeys(keys)}
        return rows[keys[0]] if len(rows) == 1 else torch.cat([rows[key] for key in keys])


class DeviceTimeTable(Projections):
    """For a network on a GPU, whose host knows no timestep: nothing here waits for the device.

    Once timesteps are expected, others have rows of NaN, since nobody can look; so expect all that
    will be asked for, or none: then, and where the table would be too large, each call computes its
    rows. Float32, but for what torch.backends.cuda.matmul allows.

    Args:
        unet: on the GPU.
        backend: of `ops.table_rows`.
    """

    def __init__(self, unet: UNet, backend: str) -> None:
        super().__init__(unet)
        self.backend = backend
        # The timesteps; for each label, their rows. Together, since another thread may be reading.
        self._table: tuple[Tensor, Tensor] | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []  # which graphs go on reading

    def _labels(self) -> list[int | None]:
        count = self.config.num_classes
        return [None] if count is None else [*range(count + (self.config.null_class != "none"))]

    def expect(self, timesteps: Sequence[float]) -> None:
        # As float32, in which they are compared.
        rounded = torch.tensor([*timesteps], dtype=torch.float32, device="cpu")
        known = list(dict.fromkeys(rounded.tolist()))
        values = len(self._labels()) * len(known) * len(self._bias)
        self._table = None
        if 0 < values <= MAX_VALUES:
            rows = torch.cat([self._compute(known, label) for label in self._labels()])
            self._table = self._bias.new_tensor(known), rows

    def __call__(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """The rows of t (N,) and class_labels (N,) or None."""
        table = self._table
        if table is None:
            emb = embed(self.config, self.time_mlp, self.class_embedding, t, class_labels)
            return F.linear(emb, self._weight, self._bias)
        known, rows = table
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.append(table)
        if class_labels is None and self.config.num_classes is not None:
            class_labels = torch.full_like(t, self.config.num_classes, dtype=torch.int64)
        return ops.table_rows(rows, known, t, class_labels, backend=self.backend)
