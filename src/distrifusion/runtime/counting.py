"""Exchanges counted as they begin, so that one can say which rank came how far when a call does not go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distrifusion.exchange.transport import Message, Pending, Transport


class CountedTransport:
    """Another transport's messages; `count` is called before each exchange."""

    def __init__(self, transport: Transport, count: Callable[[], None]) -> None:
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.can_be_captured = getattr(transport, "can_be_captured", False)
        self._transport = transport
        self._count = count

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self._count()
        return self._transport.post(sends, receives)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Every rank calls it."""
        return self._transport.broadcast(value)
