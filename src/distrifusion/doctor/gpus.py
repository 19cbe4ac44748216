"""The GPUs that torch sees, and how they reach each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

import torch

# Seconds; a driver in trouble lets nvidia-smi wait for ever.
_LIMIT = 10.0


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in bytes.

    Attributes:
        peers: other GPUs that it reaches directly, without the host's memory.
    """

    index: int
    name: str
    memory: int
    free_memory: int
    capability: str
    peers: tuple[int, ...]


def gpus() -> tuple[Gpu, ...]:
    """All GPUs that torch can use; none without CUDA."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(_gpu(index, count) for index in range(count))


def driver_says() -> str | None:
    """Names of the GPUs that the driver knows, whether torch can use them or not; None without a driver."""
    return _nvidia_smi("--query-gpu=name,driver_version", "--format=csv,noheader")


def links() -> dict[str, str]:
    """How each pair of GPUs is joined (`NV4`: four NVLinks, `PIX`, `PHB`, `SYS`: PCIe), by pair such as `0-1`."""
    text = _nvidia_smi("topo", "-m")
    return parse_topology(text) if text else {}


def parse_topology(text: str) -> dict[str, str]:
    """Pairs of GPUs and their link from `nvidia-smi topo -m`."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row}
    names = list(table)
    found = {}
    for name, cells in table.items():
        for other, cell in zip(names, cells, strict=False):
            if names.index(name) < names.index(other):
                found[f"{name[3:]}-{other[3:]}"] = cell
    return found


def _gpu(index: int, count: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    others = (other for other in range(count) if other != index)
    return Gpu(
        index,
        properties.name,
        total,
        free,
        f"{properties.major}.{properties.minor}",
        tuple(other for other in others if torch.cuda.can_device_access_peer(index, other)),
    )


def _nvidia_smi(*words: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=_LIMIT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None
