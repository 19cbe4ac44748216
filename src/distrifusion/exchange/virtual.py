"""A world of virtual ranks: one thread each in this process, deterministic, for tests and measurements."""

from __future__ import annotations

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from distrifusion.errors import RankFailed, StepTimeout
from distrifusion.exchange.transport import Message

T = TypeVar("T")
_POLL = 0.05


class VirtualWorld:
    """`num_ranks` ranks as threads of this process; messages are copies handed over in memory.

    Args:
        num_ranks: at least 1.
        timeout: limit of every wait in seconds.
    """

    def __init__(self, num_ranks: int, timeout: float = 60.0) -> None:
        self.num_ranks = num_ranks
        self.timeout = timeout
        self.failed = threading.Event()
        self._boxes: dict[tuple[int, int, Any], queue.SimpleQueue[Any]] = defaultdict(queue.SimpleQueue)
        self._lock = threading.Lock()

    def box(self, source: int, target: int, tag: Any) -> queue.SimpleQueue[Any]:
        """The mailbox of one message: its directed pair, its tag and its number among those."""
        with self._lock:
            return self._boxes[source, target, tag]

    def run(self, work: Callable[[VirtualTransport], T]) -> list[T]:
        """Run `work(transport)` on every rank and return the results by rank.

        Raises:
            the error of the first rank that failed by itself; ranks that only waited for it are not reported.
        """
        self.failed.clear()
        results: list[Any] = [None] * self.num_ranks
        errors: dict[int, BaseException] = {}

        def body(rank: int) -> None:
            try:
                results[rank] = work(VirtualTransport(self, rank))
            except BaseException as error:  # handed to the caller below
                errors[rank] = error
                self.failed.set()

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        own = [error for error in errors.values() if not isinstance(error, RankFailed)]
        for error in own or errors.values():
            raise error
        return results

    def take(self, source: int, target: int, tag: Any) -> Any:
        """Wait for the one message of a mailbox."""
        box = self.box(source, target, tag)
        for _ in range(int(self.timeout / _POLL) + 1):
            try:
                value = box.get(timeout=_POLL)
                with self._lock:
                    del self._boxes[source, target, tag]
                return value
            except queue.Empty:
                if self.failed.is_set():
                    raise RankFailed(f"rank {target}: another virtual rank failed", rank=target) from None
        raise StepTimeout(f"rank {target}: no message {tag} from rank {source} in {self.timeout} s", rank=target)


class VirtualTransport:
    """One virtual rank's end of a VirtualWorld."""

    def __init__(self, world: VirtualWorld, rank: int) -> None:
        self.rank = rank
        self.world_size = world.num_ranks
        self.sent_bytes = 0
        self._world = world
        self._counts: Counter[Any] = Counter()

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Receives:
        for message in sends:
            self.sent_bytes += message.tensor.nbytes
            number = self._number("send", message.peer, message.tag)
            self._world.box(self.rank, message.peer, number).put(message.tensor.clone())
        return _Receives(self._world, self.rank, [(m, self._number("receive", m.peer, m.tag)) for m in receives])

    def broadcast(self, value: Any) -> Any:
        if self.rank:
            return self._world.take(0, self.rank, self._number("receive", 0, "broadcast"))
        for peer in range(1, self.world_size):
            self._world.box(0, peer, self._number("send", peer, "broadcast")).put(value)
        return value

    def _number(self, way: str, peer: int, tag: Any) -> tuple[Any, int]:
        """A message's tag and its number: messages of one tag meet in the order of their posts, not of the waits."""
        self._counts[way, peer, tag] += 1
        return tag, self._counts[way, peer, tag]


class _Receives:
    """Receives under way; `wait` copies what came."""

    def __init__(self, world: VirtualWorld, rank: int, receives: list[tuple[Message, Any]]) -> None:
        self._world = world
        self._rank = rank
        self._receives = receives

    def wait(self) -> None:
        for message, number in self._receives:
            value: torch.Tensor = self._world.take(message.peer, self._rank, number)
            if value.numel() != message.tensor.numel():
                raise RuntimeError(f"message {message.tag}: {value.shape} sent, {message.tensor.shape} expected")
            message.tensor.copy_(value.view_as(message.tensor))
        self._receives = []
