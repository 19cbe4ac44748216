"""Messages between processes of one machine through shared memory.

A byte stream for every directed pair of ranks: a ring that one side fills and the other empties, with a counter of each
side's bytes. Nobody is woken and no thread of a library takes part: a rank that waits looks at counters, which costs
microseconds where a message over a socket costs two computing processes milliseconds.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distrifusion.errors import RankFailed, StepTimeout
from distrifusion.exchange.transport import Message

_LINE = 64  # bytes of a cache line: the two counters of a ring are on different ones
_HEAD = 2 * _LINE
_UNIT = 16  # all counts are multiples of it, so what stands before a message, its tag and its length, never wraps
_RING_BYTES = 8 << 20
_ALL_RINGS_BYTES = 512 << 20
_SMALLEST_RING = 1 << 18
# Seconds for which a wait looks without pause where every rank has a core, and seconds between later looks.
_EAGER = 0.002
_PAUSE = 1e-4
# Seconds of waiting between two looks at whether the peers live.
_LOOK = 0.2


class Ring:
    """A one-way byte stream in shared memory: a counter of the bytes written, one of those read, and the bytes."""

    def __init__(self, memory: memoryview) -> None:
        head = memory[:_HEAD].cast("q")
        self._written, self._read = head[: _LINE // 8], head[_LINE // 8 :]
        self._words = memory[_HEAD:].cast("q")
        self._data = torch.frombuffer(memory[_HEAD:], dtype=torch.uint8)
        self._capacity = self._data.numel()

    def put_head(self, tag: int, length: int) -> bool:
        """Announce a message; False if there is no room now."""
        if self._free() < _UNIT:
            return False
        at = self._written[0] % self._capacity // 8
        self._words[at], self._words[at + 1] = tag, length
        self._advance(self._written, _UNIT)
        return True

    def take_head(self) -> tuple[int, int] | None:
        """Tag and length of the next message; None if nothing is there."""
        if self._filled() < _UNIT:
            return None
        at = self._read[0] % self._capacity // 8
        head = self._words[at], self._words[at + 1]
        self._advance(self._read, _UNIT)
        return head

    def put(self, source: torch.Tensor) -> int:
        """Put in as much of a message's bytes as there is room for; returns how many."""
        count, step = _part(source.numel(), self._free())
        at = self._written[0] % self._capacity
        first = min(count, self._capacity - at)
        self._data[at : at + first].copy_(source[:first])
        if count > first:
            self._data[: count - first].copy_(source[first:count])
        self._advance(self._written, step)
        return count

    def take(self, target: torch.Tensor) -> int:
        """Take out as much of a message's bytes as has come; returns how many."""
        count, step = _part(target.numel(), self._filled())
        at = self._read[0] % self._capacity
        first = min(count, self._capacity - at)
        target[:first].copy_(self._data[at : at + first])
        if count > first:
            target[first:count].copy_(self._data[: count - first])
        self._advance(self._read, step)
        return count

    def _free(self) -> int:
        return self._capacity - (self._written[0] - self._read[0])

    def _filled(self) -> int:
        filled = self._written[0] - self._read[0]
        _fence()
        return filled

    @staticmethod
    def _advance(counter: memoryview, count: int) -> None:
        _fence()
        counter[0] += count


def _part(wanted: int, available: int) -> tuple[int, int]:
    """Bytes of a message that can move now, and by how much the counter moves: the last part fills its unit."""
    padded = -(-wanted // _UNIT) * _UNIT
    return (wanted, padded) if available >= padded else (available, available)


_lock = threading.Lock()


def _fence() -> None:
    """Order what was read and written before against what comes after, on processors that do not do so themselves."""
    with _lock:
        pass


@dataclass(eq=False)
class _Transfer:
    """A message under way: its bytes, how many have moved, and who gets them if nobody had asked for them yet."""

    peer: int
    tag: int
    data: torch.Tensor
    moved: int = 0
    announced: bool = False
    heir: _Transfer | None = None

    @property
    def done(self) -> bool:
        return self.announced and self.moved == self.data.numel()


class _Outgoing:
    """Messages to one rank, in the order in which they were posted."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._queue: deque[_Transfer] = deque()

    def post(self, transfer: _Transfer) -> None:
        self._queue.append(transfer)

    def progress(self) -> None:
        while self._queue:
            transfer = self._queue[0]
            if not transfer.announced:
                transfer.announced = self._ring.put_head(transfer.tag, transfer.data.numel())
            if transfer.announced:
                transfer.moved += self._ring.put(transfer.data[transfer.moved :])
            if not transfer.done:
                return
            self._queue.popleft()


class _Incoming:
    """Messages from one rank: those asked for go where they shall, others are kept until somebody asks."""

    def __init__(self, ring: Ring, rank: int, peer: int) -> None:
        self._ring = ring
        self._rank = rank
        self._peer = peer
        self._asked: defaultdict[int, deque[_Transfer]] = defaultdict(deque)
        self._early: defaultdict[int, deque[_Transfer]] = defaultdict(deque)
        self._current: _Transfer | None = None

    def post(self, transfer: _Transfer) -> None:
        if not self._early[transfer.tag]:
            self._asked[transfer.tag].append(transfer)
            return
        early = self._early[transfer.tag].popleft()
        self._check(transfer, early.data.numel())
        early.heir = transfer
        if early.done:
            _inherit(early)

    def progress(self) -> None:
        while True:
            if self._current is None:
                head = self._ring.take_head()
                if head is None:
                    return
                self._current = self._receiver(*head)
            current = self._current
            current.moved += self._ring.take(current.data[current.moved :])
            if not current.done:
                return
            _inherit(current)
            self._current = None

    def _receiver(self, tag: int, length: int) -> _Transfer:
        if self._asked[tag]:
            transfer = self._asked[tag].popleft()
            self._check(transfer, length)
        else:
            transfer = _Transfer(self._peer, tag, torch.empty(length, dtype=torch.uint8))
            self._early[tag].append(transfer)
        transfer.announced = True
        return transfer

    def _check(self, transfer: _Transfer, length: int) -> None:
        if transfer.data.numel() != length:
            raise RankFailed(
                f"rank {self._peer} sent {length} bytes where rank {self._rank} expects {transfer.data.numel()}: "
                "the ranks were called with different arguments",
                rank=self._peer,
            )


def _inherit(transfer: _Transfer) -> None:
    heir = transfer.heir
    if heir is not None:
        heir.data.copy_(transfer.data)
        heir.moved, heir.announced = transfer.moved, True


class SharedMemoryTransport:
    """Messages between the ranks of one machine.

    Args:
        rank, world_size: this rank's place.
        memory: zeros that all ranks share, `memory_bytes(world_size)` or less; a message larger than its ring goes
            in parts.
        limit: seconds that a wait may take.
        lost: by rank, whether its process has ended; never asked of this rank.
        broadcast: gives rank 0's value to every rank.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        memory: mmap.mmap | memoryview,
        limit: float,
        lost: Callable[[int], bool] = lambda peer: False,
        broadcast: Callable[[Any], Any] | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._limit = limit
        self._lost = lost
        self._broadcast = broadcast
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._eager = _EAGER if cores >= world_size else 0.0
        view = memoryview(memory)
        size = len(view) // world_size**2 // _LINE * _LINE

        def ring(source: int, target: int) -> Ring:
            start = (source * world_size + target) * size
            return Ring(view[start : start + size])

        peers = [peer for peer in range(world_size) if peer != rank]
        self._outgoing = {peer: _Outgoing(ring(rank, peer)) for peer in peers}
        self._incoming = {peer: _Incoming(ring(peer, rank), rank, peer) for peer in peers}

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Pending:
        """Start messages; what has room goes at once, the rest whenever this rank posts or waits."""
        going = [_Transfer(m.peer, m.tag, _bytes_of(m.tensor)) for m in sends]
        coming = [_Transfer(m.peer, m.tag, _bytes_of(m.tensor)) for m in receives]
        for transfer in coming:
            self._incoming[transfer.peer].post(transfer)
        for transfer in going:
            self._outgoing[transfer.peer].post(transfer)
        self._progress()
        return _Pending(self, [*coming, *going])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Every rank calls it."""
        assert self._broadcast is not None, "this transport was made without a broadcast"
        return self._broadcast(value)

    def complete(self, transfers: Sequence[_Transfer]) -> None:
        """Wait until all of some messages have moved."""
        start = looked = time.monotonic()
        while True:
            self._progress()
            open_ones = [transfer for transfer in transfers if not transfer.done]
            if not open_ones:
                return
            now = time.monotonic()
            if now - looked > _LOOK:
                looked = now
                self._look_for_lost(open_ones)
            if now - start > self._limit:
                peer = open_ones[0].peer
                raise StepTimeout(
                    f"rank {self.rank} had no answer from rank {peer} in {self._limit:g} s", rank=self.rank
                )
            if now - start < self._eager:
                os.sched_yield()
            else:
                time.sleep(_PAUSE)

    def _progress(self) -> None:
        for outgoing in self._outgoing.values():
            outgoing.progress()
        for incoming in self._incoming.values():
            incoming.progress()

    def _look_for_lost(self, transfers: Sequence[_Transfer]) -> None:
        lost = [peer for peer in sorted({transfer.peer for transfer in transfers}) if self._lost(peer)]
        if not lost:
            return
        self._progress()  # its last bytes may have come since
        if any(transfer.peer in lost and not transfer.done for transfer in transfers):
            raise RankFailed(f"rank {self.rank} waits for rank {lost[0]}, whose process has ended", rank=lost[0])


def memory_bytes(world_size: int) -> int:
    """Shared bytes for the rings of a world, half a gigabyte unless there are many ranks; a page counts once used."""
    return world_size**2 * max(_SMALLEST_RING, min(_RING_BYTES, _ALL_RINGS_BYTES // world_size**2))


class _Pending:
    """Messages of one post."""

    def __init__(self, transport: SharedMemoryTransport, transfers: list[_Transfer]) -> None:
        self._transport = transport
        self._transfers = transfers

    def wait(self) -> None:
        self._transport.complete(self._transfers)
        self._transfers = []


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
