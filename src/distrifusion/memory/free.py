"""Free memory of this machine, of the container that this process is in, or of a GPU, in bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30
_OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class NodeMemory:
    """Memory of the machine, or of the container where it has less."""

    total: int
    free: int


def node_memory() -> NodeMemory:
    """The memory that this process and those beside it share, as it is now."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _limits():
        if limit < machine.total:
            total, free = min(total, limit), min(free, max(0, limit - used))
    return NodeMemory(total, free)


def free_bytes(device: torch.device, wanted: int) -> int:
    """Bytes that new tensors on a device may take.

    What this process holds without using it is given back first where `wanted` bytes would not fit otherwise.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = node_memory().free
    if free >= wanted:
        return free
    trim()
    return node_memory().free


def size_in_words(num_bytes: float) -> str:
    """Bytes for a reader, such as `1.5 GiB`."""
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.0f} MiB"


def trim() -> None:
    """Give what the C library keeps of freed memory back to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of the control groups that this process is in, version 2 or 1, inner to outer.

    Files that were read count as used, and go when memory is needed; they are taken off.
    """
    for root, group, names in _groups():
        for folder in (root / group, *(root / group).parents):
            limit, used = (_number(folder / name) for name in names[:2])
            if limit is not None and used is not None:
                yield limit, used - _cached(folder / "memory.stat", names[2])
            if folder == root:
                break


def _groups() -> Iterator[tuple[Path, str, tuple[str, str, str]]]:
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield _CGROUP, path.strip("/"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield _CGROUP / "memory", path.strip("/"), names


def _cached(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
