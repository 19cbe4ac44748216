"""Exchanges counted as they begin, so that one can say which rank came how far when a call does not go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distrifusion.exchange.transport import Message, Pending, ProcessGroupTransport


class CountedTransport(ProcessGroupTransport):
    """The default process group's messages; `count` is called before each exchange."""

    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__()
        self._count = count

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self._count()
        return super().post(sends, receives)
