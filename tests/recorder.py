"""What stands for CUDA graphs on CPU: a call's operations as a list, bound to their tensors, and done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distrifusion.exchange.transport import Message, Pending, Transport

_READS_VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Recorder:
    """A backend of `Graphs`. A replay runs no code but the operations themselves, on the tensors of the capture.

    As on CUDA, whatever the host computed, chose or counted during the capture is what every replay gets. Operations
    that a graph cannot hold, because the host waits for values, are refused.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] | None = None

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Do some work once and record it."""
        steps: list[Callable[[], None]] = []
        self._steps = steps
        try:
            with _Operations(steps):
                result = work()
        finally:
            self._steps = None

        def replay() -> None:
            for step in steps:
                step()

        return result, replay

    def note(self, step: Callable[[], None]) -> None:
        """Do something that is no operation on tensors, and do it again in every replay, if a capture is under way."""
        if self._steps is None:
            step()
            return
        self._steps.append(step)
        with torch.utils._python_dispatch._disable_current_modes():
            step()


class RecordedTransport:
    """Another transport's messages, which are part of what is captured."""

    def __init__(self, transport: Transport, recorder: Recorder) -> None:
        self.rank, self.world_size = transport.rank, transport.world_size
        self.broadcast = transport.broadcast
        self._transport = transport
        self._recorder = recorder

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        pending = _Recorded(self._recorder)
        self._recorder.note(lambda: pending.under_way.append(self._transport.post(sends, receives)))
        return pending


class _Recorded:
    def __init__(self, recorder: Recorder) -> None:
        self.under_way: list[Pending] = []
        self._recorder = recorder

    def wait(self) -> None:
        self._recorder.note(lambda: self.under_way.pop().wait())


class _Operations(TorchDispatchMode):
    def __init__(self, steps: list[Callable[[], None]]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_VALUES:
            raise RuntimeError(f"{func} waits for values, which a graph cannot")
        result = func(*args, **(kwargs or {}))
        self._steps.append(lambda: _again(result, func(*args, **(kwargs or {}))))
        return result


def _again(then: Any, now: Any) -> None:
    """Put what an operation gives now where it was put then; views and operations in place are there already."""
    for place, tensor in zip(tree_leaves(then), tree_leaves(now), strict=True):
        if (
            isinstance(place, torch.Tensor)
            and place.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        ):
            place.copy_(tensor)
