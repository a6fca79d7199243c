"""A network's calls of operators on a CPU, recorded once and replayed without Python.

Between a network's layers Python takes some ten microseconds a call: of a small network, or a small
batch, up to a third of the time. What was recorded is replayed by one call, with the same operators
on the same weights in the same order, so to the same bits (csrc/torch_replay.cpp).
"""

from __future__ import annotations

import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from . import backend

MOST = 16  # recordings that are kept, each for inputs of another form
LONGEST = 0.5  # seconds of a call that is worth recording
# As csrc/torch_replay.cpp has them:
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NONE, _SLOT, _CONSTANT, _INTEGER, _FLOAT, _INTEGERS, _TEXT = range(7)  # kinds of values


class _CannotRecord(Exception):
    """A recording has no number for what was called."""


class _Place(NamedTuple):
    """Where a tensor lies in its memory."""

    dtype: torch.dtype
    sizes: Sequence[int]
    strides: Sequence[int]
    offset: int


class _Slot(NamedTuple):
    number: int


def _memory(t: Tensor) -> int:
    """What tensors that share memory have in common."""
    if t.layout != torch.strided:
        raise _CannotRecord
    return t.untyped_storage()._cdata


def _place(t: Tensor) -> _Place:
    return _Place(t.dtype, t.shape, t.stride(), t.storage_offset())


class _Recorder(TorchDispatchMode):
    """Writes what is called while it is on as numbers, for csrc/torch_replay.cpp.

    It keeps no tensor but the constants, those that no call made. Tensors are known by their
    memory: what lies in that of a slot, but elsewhere than the slot's own, is a view. Memory that
    was freed and is used again has a new slot, since a call made what lies there now.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler for this class: seconds, and 100 MiB."""
        return False

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.is_refused = False
        self.constants: list[Tensor] = []
        self._operators = backend.extension.replay_operators()
        self._inputs, self._slots = len(inputs), len(inputs)
        # By memory: the slot, and where it lies. None for memory that no slot has.
        self._owners: dict[int, tuple[int, _Place] | None] = {}
        self._views: dict[tuple[int, _Place], int] = {}
        self._steps: list[list[int]] = []
        self._last: dict[int, int] = {}  # by slot, the last step that has to do with it
        for slot, t in enumerate(inputs):
            if self._owners.setdefault(_memory(t), (slot, _place(t)))[0] != slot:
                raise _CannotRecord  # two inputs in one memory, which others need not share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if not self.is_refused:
            schema = func._schema
            given = [
                args[i] if i < len(args) else named.get(argument.name, argument.default_value)
                for i, argument in enumerate(schema.arguments)
            ]
            results = list(result) if isinstance(result, (list, tuple)) else [result]
            name = f"{schema.name}.{schema.overload_name}".rstrip(".")
            try:
                self._add(name, given, results, schema.is_mutable)
            except _CannotRecord:
                self.is_refused = True
        return result

    def _add(self, name: str, given: Sequence[Any], results: Sequence[Any], writes: bool) -> None:
        if not all(isinstance(made, Tensor) for made in results):
            raise _CannotRecord  # the host asks for a value
        memories = [_memory(made) for made in results]
        if writes:  # into what it was given, which must be something of this run
            if any(self._owners.get(memory) is None for memory in memories):
                raise _CannotRecord
            self._step(name, given)
            return
        of_given = {
            _memory(t) for t in given if isinstance(t, Tensor) and t.layout == torch.strided
        }
        if of_given.issuperset(memories):
            return  # views, written where they are read
        if of_given.intersection(memories):
            raise _CannotRecord
        slot = self._step(name, given)
        self._owners.update(dict.fromkeys(memories))
        self._owners[memories[0]] = slot, _place(results[0])

    def _step(self, name: str, given: Sequence[Any]) -> int:
        """One more; returns the slot of what it makes."""
        if name not in self._operators:
            raise _CannotRecord
        values = [self._value(value) for value in given]  # which may add views
        slot, self._slots = self._slots, self._slots + 1
        read = [value[1] for value in values if value[0] == _SLOT]
        self._last |= dict.fromkeys([slot, *read], len(self._steps))
        self._steps.append([self._operators.index(name), *chain(*values), slot])
        return slot

    def _tensor(self, t: Tensor) -> tuple[int, int]:
        memory = _memory(t) if t.layout == torch.strided else None
        if memory not in self._owners:
            self.constants.append(t)
            return _CONSTANT, len(self.constants) - 1
        owner = self._owners[memory]
        if owner is None:
            raise _CannotRecord
        (slot, own), place = owner, _place(t)
        if place == own:
            return _SLOT, slot
        if place.dtype != own.dtype:
            raise _CannotRecord
        if (slot, place) not in self._views:
            offset = place.offset - own.offset
            given = (_Slot(slot), place.sizes, place.strides, offset)
            self._views[slot, place] = self._step("view", given)
        return _SLOT, self._views[slot, place]

    def _value(self, value: Any) -> Sequence[int]:
        if value is None:
            return [_NONE]
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _Slot):
            return _SLOT, value.number
        if isinstance(value, int):
            return _INTEGER, int(value)
        if isinstance(value, float):
            return _FLOAT, *struct.unpack("q", struct.pack("d", value))
        if isinstance(value, str):
            return _TEXT, len(value.encode()), *value.encode()
        if value in DTYPES:
            return _INTEGER, DTYPES.index(value)
        if isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
            return _INTEGERS, len(value), *value
        raise _CannotRecord

    def numbers(self, result: Tensor) -> list[int]:
        """All that was called, and that `result` came of it."""
        kind, slot = self._tensor(result)
        if self.is_refused or kind != _SLOT:
            raise _CannotRecord
        last: list[list[int]] = [[] for _ in self._steps]
        for read, step in self._last.items():
            if read != slot:
                last[step].append(read)
        steps = [[*step, len(ends), *ends] for step, ends in zip(self._steps, last, strict=True)]
        return [self._slots - self._inputs, len(steps), *chain(*steps), slot]


def _record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """What the function returns, and its recording; None where it cannot be, or differs."""
    # In inference mode operators come in other pieces; what was made there cannot be taken out.
    with torch.inference_mode(False), torch.no_grad():
        inputs = [t.clone() if t.is_inference() else t for t in inputs]
        try:
            recorder = _Recorder(inputs)
        except _CannotRecord:
            return function(*inputs), None
        # Not by `with`, which sets flags of the whole process: threads that leave in another order
        # than they came would leave them set for good.
        _push_mode(recorder)
        try:
            result = function(*inputs)
        finally:
            _pop_mode()
        try:
            numbers = recorder.numbers(result)
            recording = torch.ops.ddpm_fast.record.default(numbers, recorder.constants, inputs)
            replayed = torch.ops.ddpm_fast.replay.default(recording, inputs)
        except (_CannotRecord, RuntimeError):
            return result, None
        return result, recording if _are_same(replayed, result) else None


def _are_same(x: Tensor, y: Tensor) -> bool:
    """What was done without operators, with NumPy say, shows here."""
    same = (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    return same and (torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True))


def is_watched() -> bool:
    """Whether something is to see each operator as it is called: torch's tracing or its profiler,
    or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_plain(x: Tensor) -> bool:
    """Whether it is a tensor on the CPU, and no other thing of a class of its own."""
    is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and not is_wrapper


_NEW, _SEEN = object(), object()


class Recordings:
    """Of one function, for inputs of any form; those that were not used for longest are dropped.

    What comes again is recorded, by one call and a replay that must be the same; once a call took
    less than LONGEST, since Python's share of more is not worth that. Copies and pickles begin
    without any.
    """

    def __init__(self) -> None:
        # By form: None, where it cannot be recorded or someone is at it; _SEEN, where it is to be;
        # or its recording.
        self._made: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def _take(self, form: Any) -> tuple[Any, bool]:
        """What is known of a form, and whether to say more of it, which the caller then must."""
        dropped = []  # freed without the lock, since that may run code of any kind
        with self._lock:
            is_new = form not in self._made
            state = self._made.setdefault(form, None)
            if state is _SEEN:
                self._made[form] = None
            self._made.move_to_end(form)
            while len(self._made) > MOST:
                dropped.append(self._made.popitem(last=False))
        return state, is_new or state is _SEEN

    def _put(self, form: Any, state: Any) -> None:
        with self._lock:
            dropped = self._made.pop(form, None)
            if state is not _NEW:
                self._made[form] = state
        del dropped  # see above

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), without gradients.

        It must call the same operators whatever the inputs hold, and read them by operators alone;
        of what else they read, tensors are read again in each replay, numbers are not.
        """
        form = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        state, is_ours = self._take(form)
        if is_ours:
            return self._first_calls(function, inputs, form, state is _SEEN)
        if state is not None:
            try:
                return torch.ops.ddpm_fast.replay.default(state, inputs)
            except RuntimeError:
                pass  # no memory, say: the function says it in the operators' own words
        return function(*inputs)

    def _first_calls(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], form: Any, is_seen: bool
    ) -> Tensor:
        """Those of which the time is taken, and then the one that is recorded."""
        state = _SEEN if is_seen else _NEW  # after an interrupt
        try:
            if is_seen:
                result, state = _record(function, inputs)
            else:
                began = time.perf_counter()
                result = function(*inputs)
                state = _SEEN if time.perf_counter() - began < LONGEST else _NEW
        finally:
            self._put(form, state)
        return result
