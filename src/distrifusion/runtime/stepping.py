"""A worker's side of a running call: the progress bar and the step callback of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from distrifusion.runtime import randomness
from distrifusion.runtime.board import OUTSIDE, Board
from distrifusion.runtime.timing import StepClock
from distrifusion.runtime.wire import (
    BarClosed,
    BarMoved,
    BarOpened,
    CallbackRaised,
    Generators,
    Line,
    StepAnswer,
    StepEnded,
    pack,
    unpack,
)


class RelayedBar:
    """Stands in for diffusers' progress bar: rank 0 tells the caller, every rank notes that its loop runs."""

    def __init__(self, line: Line, rank: int, board: Board) -> None:
        self._line = line
        self._rank = rank
        self._board = board
        self._items: Iterable[Any] = ()

    def __call__(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> RelayedBar:
        """What `pipe.progress_bar(...)` calls: a bar over `iterable`, or of `total` steps."""
        self._items = () if iterable is None else iterable
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        self._board.write(self._rank, 0)
        self._tell(BarOpened(total))
        return self

    def __enter__(self) -> RelayedBar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an error the board keeps the step it was raised in.
        if error is None:
            self.close()

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()
        self.close()

    def update(self, n: float = 1) -> None:
        """Move the bar on."""
        self._tell(BarMoved(n))

    def close(self) -> None:
        """End the bar."""
        self._board.write(self._rank, OUTSIDE)
        self._tell(BarClosed())

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Taken and not shown: the caller's bar shows steps."""

    set_description = set_postfix

    def _tell(self, message: object) -> None:
        if self._rank == 0:
            self._line.send(message)


@dataclass
class StepEnd:
    """The `callback_on_step_end` that a worker gives to its pipeline.

    Every rank calls it after every step. It notes the step, and if the caller has a callback it waits until the
    caller has run it, so that the changes are the same on every rank; random states go with the step and come back.

    Attributes:
        call: id of the running call.
        serve: answers the caller's requests until the message that ends the step.
        relayed: the caller has a callback.
    """

    line: Line
    call: int
    rank: int
    board: Board
    device: torch.device
    generators: Generators
    clock: StepClock
    serve: Callable[[int], StepAnswer]
    relayed: bool

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any] | Any:
        self.clock.step_ended(last=step + 1 == getattr(pipe, "num_timesteps", None))
        answer = self._answer(step, timestep, tensors) if self.relayed else {}
        # Only now is the step over: an error in the exchange above belongs to it.
        self.board.write(self.rank, step + 1)
        return answer

    def _answer(self, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        if self.rank == 0:
            states = randomness.capture(self.device, self.generators)
            self.line.send(StepEnded(step, pack((timestep, tensors, states))[0]))
        answer = self.serve(self.call)
        if answer.payload is None:
            raise CallbackRaised("the caller's callback raised")
        in_place, returned, states = unpack(answer.payload, self.device)[0]
        randomness.restore(states, self.device, self.generators)
        for name, changed in in_place.items():
            tensors[name].copy_(changed)
        if not isinstance(returned, dict):
            return returned
        return {name: tensors[name] if value is Unchanged else value for name, value in returned.items()}


class Unchanged:
    """Stands in an answer for a tensor that the callback gave back as it was."""
