"""Links between devices: how long messages take, from a table of known ones or from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from distrifusion.errors import ConfigError
from distrifusion.planner.rehearsal import Post


@dataclass(frozen=True)
class Link:
    """One device's way to others.

    Attributes:
        latency: seconds that a wait for a message costs beside its bytes, at least 0.
        bandwidth: bytes per second of one device, each way, all its peers together; above 0.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Links:
    """The links of a cluster.

    Attributes:
        name: of the profile.
        within: between devices of one machine.
        between: between devices of different machines.
        per_node: devices of a machine, at least 1.
        overlap: share of the time in which a device computes and sends at once that is really gained, 0 to 1.
        source: where the figures are from.
    """

    name: str
    within: Link
    between: Link
    per_node: int
    overlap: float
    source: str

    def seconds(self, post: Post, rank: int) -> float:
        """How long messages of one rank take from their post to their arrival."""
        near, far = (self._bytes(post, rank, same) for same in (True, False))
        if not post.sent and not post.received:
            return 0.0
        # Both ways out of a machine and within it carry at the same time.
        times = [near / self.within.bandwidth + self.within.latency] if near or not far else []
        times += [far / self.between.bandwidth + self.between.latency] if far else []
        return max(times)

    def _bytes(self, post: Post, rank: int, same: bool) -> int:
        node = rank // self.per_node
        ways = (
            sum(n for peer, n in way.items() if (peer // self.per_node == node) is same)
            for way in (post.sent, post.received)
        )
        return max(ways)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """From JSON; raises ConfigError on a value that cannot work."""
        try:
            within, between = (
                Link(float(row[w]["latency"]), float(row[w]["bandwidth"])) for w in ("within", "between")
            )
            links = cls(
                str(row["name"]), within, between, int(row["per_node"]), float(row["overlap"]), str(row["source"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"a link profile has no usable {error}; it holds name, within and between (each latency in seconds and "
                "bandwidth in bytes per second), per_node, overlap and source"
            ) from error
        numbers = (within.latency, between.latency, within.bandwidth, between.bandwidth, links.overlap)
        positive = min(within.bandwidth, between.bandwidth) > 0 and min(within.latency, between.latency) >= 0
        if not all(map(math.isfinite, numbers)) or not positive or links.per_node < 1 or not 0 <= links.overlap <= 1:
            raise ConfigError(
                f"link profile '{links.name}': bandwidths are above 0, latencies at least 0, per_node at least 1 and "
                "overlap 0 to 1"
            )
        return links

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


_OVERLAP = 0.56
_FITTED = "latency, bandwidth and overlap fitted to half of the published rows of docs/scaling.md"
_INFINIBAND_200 = Link(10e-6, 20e9)
_INFINIBAND_400 = Link(10e-6, 40e9)
_ETHERNET_25 = Link(40e-6, 2.8e9)
PROFILES: dict[str, Links] = {
    links.name: links
    for links in (
        Links("nvlink-a100", Link(5e-6, 107e9), _INFINIBAND_200, 8, _OVERLAP, f"{_FITTED}; 200 Gbit/s a GPU between"),
        Links("nvlink-h100", Link(5e-6, 160e9), _INFINIBAND_400, 8, _OVERLAP, "A100's, by the ratio of nominal rates"),
        Links("pcie4", Link(5e-6, 10e9), _ETHERNET_25, 8, _OVERLAP, _FITTED),
        Links("ethernet-25g", _ETHERNET_25, _ETHERNET_25, 1, _OVERLAP, "nominal rate less a tenth; one GPU a machine"),
    )
}


def find(name: str) -> Links:
    """A profile by its name, or from a JSON file.

    Raises:
        ConfigError: if there is neither, or the file cannot be read.
    """
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"link profile '{name}' is neither a known one ({', '.join(PROFILES)}) nor a file; "
            "leave it out to measure this machine"
        )
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"link profile '{name}' is not readable as JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"link profile '{name}' does not hold a JSON object")
    return Links.from_dict(row.get("links", row))
