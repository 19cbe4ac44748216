"""How fast this machine is: measured in seconds, kept in a file, and measured again when something has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from distrifusion.doctor.rank_processes import RoundTripError
from distrifusion.errors import ConfigError
from distrifusion.planner.blueprint import Blueprint
from distrifusion.planner.company import measure_company
from distrifusion.planner.kernels import measure_speed, name_of
from distrifusion.planner.links import Link, Links
from distrifusion.planner.speeds import Speed
from distrifusion.runtime.surroundings import num_cores

_LIBRARIES = ("torch", "diffusers", "distrifusion")
_FOLDER_VARIABLE = "DISTRIFUSION_CACHE"
_FORM = "3"
_LIMIT = 120.0
_ONE_MACHINE = 1024
_ENDLESS = 1e15  # bytes per second
_MOST_RANKS = 8  # processes that are started to measure; of more devices these stand for all


@dataclass(frozen=True)
class Circumstances:
    """What a calibration holds for; another device, model, type or number of threads has its own.

    Attributes:
        num_ranks: that are measured at once.
        versions: of the libraries, and of what a calibration holds; where they differ, it is stale.
    """

    device: str
    model: str
    dtype: str
    threads: int
    num_ranks: int
    versions: Mapping[str, str]

    @classmethod
    def here(cls, blueprint: Blueprint, device: torch.device, threads: int, num_ranks: int) -> Self:
        """Those of this process, when so many ranks may draw."""
        versions = {**{name: version(name) for name in _LIBRARIES}, "what is measured": _FORM}
        most = _most_ranks(device, threads, num_ranks)
        return cls(name_of(device), blueprint.name, str(blueprint.dtype), threads, most, versions)

    @property
    def file(self) -> Path:
        """Where it is kept."""
        what = json.dumps([self.device, self.model, self.dtype, self.threads, self.num_ranks])
        return cache_folder() / f"calibration-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Calibration:
    """A device and its links.

    Attributes:
        stale: versions that differ from those that an older calibration was made with; empty where there was none.
    """

    speed: Speed
    links: Links
    stale: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"speed": self.speed.as_dict(), "links": self.links.as_dict()}


def cache_folder() -> Path:
    """Where calibrations are kept: DISTRIFUSION_CACHE, or the user's cache."""
    given = os.environ.get(_FOLDER_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "distrifusion"


def calibrated(blueprint: Blueprint, device: torch.device, threads: int, num_ranks: int) -> Calibration:
    """The calibration of this machine: as it is kept, or measured now and kept.

    Args:
        blueprint: whose kernels are measured.
        device: one of those that will draw.
        threads: of a rank on CPU.
        num_ranks: most ranks that will draw.

    Raises:
        ConfigError: if what is kept cannot be read, or ranks cannot exchange messages.
    """
    now = Circumstances.here(blueprint, device, threads, num_ranks)
    kept = _read(now.file)
    changed: dict[str, str] = {}
    if kept is not None:
        before = kept.get("versions", {})
        changed = {name: before.get(name, "none") for name, v in now.versions.items() if before.get(name) != v}
        if not changed:
            return Calibration(Speed.from_dict(kept["speed"]), Links.from_dict(kept["links"]), {})
    speed = measure_speed(blueprint, device, threads)
    links, slower = measure_ranks(device, now.num_ranks)
    found = Calibration(replace(speed, divided=slower), links, changed)
    now.file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": dict(now.versions), "model": now.model, **found.as_dict()}, indent=1)
    now.file.write_text(text, encoding="utf-8")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the calibration '{file}' cannot be read: {error}; delete it, and it is measured anew"
        ) from error
    if not isinstance(row, dict) or not {"speed", "links"} <= row.keys():
        raise ConfigError(f"the calibration '{file}' has no speed and links; delete it, and it is measured anew")
    return row


def measure_ranks(device: torch.device, num_ranks: int) -> tuple[Links, float]:
    """The links of ranks of this machine, and by how much they slow each other; of one rank, nothing and not at all."""
    if num_ranks == 1:
        nothing = Link(0.0, _ENDLESS)
        return Links("here", nothing, nothing, _ONE_MACHINE, 1.0, "one device sends nothing"), 1.0
    try:
        found = measure_company("nccl" if device.type == "cuda" else "gloo", num_ranks, _LIMIT)
    except RoundTripError as error:
        raise ConfigError(f"the link between two ranks cannot be measured: {error}; name a profile by --on") from error
    pairs = {pair: Link.of(points) for pair, points in found.pairs.items()}
    slowest = max(pairs.values(), key=lambda link: link.measured[-1][1])
    links = Links("here", slowest, slowest, _ONE_MACHINE, found.overlap, f"measured: {found.way}", pairs)
    return links, found.slower


def _most_ranks(device: torch.device, threads: int, num_ranks: int) -> int:
    """Ranks that can be measured at once: no more than there are places for."""
    places = torch.cuda.device_count() if device.type == "cuda" else max(2, num_cores() // threads)
    return min(num_ranks, places, _MOST_RANKS)
