"""What a process can know of its place before it has imported anything heavy: its cores, and who started it."""

from __future__ import annotations

import os
from collections.abc import Mapping

# What torchrun tells each of its processes; see `in_process.py` for how it is read.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun(environment: Mapping[str, str]) -> bool:
    """True if this process is one rank of those that torchrun started."""
    return all(name in environment for name in TORCHRUN)


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(num_ranks: int) -> int:
    """CPU threads for one of these ranks, which share this machine's cores whatever they compute on."""
    return max(1, num_cores() // num_ranks)
