"""Captures a call on CPU: its operations below autograd, and its messages, as they come."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from distrifusion.exchange.transport import Message, Pending, Transport
from distrifusion.nested import map_tensors
from distrifusion.tape.replaying import replayed
from distrifusion.tape.shortening import NEEDS_GEOMETRY
from distrifusion.tape.steps import Geometry, Record, Root, Step, listed, mutated_by

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What hands a tensor's values to code whose results nobody could note.
_TO_THE_HOST = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__}


class TapeBackend:
    """Captures calls on CPU. Between two replays nothing is held but what the call found made."""

    captures_first = True

    def __init__(self) -> None:
        self.tape: Tape | None = None

    def carrying(self, transport: Transport) -> Transport:
        """A transport whose messages are part of what is captured."""
        return _TapedTransport(transport, self)

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Do some work once and note it; its result, and what does the same again and puts its result there.

        Raises:
            RuntimeError: if the work decides by a tensor's values.
        """
        tape = self.tape = Tape()
        try:
            with _no_search_for_garbage():
                with _ValuesKept(), tape:
                    result = work()
                outputs: list[torch.Tensor] = []
                map_tensors(result, outputs.append)
                return result, tape.replay_into(outputs)
        finally:
            self.tape = None


class Tape(TorchDispatchMode):
    """Notes operations below autograd while it is entered.

    A value is a place in one list. Tensors that were there before (weights, kept values, arguments) and views of them
    stay in their places; those that an operation makes are made anew in every replay, and let go after their last use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self._place_of = WeakTensorKeyDictionary()
        self._roots_before: dict[int, Root] = {}
        self._storage_of: dict[Root, int] = {}
        self._num_roots = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _decides(func, args):
            raise RuntimeError(f"{func} waits for values")
        if func is torch.ops.aten.lift_fresh.default and args[0] not in self._place_of:
            # A tensor of numbers that the host has just written, which later operations may change.
            return self._operate(torch.ops.aten.clone.default, (args[0].clone(),), {})
        kwargs = kwargs or {}
        if func.is_view and not any(self._is_made(argument) for argument in (*args, *kwargs.values())):
            result = func(*args, **kwargs)
            for view in [result] if isinstance(result, torch.Tensor) else result:
                self._place(view)
            return result
        return self._operate(func, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and being kept from it costs time in every operation

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do something that is no operation on tensors, now and in every replay.

        Arguments are tensors, lists of them, what `do` gave before, and anything that never changes.
        """
        values = self.record.values
        with self._unseen():
            result = function(*(values[a.place] if isinstance(a, Given) else a for a in arguments))
        places = tuple(self._place(argument) for argument in arguments)
        for place in places:
            self.record.pinned |= self.record.roots.get(place, frozenset())
        given = Given(self._new_place(result, ()))
        self.record.steps.append(Step(function, places, given.place))
        return given

    def replay_into(self, outputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        """What does everything noted again, and copies its results into those of the first time."""
        return replayed(self.record, [(self._place(output), output) for output in outputs])

    def _operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        places = tuple([self._place(argument) for argument in args])
        result = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:  # a tensor gets another shape where it is
            self.record.pinned |= self.record.roots_of(places)
        positions, names = mutated_by(func)
        mutates = tuple([places[i] for i in positions if i < len(places)])
        if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            by_name = {name: self._place(value) for name, value in kwargs.items()}
            mutates += tuple([by_name[name] for name in names if name in by_name])
            places += tuple(by_name.values())
            function = _with_keywords(func, len(args), tuple(kwargs))
            step = Step(function, places, self._write(result, places), mutates=mutates)
        else:
            function = partial(func, **kwargs) if kwargs else func
            step = Step(function, places, self._write(result, places), func, kwargs, mutates)
            if step.is_view or func in NEEDS_GEOMETRY:
                self._note_geometry(step, args, result)
        self.record.steps.append(step)
        return result

    def _note_geometry(self, step: Step, args: Sequence[Any], result: Any) -> None:
        """Where what is to be shortened lies: of other steps nobody asks."""
        geometry, made = self.record.geometry, step.write
        written = zip(made, result, strict=True) if isinstance(made, tuple) else ((made, result),)
        for place, tensor in (*zip(step.places, args, strict=True), *written):
            if isinstance(tensor, torch.Tensor) and place is not None and place not in geometry:
                geometry[place] = Geometry.of(tensor)

    def _write(self, result: Any, places: tuple[int, ...]) -> int | tuple[int | None, ...] | None:
        """Places for what a step made out of what is in places."""
        if isinstance(result, (tuple, list)):
            return tuple(self._write_one(one, places) for one in result)
        return self._write_one(result, places)

    def _write_one(self, result: Any, places: tuple[int, ...]) -> int | None:
        """None for numbers, and for what has a place already, as the result of an operation in place has."""
        is_new = isinstance(result, torch.Tensor) and result not in self._place_of
        return self._new_place(result, places) if is_new else None

    def _new_place(self, value: Any, places: tuple[int, ...]) -> int:
        """A place that a step writes which reads these places."""
        record, is_tensor = self.record, isinstance(value, torch.Tensor)
        place = record.add(None if is_tensor else value)
        record.made.add(place)
        if is_tensor:
            record.roots[place] = frozenset((self._root_of(value, places),))
            self._place_of[value] = place
        return place

    def _root_of(self, made: torch.Tensor, places: tuple[int, ...]) -> Root:
        """The storage of what a step made: one that it read, or a new one."""
        storage = made.untyped_storage()._cdata
        for place in places:
            for root in self.record.roots.get(place, ()):
                if self._storage_of[root] == storage:
                    return root
        self._num_roots += 1
        self._storage_of[self._num_roots] = storage
        return self._num_roots

    def _place(self, value: Any) -> int:
        """Where a value is, or stays from now on; a list with tensors is put together by a step of its own."""
        if isinstance(value, Given):
            return value.place
        if isinstance(value, torch.Tensor):
            place = self._place_of.get(value)
            return self._place_before(value) if place is None else place
        if isinstance(value, (tuple, list)) and any(isinstance(one, torch.Tensor) for one in value):
            places = tuple(self._place(one) for one in value)
            place = self.record.add(None)
            self.record.made.add(place)
            self.record.roots[place] = frozenset().union(*(self.record.roots.get(p, frozenset()) for p in places))
            self.record.steps.append(Step(listed, places, place))
            return place
        return self.record.add(value)

    def _place_before(self, value: torch.Tensor) -> int:
        """A place for a tensor that was there before, or a view of one."""
        place = self._place_of[value] = self.record.add(value)
        storage = value.untyped_storage()._cdata
        root = self._roots_before.get(storage)
        if root is None:
            self._num_roots += 1
            root = self._roots_before[storage] = self._num_roots
            self._storage_of[root] = storage
        self.record.roots[place] = frozenset((root,))
        return place

    def _is_made(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and self._place_of.get(value) in self.record.made

    @staticmethod
    @contextmanager
    def _unseen() -> Iterator[None]:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            yield


@contextmanager
def _no_search_for_garbage() -> Iterator[None]:
    """What is noted is many small objects, which would have Python search all objects for garbage, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Given(NamedTuple):
    """What a step of no operation gave, for the steps after it.

    Attributes:
        place: where it is.
    """

    place: int


class _ValuesKept(TorchFunctionMode):
    """Refuses what takes values out of tensors past every operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_THE_HOST:
            raise RuntimeError(f"Tensor.{func.__name__} waits for values")
        return func(*args, **(kwargs or {}))


class _TapedTransport:
    """Another transport's messages, noted while a call is captured."""

    def __init__(self, transport: Transport, backend: TapeBackend) -> None:
        self.rank, self.world_size = transport.rank, transport.world_size
        self.broadcast = transport.broadcast
        self._transport = transport
        self._backend = backend

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        tape = self._backend.tape
        if tape is None:
            return self._transport.post(sends, receives)
        addresses = [[(message.peer, message.tag) for message in messages] for messages in (sends, receives)]
        post = partial(_post, self._transport, *addresses)
        tensors = ([message.tensor for message in messages] for messages in (sends, receives))
        return _TapedPending(self._backend, tape, tape.do(post, *tensors))


class _TapedPending:
    """Messages of one post, for which the captured call waits."""

    def __init__(self, backend: TapeBackend, tape: Tape, pending: Given) -> None:
        self._backend = backend
        self._tape = tape
        self._pending = pending

    def wait(self) -> None:
        if self._backend.tape is not self._tape:
            raise RuntimeError("a message of this call is waited for after it")
        self._tape.do(_wait, self._pending)


Addresses = list[tuple[int, int]]


def _post(transport: Transport, to: Addresses, of: Addresses, sent: list[Any], received: list[Any]) -> Pending:
    return transport.post(_messages(to, sent), _messages(of, received))


def _messages(addresses: Addresses, tensors: Sequence[torch.Tensor]) -> list[Message]:
    return [Message(peer, tensor, tag) for (peer, tag), tensor in zip(addresses, tensors, strict=True)]


def _wait(pending: Pending) -> None:
    pending.wait()


def _with_keywords(func: Any, count: int, names: tuple[str, ...]) -> Callable[..., Any]:
    """An operation that has so many arguments without a name and then those of these names."""

    def named(*values: Any) -> Any:
        return func(*values[:count], **dict(zip(names, values[count:], strict=True)))

    return named


def _decides(func: Any, arguments: Sequence[Any]) -> bool:
    """Whether the host has to know values before it can go on."""
    if func is torch.ops.aten.index.Tensor:  # by numbers it gives as much as there are; by a mask as much as is set
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1])
    return not _BY_VALUE.isdisjoint(func.tags)
