"""A network's calls of operators on a CPU, recorded once and played again without Python.

Between a network's layers Python takes some ten microseconds a call: of a small network, or a small
batch, up to a third of the time. What was recorded is played by one call, with the same operators
on the same weights in the same order, so to the same bits (csrc/torch_recording.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import backend

MOST = 16  # recordings that are kept, each for inputs of another form
# As csrc/torch_recording.cpp has them:
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NONE, _SLOT, _CONSTANT, _INTEGER, _FLOAT, _INTEGERS, _TEXT = range(7)  # kinds of values


class _CannotRecord(Exception):
    """A recording has no number for what was called."""


class _Call(NamedTuple):
    operator: str
    given: Sequence[Any]
    made: Tensor


class _View(NamedTuple):
    """Where a tensor's elements lie in another, which an operator made."""

    base: Tensor
    sizes: Sequence[int]
    strides: Sequence[int]
    offset: int


def _storage(t: Any) -> int | None:
    is_strided = isinstance(t, Tensor) and t.layout == torch.strided
    return t.untyped_storage()._cdata if is_strided else None


class _Recorder(TorchDispatchMode):
    """Lists what is called while it is on, but for views: those are found by their memory."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        # All that was given, made or viewed, by its id, which is its own while it is kept.
        self.views: dict[int, tuple[Tensor, _View | None]] = {id(t): (t, None) for t in inputs}

    def view_of(self, t: Tensor) -> _View | None:
        return self.views.get(id(t), (t, None))[1]

    def _view(self, made: Tensor, given: Sequence[Any]) -> _View | None:
        found = next((t for t in given if _storage(t) == _storage(made)), None)
        if found is None:
            return None
        view = self.view_of(found)
        base = found if view is None else view.base
        offset = made.storage_offset() - base.storage_offset()
        return _View(base, made.shape, made.stride(), offset)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema, named = func._schema, kwargs or {}
        result = func(*args, **named)
        given = [
            args[i] if i < len(args) else named.get(argument.name, argument.default_value)
            for i, argument in enumerate(schema.arguments)
        ]
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        views = [None if schema.is_mutable else self._view(made, given) for made in results]
        if None in views:
            name = f"{schema.name}.{schema.overload_name}".rstrip(".")
            self.calls.append(_Call(name, given, results[0]))
        if not schema.is_mutable:  # else it is what it was
            self.views |= {id(t): (t, v) for t, v in zip(results, views, strict=True)}
        return result


class _Code:
    """Calls as the numbers, and the constants, that csrc/torch_recording.cpp reads."""

    def __init__(self, recorder: _Recorder, inputs: Sequence[Tensor], result: Tensor) -> None:
        self._operators = backend.extension.recorded_operators()
        self._recorder = recorder
        self._slots: dict[Any, int] = {id(t): slot for slot, t in enumerate(inputs)}
        self._steps: list[list[int]] = []
        self._last: dict[int, int] = {}  # by slot, the last step that reads it
        self.constants: list[Tensor] = []
        for operator, given, made in recorder.calls:
            self._step(operator, given, id(made))
        kind, slot = self._tensor(result)
        if kind != _SLOT:
            raise _CannotRecord
        ends: dict[int, list[int]] = {}
        for read, step in self._last.items():
            if read != slot:
                ends.setdefault(step, []).append(read)
        self.numbers = [len(self._slots) - len(inputs), len(self._steps)]
        for i, step in enumerate(self._steps):
            last = ends.get(i, [])
            self.numbers += [*step, len(last), *last]
        self.numbers.append(slot)

    def _step(self, operator: str, given: Sequence[Any], made: Any) -> int:
        """One more; the slot of what it makes, which is `made`."""
        if operator not in self._operators:
            raise _CannotRecord
        values = [self._value(value) for value in given]  # which may add views
        self._last |= {value[1]: len(self._steps) for value in values if value[0] == _SLOT}
        slot = self._slots.setdefault(made, len(self._slots))
        self._steps.append([self._operators.index(operator), *chain(*values), slot])
        return slot

    def _tensor(self, t: Tensor) -> tuple[int, int]:
        view = self._recorder.view_of(t)
        slot = self._slots.get(id(t if view is None else view.base))
        if slot is None:
            self.constants.append(t)
            return _CONSTANT, len(self.constants) - 1
        if view is not None:
            place = (slot, *view[1:])
            if place not in self._slots:
                self._step("view", view, place)
            slot = self._slots[place]
        return _SLOT, slot

    def _value(self, value: Any) -> Sequence[int]:
        if value is None:
            return [_NONE]
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, int):
            return _INTEGER, int(value)
        if isinstance(value, float):
            return _FLOAT, *struct.unpack("q", struct.pack("d", value))
        if isinstance(value, str):
            return _TEXT, len(value), *value.encode()
        if value in DTYPES:
            return _INTEGER, DTYPES.index(value)
        if isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
            return _INTEGERS, len(value), *value
        raise _CannotRecord


def _same_bits(x: Tensor, y: Tensor) -> bool:
    same = (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    return same and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def is_watched() -> bool:
    """Whether something is to see each operator as it is called: torch's tracing or its profiler,
    or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    )


class Recordings:
    """Of one function, for inputs of any form; those that were not used for longest are dropped.

    Copies and pickles begin without any.
    """

    def __init__(self) -> None:
        self._made: dict[Any, Tensor | None] = {}

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), without gradients. It must do the same whatever is in them."""
        key = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        made = self._made.get(key)
        if made is not None:
            return torch.ops.ddpm_fast.replay.default(made, inputs)
        if key in self._made:
            return function(*inputs)
        result, self._made[key] = _record(function, inputs)
        while len(self._made) > MOST:
            self._made.pop(next(iter(self._made)), None)
        return result


def _record(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What the function returns, and its recording; None where it cannot be, or plays otherwise."""
    with _Recorder(inputs) as recorder:
        result = function(*inputs)
    try:
        code = _Code(recorder, inputs, result)
        recording = torch.ops.ddpm_fast.record.default(code.numbers, code.constants, inputs)
        played = torch.ops.ddpm_fast.replay.default(recording, inputs)
    except (_CannotRecord, RuntimeError):
        return result, None
    return result, recording if _same_bits(played, result) else None
