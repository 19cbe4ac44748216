"""Ranks of this machine at once: what messages of each size take by pair, what hides behind computing, who slows whom.

`python -m distrifusion.planner.company` is one rank; `measure_company` starts all. Messages are timed between kernels,
as ranks send them: both ways at once, by the transport that ranks use, each of them waiting for one that computes too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from distrifusion.doctor.rank_processes import run_ranks
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.transport import Message, Pending, ProcessGroupTransport, Transport

_SIZES = (4, 4 << 10, 64 << 10, 512 << 10, 4 << 20)  # bytes
_TRIPS = 60
_LARGE_TRIPS = 12
_LARGE = 512 << 10
_OVERLAPPED = 1 << 20
_ALONE_SECONDS = 0.25
_TURNS = 5  # alone and together, one after the other: a machine is not the same from second to second
_MOST_PAIRS = 28  # of eight devices; of more, the first ones stand for all
_TAG = 0
_CHANNELS, _GROUPS = 64, 32  # of the mixture that ranks compute at once

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Company:
    """What ranks are to each other.

    Attributes:
        way: what carries the messages, as a reader would say it.
        pairs: seconds by bytes of a message, which goes both ways, for pairs "0-1".
        overlap: share of the time of a message that computing meanwhile hides, 0 to 1.
        slower: factor by which a rank computes slower while all others compute, at least 1.
    """

    way: str
    pairs: Mapping[str, Points]
    overlap: float
    slower: float


def measure_company(backend: str, num_ranks: int, limit: float) -> Company:
    """Start ranks on this machine and let them measure.

    Args:
        backend: "gloo" between CPU processes, or "nccl" between the first GPUs.
        num_ranks: at least 2.
        limit: seconds for all of it.

    Raises:
        RoundTripError: if one fails, or the limit passes.
    """
    row = json.loads(run_ranks("distrifusion.planner.company", num_ranks, [backend, str(num_ranks)], limit))
    pairs = {pair: tuple((size, seconds) for size, seconds in points) for pair, points in row["pairs"].items()}
    return Company(row["way"], pairs, row["overlap"], row["slower"])


class _Rank:
    """One of the processes."""

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self._transport = transport
        self._device = device
        width = 32 if device.type == "cpu" else 256
        # Some tenths of a millisecond on a core: what a small band of a layer takes.
        self._x = torch.randn(1, width, 32, 32, device=device)
        self._kernel = torch.randn(width, width, 3, 3, device=device)
        self._rows = torch.randn(1, _CHANNELS, 128, 128, device=device)
        self._rows_kernel = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device)
        self._matrix = torch.randn(_CHANNELS, 4 * _CHANNELS, device=device)

    def compute(self) -> None:
        F.conv2d(self._x, self._kernel, padding=1)
        self._finish()

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def median(self, run: Callable[[], object], num_trips: int) -> float:
        """Median seconds; the first tenth warms up."""
        times = []
        for _ in range(num_trips + num_trips // 10 + 1):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times[-num_trips:])

    def _room(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, into = (torch.zeros(num_bytes // 4, device=self._device) for _ in range(2))
        return out, into

    def _post(self, peer: int, room: tuple[torch.Tensor, torch.Tensor]) -> Pending:
        return self._transport.post([Message(peer, room[0], _TAG)], [Message(peer, room[1], _TAG)])

    def messages(self, peer: int) -> Points:
        """What messages to and from a peer add to the kernels that they stand between."""
        points = []
        for size in _SIZES:
            room = self._room(size)

            def between(room: tuple[torch.Tensor, torch.Tensor] = room) -> None:
                self.compute()
                self._post(peer, room).wait()
                self._finish()

            num_trips = _TRIPS if size < _LARGE else _LARGE_TRIPS
            own = self.median(self.compute, num_trips)
            points.append((size, max(0.0, self.median(between, num_trips) - own)))
        return tuple(points)

    def overlap(self, peer: int) -> float:
        """The share of a message, or of the computing meanwhile if that is shorter, that costs nothing."""
        room = self._room(_OVERLAPPED)

        def message() -> None:
            self._post(peer, room).wait()
            self._finish()

        kernels = max(1, round(self.median(message, _LARGE_TRIPS) / self.median(self.compute, _TRIPS)))

        def computing() -> None:
            for _ in range(kernels):
                self.compute()

        def both() -> None:
            pending = self._post(peer, room)
            computing()
            pending.wait()
            self._finish()

        sent, computed, at_once = (self.median(run, _LARGE_TRIPS) for run in (message, computing, both))
        return min(1.0, max(0.0, (sent + computed - at_once) / min(sent, computed)))

    def whole(self) -> float:
        """Seconds of a mixture of kernels as a network runs them, on tensors that a core's own cache does not hold."""
        start, num = time.perf_counter(), 0
        while time.perf_counter() - start < _ALONE_SECONDS:
            x = F.silu(F.group_norm(self._rows, _GROUPS)) + self._rows
            x = F.conv2d(x, self._rows_kernel, padding=1)
            x.flatten(2).transpose(1, 2) @ self._matrix
            self._finish()
            num += 1
        return (time.perf_counter() - start) / num

    def slower(self, num_ranks: int) -> float:
        """By how much longer the first rank takes while the others compute; every rank must call it."""
        found = []
        for _ in range(_TURNS):
            alone = self.whole() if self._transport.rank == 0 else 1.0
            _from_all(None, num_ranks)  # nobody computes beside the first
            found.append(self.whole() / alone)
            _from_all(None, num_ranks)
        return max(1.0, statistics.median(found))


def _rank(backend: str, num_ranks: int, meeting: str, rank: int, limit: float) -> Company:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    name = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    wait = timedelta(seconds=limit)
    dist.init_process_group(name, init_method=f"file://{meeting}", rank=rank, world_size=num_ranks, timeout=wait)
    assert dist.group.WORLD is not None
    transport = transport_of(dist.group.WORLD, device)
    own = _Rank(transport, device)
    slower = own.slower(num_ranks)
    pairs: dict[str, Points] = {}
    overlap = 0.0
    for pair in _pairs(num_ranks):
        _from_all(None, num_ranks)
        points = own.messages(sum(pair) - rank) if rank in pair else ()
        if rank in pair and pair == (0, 1):
            overlap = own.overlap(1 - rank)
        pairs["{}-{}".format(*pair)] = _from_all(points, num_ranks)[pair[0]]
    dist.destroy_process_group()
    way = f"{backend} messages" if isinstance(transport, ProcessGroupTransport) else "shared memory"
    return Company(way, pairs, overlap, slower)


def _from_all(value: Points | None, num_ranks: int) -> list[Any]:
    """Every rank's value; whoever waits for it computes nothing."""
    values: list[Any] = [None] * num_ranks
    dist.all_gather_object(values, value)
    return values


def _pairs(num_ranks: int) -> Sequence[tuple[int, int]]:
    return list(combinations(range(num_ranks), 2))[:_MOST_PAIRS]


def main() -> None:
    """Be one of the ranks; rank 0 prints what it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("gloo", "nccl"))
    parser.add_argument("num_ranks", type=int)
    parser.add_argument("meeting", help="a file that all can write")
    parser.add_argument("rank", type=int)
    parser.add_argument("limit", type=float, help="seconds for every wait")
    words = parser.parse_args()
    company = _rank(words.backend, words.num_ranks, words.meeting, words.rank, words.limit)
    if words.rank == 0:
        print(json.dumps(asdict(company)))


if __name__ == "__main__":
    main()
