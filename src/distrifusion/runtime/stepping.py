"""What a pipeline's denoising loop runs into after every step: the progress bar and the step callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from distrifusion.runtime import randomness
from distrifusion.runtime.cancelling import Boundaries
from distrifusion.runtime.line import Line
from distrifusion.runtime.timing import StepClock
from distrifusion.runtime.wire import (
    BarClosed,
    BarMoved,
    BarOpened,
    CallbackRaised,
    Generators,
    StepAnswer,
    StepEnded,
    pack,
    unpack,
)


class WatchedBars:
    """Stands in for a pipeline's `progress_bar`: the bar of `draw` is shown, and `boundaries` hears of every step.

    Every loop of every diffusers pipeline moves a bar, also those that have no callback.
    """

    def __init__(self, draw: Callable[..., Any], boundaries: Boundaries) -> None:
        self._draw = draw
        self._boundaries = boundaries

    def __call__(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> WatchedBar:
        self._boundaries.loop_begins()
        return WatchedBar(self._draw(iterable=iterable, total=total), self._boundaries)


class WatchedBar:
    """One bar, used as diffusers uses it: within `with`, iterated over, or moved and closed by hand."""

    def __init__(self, bar: Any, boundaries: Boundaries) -> None:
        self._bar = bar
        self._boundaries = boundaries

    def __enter__(self) -> WatchedBar:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an error the boundaries keep the step it was raised in.
        if error is None:
            self._boundaries.loop_ends()
        self._bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        for item in self._bar:
            yield item
            self._boundaries.bar_moves()
        self._boundaries.loop_ends()

    def update(self, n: float = 1) -> None:
        """Move the bar on."""
        self._bar.update(n)
        self._boundaries.bar_moves()

    def close(self) -> None:
        """End the bar and the loop."""
        self._boundaries.loop_ends()
        self._bar.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


class RelayedBar:
    """Rank 0's bar, which the caller draws; the other ranks have one that nobody draws."""

    def __init__(self, line: Line, rank: int, iterable: Iterable[Any] | None, total: int | None) -> None:
        self._line = line
        self._rank = rank
        self._items: Iterable[Any] = () if iterable is None else iterable
        self._tell(BarOpened(getattr(iterable, "__len__", lambda: None)() if total is None else total))

    def __enter__(self) -> RelayedBar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
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

    Every rank calls it after every step. If the caller has a callback it waits until the caller has run it, so that
    the changes are the same on every rank; random states go with the step and come back.

    Attributes:
        request: id of the request that is the running call.
        serve: answers the caller's requests until the message that ends the step.
        relayed: the caller has a callback.
    """

    line: Line
    request: int
    rank: int
    boundaries: Boundaries
    device: torch.device
    generators: Generators
    clock: StepClock
    serve: Callable[[int], StepAnswer]
    relayed: bool

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any] | Any:
        self.clock.step_ended(step + 1 == getattr(pipe, "num_timesteps", None), tensors)
        answer = self._answer(step, timestep, tensors) if self.relayed else {}
        # Only now is the step over: an error in the exchange above belongs to it.
        self.boundaries.step_ends(step)
        return answer

    def _answer(self, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        if self.rank == 0:
            states = randomness.capture(self.device, self.generators)
            self.line.send(StepEnded(step, pack((timestep, tensors, states))[0]))
        answer = self.serve(self.request)
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
