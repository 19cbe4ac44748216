"""A call's operations on CPU, noted once and then done again without the model's Python: there, what a CUDA graph is.

Between two large kernels the processor forgets the interpreter and the model's objects, so that Python costs several
times what it does in a loop. A replay walks a flat list: an operation, where its arguments are, where its result goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from distrifusion.exchange.transport import Message, Pending, Transport
from distrifusion.nested import map_tensors

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What hands a tensor's values to code whose results nobody could note.
_TO_THE_HOST = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__}


class TapeBackend:
    """Captures calls on CPU. Between two replays nothing is held but what the call found made."""

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
            with _ValuesKept(), tape:
                result = work()
        finally:
            self.tape = None
        outputs: list[torch.Tensor] = []
        map_tensors(result, outputs.append)
        return result, tape.replay_into(outputs)


class _Step(NamedTuple):
    """One thing to do.

    Attributes:
        function: an operation, or what is no operation on tensors (a message).
        read: takes the arguments out of all values.
        places: where it does.
        write: where the result goes, one place for each of several results; None where nothing new comes.
    """

    function: Callable[..., Any]
    read: Callable[[list[Any]], Any]
    places: tuple[int, ...]
    write: int | tuple[int | None, ...] | None


class Tape(TorchDispatchMode):
    """Notes operations below autograd while it is entered.

    A value is a place in one list. Tensors that were there before (weights, kept values, arguments) and views of them
    stay in their places; those that an operation makes are made anew in every replay, and let go after their last use.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Any] = []
        self._made: set[int] = set()
        self._place_of = WeakTensorKeyDictionary()
        self._steps: list[_Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _decides(func, args):
            raise RuntimeError(f"{func} waits for values")
        if func is torch.ops.aten.lift_fresh.default and args[0] not in self._place_of:
            # A tensor of numbers that the host has just written, which later operations may change.
            return self._do(torch.ops.aten.clone.default, (args[0].clone(),))
        kwargs = kwargs or {}
        if func.is_view and not any(self._is_made(argument) for argument in (*args, *kwargs.values())):
            result = func(*args, **kwargs)
            for view in [result] if isinstance(result, torch.Tensor) else result:
                self._place(view)
            return result
        if not any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return self._do(partial(func, **kwargs) if kwargs else func, args)
        return self._do(_with_keywords(func, len(args), tuple(kwargs)), (*args, *kwargs.values()))

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do something that is no operation on tensors, now and in every replay.

        Arguments are tensors, lists of them, what `do` gave before, and anything that never changes.
        """
        with self._unseen():
            result = function(*(self._values[a.place] if isinstance(a, Given) else a for a in arguments))
        places = tuple(self._place(argument) for argument in arguments)
        given = Given(self._new_place(result))
        self._note(function, places, given.place)
        return given

    def replay_into(self, outputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        """What does everything noted again, and copies its results into those of the first time."""
        results = [(self._place(output), output) for output in outputs]
        kept = [None if place in self._made else value for place, value in enumerate(self._values)]
        steps = self._with_last_uses({place for place, _ in results})

        def replay() -> None:
            values: list[Any] = kept.copy()
            for function, read, write, spent in steps:
                made = function(*read(values))
                if type(write) is int:
                    values[write] = made
                elif write is not None:
                    for place, one in zip(write, made, strict=True):
                        if place is not None:
                            values[place] = one
                made = None  # or it would outlive its last use by one operation
                for place in spent:
                    values[place] = None
            for place, output in results:
                if values[place] is not output:
                    output.copy_(values[place])

        return replay

    def _do(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        places = tuple(self._place(argument) for argument in arguments)
        result = function(*arguments)
        self._note(function, places, self._write(result))
        return result

    def _note(self, function: Callable[..., Any], places: tuple[int, ...], write: Any) -> None:
        # One place alone is taken as a list of one, as arguments come in lists.
        of_few = slice(places[0], places[0] + 1) if places else slice(0)
        read = itemgetter(*places) if len(places) > 1 else itemgetter(of_few)
        self._steps.append(_Step(function, read, places, write))

    def _write(self, result: Any) -> int | tuple[int | None, ...] | None:
        """Places for what a step made."""
        return tuple(map(self._write_one, result)) if isinstance(result, (tuple, list)) else self._write_one(result)

    def _write_one(self, result: Any) -> int | None:
        """None for numbers, and for what has a place already, as the result of an operation in place has."""
        is_new = isinstance(result, torch.Tensor) and result not in self._place_of
        return self._new_place(result) if is_new else None

    def _new_place(self, value: Any) -> int:
        """A place that a step writes."""
        place = self._add(None if isinstance(value, torch.Tensor) else value)
        self._made.add(place)
        if isinstance(value, torch.Tensor):
            self._place_of[value] = place
        return place

    def _place(self, value: Any) -> int:
        """Where a value is, or stays from now on; a list with tensors is put together by a step of its own."""
        if isinstance(value, Given):
            return value.place
        if isinstance(value, torch.Tensor):
            place = self._place_of.get(value)
            if place is None:
                place = self._place_of[value] = self._add(value)
            return place
        if isinstance(value, (tuple, list)) and any(isinstance(one, torch.Tensor) for one in value):
            places = tuple(self._place(one) for one in value)
            place = self._add(None)
            self._made.add(place)
            self._note(_listed, places, place)
            return place
        return self._add(value)

    def _add(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _is_made(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and self._place_of.get(value) in self._made

    def _with_last_uses(self, outputs: set[int]) -> list[tuple[Any, Any, Any, tuple[int, ...]]]:
        """The steps, each with the places that nobody reads after it."""
        seen, steps = set(outputs), []
        for step in reversed(self._steps):
            written = step.write if isinstance(step.write, tuple) else (step.write,)
            touched = {place for place in (*step.places, *written) if place in self._made}
            steps.append((step.function, step.read, step.write, tuple(touched - seen)))
            seen |= touched
        return steps[::-1]

    @staticmethod
    @contextmanager
    def _unseen() -> Iterator[None]:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            yield


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


def _listed(*values: Any) -> list[Any]:
    return list(values)


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
