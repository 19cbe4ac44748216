"""Processor, memory and limits of this machine, or of the container that this process is in."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distrifusion.memory.free import node_memory
from distrifusion.runtime.surroundings import num_cores

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What there is to compute with; memory in bytes.

    Attributes:
        cores: that this process may run on.
        cpu_quota: CPUs' worth of time that the container grants, None if it is not limited.
        memory, free_memory: of the machine, or of the container where it has less.
        shm, free_shm: of /dev/shm, None where there is none.
        open_files: how many a process may have.
    """

    system: str
    cpu: str
    cores: int
    cpu_quota: float | None
    memory: int
    free_memory: int
    shm: int | None
    free_shm: int | None
    open_files: int

    @property
    def usable_cores(self) -> float:
        """Cores' worth of computing for this process."""
        return min(self.cores, self.cpu_quota) if self.cpu_quota else self.cores


def look() -> Machine:
    """The machine as it is now."""
    memory = node_memory()
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=cpu_model(),
        cores=num_cores(),
        cpu_quota=_cpu_quota(),
        memory=memory.total,
        free_memory=memory.free,
        shm=shm.f_blocks * shm.f_frsize if shm else None,
        free_shm=shm.f_bavail * shm.f_frsize if shm else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def cpu_model() -> str:
    """Name of the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def devices_in_words(devices: Sequence[torch.device], threads: int | None) -> str:
    """How many of what, such as `2 CPU processes of 1 thread`."""
    count = len(devices)
    if devices[0].type != "cpu":
        return f"{count} GPU{'s' * (count > 1)}"
    words = f"{count} CPU process{'es' * (count > 1)}"
    return words if threads is None else f"{words} of {threads} thread{'s' * (threads > 1)}"


def _cpu_quota() -> float | None:
    """CPUs that control groups (version 2, or 1) grant; None if they do not limit."""
    try:
        quota, _, period = (_CGROUP / "cpu.max").read_text().strip().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota_us, period_us = _read_number("cpu/cpu.cfs_quota_us"), _read_number("cpu/cpu.cfs_period_us")
        return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _read_number(name: str) -> float | None:
    try:
        return float((_CGROUP / name).read_text().strip())
    except (OSError, ValueError):
        return None
