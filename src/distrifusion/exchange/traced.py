"""Messages with the times at which posting them and waiting for them began and ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distrifusion.exchange.transport import Message, Pending, Transport

# What a clock gives for a moment, to be turned into a time later: on a GPU the moment has not come yet.
Mark = Any


class Noted(NamedTuple):
    """One post, or one wait for what was posted.

    Attributes:
        what: "post" or "wait".
        kind: of the values: "kv", "halo", "norm", "parcel" (halos and statistics of several layers), "hidden", "flow",
            "sum", "part" or "exit".
        name: of the value, as the exchange names it.
        peers: ranks that it went to or came from.
        sent, received: bytes of the messages.
    """

    what: str
    kind: str
    name: str
    start: Mark
    end: Mark
    peers: tuple[int, ...]
    sent: int
    received: int


class TracedTransport:
    """Another transport's messages, every post and every wait of which is noted.

    Args:
        transport: carries the messages.
        posting: kind and name of what is being posted.
        now: marks a moment.
        note: takes what was noted.
    """

    def __init__(
        self,
        transport: Transport,
        posting: Callable[[], tuple[str, str]],
        now: Callable[[], Mark],
        note: Callable[[Noted], None],
    ) -> None:
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.now = now
        self.note = note
        self._transport = transport
        self._posting = posting

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        start = self.now()
        pending = self._transport.post(sends, receives)
        end = self.now()
        kind, name = self._posting()
        peers = tuple(sorted({message.peer for message in (*sends, *receives)}))
        sent, received = (sum(message.tensor.nbytes for message in side) for side in (sends, receives))
        posted = Noted("post", str(kind), name, start, end, peers, sent, received)
        self.note(posted)
        return _TracedPending(pending, posted, self)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Every rank calls it."""
        return self._transport.broadcast(value)


class _TracedPending:
    """Messages under way, whose wait is noted under the name that they were posted by."""

    def __init__(self, pending: Pending, posted: Noted, transport: TracedTransport) -> None:
        self._pending = pending
        self._posted = posted
        self._transport = transport

    def wait(self) -> None:
        start = self._transport.now()
        self._pending.wait()
        end = self._transport.now()
        self._transport.note(self._posted._replace(what="wait", start=start, end=end))
