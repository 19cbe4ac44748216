"""The GPUs that torch sees, and how they reach each other.

`python -m distrifusion.doctor.gpus` asks torch; `gpus` starts it, because a driver in trouble never answers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

# Seconds for nvidia-smi, and for a process that imports torch.
_LIMIT = 10.0
_TORCH_LIMIT = 90.0


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


class NoAnswer(Exception):
    """Torch did not say which GPUs there are; says why."""


def gpus() -> tuple[Gpu, ...]:
    """All GPUs that torch can use; none where torch is built without CUDA.

    Raises:
        NoAnswer: if torch fails, or says nothing for a minute and a half.
    """
    if torch.version.cuda is None:
        return ()
    words = [sys.executable, "-m", "distrifusion.doctor.gpus"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TORCH_LIMIT)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"torch did not say within {_TORCH_LIMIT:.0f} s which GPUs there are") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise NoAnswer(f"torch could not say which GPUs there are: {lines[-1]}")
    return tuple(Gpu(**{**row, "peers": tuple(row["peers"])}) for row in json.loads(done.stdout))


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


def main() -> None:
    """Print the GPUs that torch can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(json.dumps([asdict(_gpu(index, count)) for index in range(count)]))


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


if __name__ == "__main__":
    main()
