"""Everything that is looked at, in one go."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distrifusion.doctor import advice, gpus, machine, network, rank_processes, round_trip, versions
from distrifusion.doctor.advice import Finding, Level


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        num_ranks: for how many the machine was judged.
        threads: that torch takes in this process.
        gpu_links: how each pair of GPUs is joined, where nvidia-smi says it.
        links: what two processes measured between them.
    """

    num_ranks: int
    python: str
    threads: int
    machine: machine.Machine
    packages: tuple[versions.Package, ...]
    gpus: tuple[gpus.Gpu, ...]
    gpu_links: dict[str, str]
    network: network.Network
    links: tuple[round_trip.Link, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """True if nothing is known that keeps something from working."""
        return all(finding.level is not Level.PROBLEM for finding in self.findings)

    def as_data(self) -> dict[str, Any]:
        """For JSON; memory in bytes."""
        return {"healthy": self.healthy, **asdict(self)}


def examine(num_ranks: int, limit: float) -> Examination:
    """Look at everything; every wait has a limit.

    Args:
        num_ranks: how many ranks the machine should carry.
        limit: seconds for the round trip of each backend.
    """
    here = machine.look()
    packages = versions.packages()
    net = network.look()
    found: list[Finding] = []
    cards: tuple[gpus.Gpu, ...] = ()
    try:
        cards = gpus.gpus()
    except gpus.NoAnswer as silence:
        found.append(advice.on_silent_torch(str(silence)))
    found += [
        *advice.on_packages(packages),
        *advice.on_machine(here, num_ranks, len(cards)),
        *advice.on_gpus(cards, None if found else gpus.driver_says(), torch.version.cuda),
        *advice.on_network(net),
    ]
    links: list[round_trip.Link] = []
    for backend in ("gloo", *(["nccl"] if len(cards) > 1 else [])):
        try:
            links += round_trip.measure(backend, limit)
        except rank_processes.RoundTripError as error:
            found.append(advice.on_failed_round_trip(backend, str(error)))
    if links and not any(link.way == "shared memory" for link in links):
        found.append(advice.on_no_shared_memory())
    return Examination(
        num_ranks,
        platform.python_version(),
        torch.get_num_threads(),
        here,
        packages,
        cards,
        gpus.links() if len(cards) > 1 else {},
        net,
        tuple(links),
        tuple(found),
    )
