"""What is wrong with a machine, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from distrifusion.doctor.gpus import Gpu
from distrifusion.doctor.machine import Machine
from distrifusion.doctor.network import Network
from distrifusion.doctor.versions import Package
from distrifusion.memory.free import size_in_words

# What one rank takes before it has read any weight: Python, torch and diffusers.
_RANK_BYTES = 3 * 2**28
_NCCL_SHM_BYTES = 2**30
_OPEN_FILES = 256


class Level(StrEnum):
    """How bad it is."""

    PROBLEM = "problem"
    ADVICE = "advice"


@dataclass(frozen=True)
class Finding:
    """One thing that could be better.

    Attributes:
        level: a problem keeps something from working, advice makes it better.
        says: what was found.
        remedy: what to do.
    """

    level: Level
    says: str
    remedy: str


def on_packages(packages: Sequence[Package]) -> Iterator[Finding]:
    """Packages that are missing, or of a version that was not tested."""
    for package in packages:
        wanted = f"pip install '{package.name}{package.tested}'"
        if package.version is None and not package.fits:
            yield Finding(Level.PROBLEM, f"{package.name} is not installed", wanted)
        elif not package.fits and package.is_old:
            yield Finding(Level.PROBLEM, f"{package.name} {package.version} is older than what is needed", wanted)
        elif not package.fits:
            says = f"{package.name} {package.version} is newer than what was tested ({package.tested})"
            yield Finding(Level.ADVICE, says, f"if something fails: {wanted}")


def on_machine(machine: Machine, num_ranks: int, num_gpus: int) -> Iterator[Finding]:
    """Too little of anything for this many ranks."""
    if num_gpus == 0 and machine.usable_cores < num_ranks:
        says = f"{num_ranks} CPU ranks on {machine.usable_cores:g} core(s) take turns: no faster than one device"
        yield Finding(Level.ADVICE, says, f"use at most {max(1, int(machine.usable_cores))} ranks, or more cores")
    if machine.cpu_quota and machine.cpu_quota < machine.cores:
        says = f"the container shows {machine.cores} cores and grants the time of {machine.cpu_quota:g}"
        threads = max(1, int(machine.cpu_quota) // num_ranks)
        yield Finding(Level.ADVICE, says, f"load(..., threads={threads}) for {num_ranks} ranks, or raise the limit")
    if machine.free_memory < num_ranks * _RANK_BYTES:
        says = f"{size_in_words(machine.free_memory)} of memory are free, and {num_ranks} ranks take about "
        says += f"{size_in_words(num_ranks * _RANK_BYTES)} before they read any weight"
        yield Finding(Level.ADVICE, says, "end other programs, use fewer ranks, or raise the container's limit")
    if num_gpus > 1 and machine.shm is not None and machine.shm < _NCCL_SHM_BYTES:
        says = f"/dev/shm has {size_in_words(machine.shm)}, and NCCL uses it between GPUs"
        yield Finding(Level.ADVICE, says, "start the container with --shm-size=1g or --ipc=host")
    if machine.open_files < _OPEN_FILES:
        says = f"a process may open {machine.open_files} files, and every rank takes some"
        yield Finding(Level.ADVICE, says, "ulimit -n 4096")


def on_gpus(gpus: Sequence[Gpu], driver: str | None, torch_cuda: str | None) -> Iterator[Finding]:
    """GPUs that torch cannot use, or that do not reach each other."""
    if driver and not gpus:
        first = driver.splitlines()[0]
        if torch_cuda is None:
            says = f"the driver knows a GPU ({first}), and this torch is built without CUDA"
            yield Finding(Level.PROBLEM, says, "install a CUDA build of torch: https://pytorch.org/get-started")
        else:
            says = f"the driver knows a GPU ({first}), and torch (CUDA {torch_cuda}) cannot use it"
            yield Finding(Level.PROBLEM, says, "look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough")
    apart = [f"{a.index}-{b.index}" for a in gpus for b in gpus if a.index < b.index and b.index not in a.peers]
    if apart:
        says = f"GPUs do not reach each other directly: {', '.join(apart)}"
        yield Finding(Level.ADVICE, says, "prefer cfg2, which sends little, and displaced plans, which hide it")


def on_silent_torch(reason: str) -> Finding:
    """GPUs of which nothing is known."""
    return Finding(Level.PROBLEM, reason, "see whether nvidia-smi answers; CUDA_VISIBLE_DEVICES= leaves the GPUs out")


def on_network(network: Network) -> Iterator[Finding]:
    """Names that lead nowhere."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL also takes lists, prefixes and exclusions, which only it can judge.
        name = network.settings.get(variable, "")
        if name.isalnum() and name not in network.interfaces:
            known = ", ".join(network.interfaces)
            level = Level.PROBLEM if variable.startswith("GLOO") else Level.ADVICE
            yield Finding(level, f"{variable}={name} names no interface that is up", f"one of {known}, or unset it")
    if network.address is None:
        says = f"this machine's name '{network.hostname}' has no address; on one machine nothing needs it"
        yield Finding(
            Level.ADVICE, says, "for several machines set GLOO_SOCKET_IFNAME, or put the name into /etc/hosts"
        )


def on_no_shared_memory() -> Finding:
    """CPU ranks that must exchange by sockets."""
    return Finding(
        Level.ADVICE,
        "CPU ranks cannot share memory here and will use sockets, which is slower",
        "Linux 5.3 or newer; in a container, leave pidfd_open and /proc/PID/fd of the own user allowed",
    )


def on_failed_round_trip(backend: str, reason: str) -> Finding:
    """Ranks that cannot exchange anything."""
    variable = "NCCL_DEBUG=INFO" if backend == "nccl" else "GLOO_SOCKET_IFNAME=lo"
    return Finding(Level.PROBLEM, f"{backend}: {reason}", f"try {variable} in the environment, and --limit 300")
