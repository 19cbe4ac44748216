"""`distrifusion doctor`: what this machine has, whether it works, and what to do where it does not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from distrifusion.cli import options
from distrifusion.cli.spoken import FAILED, spoken_errors
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from distrifusion.doctor.examination import Examination

_WIDTH = 12


def doctor(
    devices: Annotated[
        int, typer.Option("--devices", "-d", metavar="N", help="How many ranks the machine should carry.")
    ] = 2,
    limit: Annotated[
        float, typer.Option("--limit", metavar="SECONDS", help="How long two test processes may take.")
    ] = 120.0,
    answer: options.AnswerFormat = options.Format.TEXT,
) -> None:
    """Look at devices, links, versions and limits, let two processes exchange messages, and say what to do.

    Exit status: 0 if all is well or only advice is given, 1 if something will not work, 2 for a wrong option.
    """
    with spoken_errors():
        if devices < 1:
            raise ConfigError(f"--devices {devices}: at least one is needed")
        if not 0 < limit < math.inf:
            raise ConfigError(f"--limit {limit}: it must be above 0 seconds and finite")
        from distrifusion.doctor.examination import examine

        found = examine(devices, limit)
        if answer is options.Format.JSON:
            typer.echo(json.dumps(found.as_data(), indent=1))
        else:
            for line in _lines(found):
                typer.echo(line)
    if not found.healthy:
        raise typer.Exit(FAILED)


def _lines(found: Examination) -> Iterator[str]:
    from distrifusion.memory.free import size_in_words

    here = found.machine
    quota = f", limited to {here.cpu_quota:g}" if here.cpu_quota else ""
    yield _line("system", f"{here.system}, Python {found.python}")
    yield _line("processor", f"{here.cpu}, {here.cores} cores to use{quota}, torch takes {found.threads} threads")
    yield _line("memory", f"{size_in_words(here.free_memory)} free of {size_in_words(here.memory)}")
    if here.shm is not None and here.free_shm is not None:
        yield _line("/dev/shm", f"{size_in_words(here.free_shm)} free of {size_in_words(here.shm)}")
    for gpu in found.gpus:
        peers = f", reaches {', '.join(map(str, gpu.peers))} directly" if gpu.peers else ""
        memory = f"{size_in_words(gpu.free_memory)} free of {size_in_words(gpu.memory)}"
        yield _line(f"GPU {gpu.index}", f"{gpu.name}, {memory}, compute capability {gpu.capability}{peers}")
    if not found.gpus:
        yield _line("GPUs", "none that torch can use")
    for pair, link in found.gpu_links.items():
        yield _line(f"GPUs {pair}", link)
    net = found.network
    address = f"{net.address} on {net.interface or 'no interface that is up'}" if net.address else "no address"
    yield _line("network", f"{net.hostname}: {address}; interfaces {', '.join(net.interfaces) or 'none'}")
    for name, value in net.settings.items():
        yield _line("", f"{name}={value}")
    for measured in found.links:
        speed = f"{measured.microseconds:.0f} us there and back, {measured.gigabytes_per_second:.2f} GB/s"
        yield _line("round trip", f"{measured.way}: {speed}")
    for package in found.packages:
        version = package.version or f"not installed (for {package.extra})"
        yield _line("version", f"{package.name} {version}, tested {package.tested}")
    for finding in found.findings:
        yield f"\n{finding.level}: {finding.says}\n  {finding.remedy}"
    yield "\nhealthy" if found.healthy else "\nnot healthy"


def _line(name: str, text: str) -> str:
    return f"{name:<{_WIDTH}}{text}"
