"""Two processes that send each other messages the way ranks do, with a limit on every wait.

`python -m distrifusion.doctor.round_trip` is one of them; `measure` starts both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distrifusion.doctor.rank_processes import run_ranks
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.transport import Message, ProcessGroupTransport, Transport

_SMALL, _LARGE = 1, 4 << 20  # fp32 numbers: 4 bytes, 16 MiB
_SMALL_TRIPS, _LARGE_TRIPS = 200, 8
_TAG = 0


@dataclass(frozen=True)
class Link:
    """How fast two ranks exchange.

    Attributes:
        way: what carries the messages, as a reader would say it.
        microseconds: a message of 4 bytes and its answer, median.
        gigabytes_per_second: one way, messages of 16 MiB, median.
    """

    way: str
    microseconds: float
    gigabytes_per_second: float


def measure(backend: str, limit: float) -> tuple[Link, ...]:
    """Start two processes and let them measure.

    Args:
        backend: "gloo" between CPU processes, or "nccl" between the GPUs 0 and 1.
        limit: seconds for all of it, their start included.

    Raises:
        RoundTripError: if one fails, or the limit passes.
    """
    answer = run_ranks("distrifusion.doctor.round_trip", 2, [backend], limit)
    return tuple(Link(**row) for row in json.loads(answer))


def _rank(backend: str, meeting: str, rank: int, limit: float) -> list[Link]:
    """One of the two processes."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    name = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    wait = timedelta(seconds=limit)
    dist.init_process_group(name, init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=wait)
    assert dist.group.WORLD is not None
    messages: Transport = ProcessGroupTransport()
    ways = {f"{backend} messages": messages}
    best = transport_of(dist.group.WORLD, device)
    if not isinstance(best, ProcessGroupTransport):
        ways["shared memory"] = best
    links = [Link(way, *_measured(transport, device)) for way, transport in ways.items()]
    dist.destroy_process_group()
    return links


def _measured(transport: Transport, device: torch.device) -> tuple[float, float]:
    small = _seconds(transport, torch.zeros(_SMALL, device=device), _SMALL_TRIPS)
    large = torch.zeros(_LARGE, device=device)
    seconds = _seconds(transport, large, _LARGE_TRIPS)
    return small * 1e6, 2 * large.numel() * large.element_size() / seconds / 1e9


def _seconds(transport: Transport, tensor: torch.Tensor, num_trips: int) -> float:
    """Median seconds of a message there and one back; the first tenth warms up."""
    peer = 1 - transport.rank
    message = [Message(peer, tensor, _TAG)]
    times = []
    for _ in range(num_trips + num_trips // 10 + 1):
        start = time.perf_counter()
        if transport.rank == 0:
            transport.post(message, []).wait()
            transport.post([], message).wait()
        else:
            transport.post([], message).wait()
            transport.post(message, []).wait()
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[-num_trips:])


def main() -> None:
    """Be one of the two processes; rank 0 prints what it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("gloo", "nccl"))
    parser.add_argument("meeting", help="a file that both can write")
    parser.add_argument("rank", type=int, choices=(0, 1))
    parser.add_argument("limit", type=float, help="seconds for every wait")
    words = parser.parse_args()
    links = _rank(words.backend, words.meeting, words.rank, words.limit)
    if words.rank == 0:
        print(json.dumps([asdict(link) for link in links]))


if __name__ == "__main__":
    main()
