"""Which transport the ranks of a process group use: shared memory where all are on one machine, else messages."""

from __future__ import annotations

import mmap
import os
import select
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from distrifusion.exchange.shared_memory import SharedMemoryTransport, memory_bytes
from distrifusion.exchange.transport import ProcessGroupTransport, Transport

T = TypeVar("T")


def transport_of(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """The transport for tensors on `device` between the ranks of a group. Every rank calls it."""
    messages = ProcessGroupTransport(group)
    if device.type != "cpu" or messages.world_size == 1:
        return messages
    return _shared_memory(group, messages) or messages


@dataclass(frozen=True)
class _Place:
    """Where a rank lives: the running system, its process numbers, the process, and the memory it offers."""

    system: str
    pid: int
    memory: int | None


def _shared_memory(group: dist.ProcessGroup, messages: ProcessGroupTransport) -> SharedMemoryTransport | None:
    """Memory that rank 0 makes without a name, so that nothing is left behind; None unless all ranks can use it."""
    rank, world_size = messages.rank, messages.world_size
    own = _offer(memory_bytes(world_size)) if rank == 0 else None
    places = _from_all(_Place(running_system(), os.getpid(), own), group, world_size)
    opened = _open(places[0]) if len({place.system for place in places}) == 1 else None
    watched = _watch({peer: place.pid for peer, place in enumerate(places) if peer != rank}) if opened else None
    # Only now may rank 0 let go of its own handle.
    agreed = all(_from_all(watched is not None, group, world_size))
    if own is not None:
        os.close(own)
    if not agreed or opened is None or watched is None:
        return None
    limit = _limit_of(group)
    transport = SharedMemoryTransport(rank, world_size, opened, limit, watched.has_ended, messages.broadcast)
    weakref.finalize(transport, watched.close)
    return transport


def _from_all(value: T, group: dist.ProcessGroup, world_size: int) -> list[T]:
    values: list[T] = [value] * world_size
    dist.all_gather_object(values, value, group=group)
    return values


def running_system() -> str:
    """What two processes have in common if they share memory and process numbers; unlike anywhere it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown, process {os.getpid()}"


def _offer(size: int) -> int | None:
    """A handle of new memory, which the system takes back when its last user is gone."""
    if not hasattr(os, "memfd_create"):
        return None
    with suppress(OSError):
        handle = os.memfd_create("distrifusion")
        os.truncate(handle, size)
        return handle
    return None


def _open(place: _Place) -> mmap.mmap | None:
    if place.memory is None:
        return None
    with suppress(OSError), open(f"/proc/{place.pid}/fd/{place.memory}", "r+b") as file:
        return mmap.mmap(file.fileno(), 0)
    return None


class _Watch:
    """Handles of processes, by rank, that tell when one has ended, even if nobody has taken note of its end."""

    def __init__(self, handles: Mapping[int, int]) -> None:
        self._handles = dict(handles)

    def has_ended(self, rank: int) -> bool:
        """Whether the process of a rank is gone."""
        poll = select.poll()
        poll.register(self._handles[rank], select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Give the handles back."""
        while self._handles:
            os.close(self._handles.popitem()[1])


def _watch(pids: Mapping[int, int]) -> _Watch | None:
    handles: dict[int, int] = {}
    try:
        for rank, pid in pids.items():
            handles[rank] = os.pidfd_open(pid)
    except (OSError, AttributeError):
        _Watch(handles).close()
        return None
    return _Watch(handles)


def _limit_of(group: dist.ProcessGroup) -> float:
    """The limit that the group's own waits have, in seconds."""
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", dist.default_pg_timeout)
    return float(timeout.total_seconds())
