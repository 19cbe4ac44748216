"""Links between devices: how long messages take, from a table of known ones or from a file."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
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
        measured: sizes in bytes and seconds, both growing, between which is interpolated; empty: the two above say it.
    """

    latency: float
    bandwidth: float
    measured: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, measured: Sequence[tuple[int, float]]) -> Self:
        """From seconds by size, the smallest first; a larger message is never said to take less."""
        sizes = [size for size, _ in measured]
        points = tuple(zip(sizes, accumulate((seconds for _, seconds in measured), max), strict=True))
        (first, latency), (last, seconds) = points[0], points[-1]
        return cls(latency, (last - first) / max(seconds - latency, 1e-9), points)

    def seconds(self, num_bytes: int) -> float:
        """From a post to the end of the wait for it."""
        points = self.measured
        if not points or num_bytes >= points[-1][0]:
            return num_bytes / self.bandwidth + self.latency
        at = bisect_right(points, num_bytes, key=lambda point: point[0])
        if at == 0:
            return points[0][1]
        (size, seconds), (larger, longer) = points[at - 1], points[at]
        return seconds + (longer - seconds) * (num_bytes - size) / (larger - size)

    def seconds_under_way(self, num_bytes: int) -> float:
        """Of a message that nobody waits for in this call: its latency passes while both ranks compute."""
        return self.seconds(num_bytes) - self.latency

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """From JSON."""
        points = tuple((int(size), float(seconds)) for size, seconds in row.get("measured", ()))
        return cls(float(row["latency"]), float(row["bandwidth"]), points)

    @property
    def usable(self) -> bool:
        """Whether these are values that can be."""
        grows = all(a < b and s <= t for (a, s), (b, t) in pairwise(self.measured))
        numbers = (self.latency, self.bandwidth, *(seconds for _, seconds in self.measured))
        return all(map(math.isfinite, numbers)) and self.bandwidth > 0 and min(numbers) >= 0 and grows


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
        pairs: links of two devices of one machine that were measured, by their ranks "0-1"; others are `within`.
    """

    name: str
    within: Link
    between: Link
    per_node: int
    overlap: float
    source: str
    pairs: Mapping[str, Link] = field(default_factory=dict)

    def seconds(self, post: Post, rank: int) -> float:
        """How long messages of one rank take from their post to their arrival."""
        return self._longer_way(post, rank, Link.seconds)

    def seconds_under_way(self, post: Post, rank: int) -> float:
        """The same of messages that nobody waits for in this call, so without latency."""
        return self._longer_way(post, rank, Link.seconds_under_way)

    def _longer_way(self, post: Post, rank: int, seconds: Callable[[Link, int], float]) -> float:
        return max((self._one_way(way, rank, seconds) for way in (post.sent, post.received) if way), default=0.0)

    def _one_way(self, way: Mapping[int, int], rank: int, seconds: Callable[[Link, int], float]) -> float:
        """Messages one way: by one link after the other, while the ways out of a machine carry at the same time."""
        node = rank // self.per_node
        near: dict[Link, int] = {}
        for peer, num_bytes in way.items():
            if peer // self.per_node == node:
                link = self.pairs.get(f"{min(rank, peer)}-{max(rank, peer)}", self.within)
                near[link] = near.get(link, 0) + num_bytes
        far = sum(n for peer, n in way.items() if peer // self.per_node != node)
        inside = sum(seconds(link, n) for link, n in near.items())
        return max(inside, seconds(self.between, far) if far else 0.0)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """From JSON; raises ConfigError on a value that cannot work."""
        try:
            within, between = (Link.from_dict(row[way]) for way in ("within", "between"))
            pairs = {str(pair): Link.from_dict(link) for pair, link in row.get("pairs", {}).items()}
            links = cls(
                str(row["name"]), within, between, int(row["per_node"]), float(row["overlap"]), str(row["source"]),
                pairs,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"a link profile has no usable {error}; it holds name, within and between (each latency in seconds and "
                "bandwidth in bytes per second), per_node, overlap and source"
            ) from error
        usable = all(link.usable for link in (within, between, *pairs.values()))
        if not usable or links.per_node < 1 or not 0 <= links.overlap <= 1:
            raise ConfigError(
                f"link profile '{links.name}': bandwidths are above 0, latencies at least 0, sizes and seconds that "
                "were measured grow, per_node is at least 1 and overlap 0 to 1"
            )
        return links

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


_OVERLAP = 0.33
_FITTED = "latency, bandwidth and overlap fitted to half of the published rows of docs/scaling.md"
_INFINIBAND_200 = Link(10e-6, 20e9)
_INFINIBAND_400 = Link(10e-6, 40e9)
_ETHERNET_25 = Link(40e-6, 2.8e9)
PROFILES: dict[str, Links] = {
    links.name: links
    for links in (
        Links("nvlink-a100", Link(15e-6, 93e9), _INFINIBAND_200, 8, _OVERLAP, f"{_FITTED}; 200 Gbit/s a GPU between"),
        Links("nvlink-h100", Link(15e-6, 140e9), _INFINIBAND_400, 8, _OVERLAP, "A100's, by the ratio of nominal rates"),
        Links("pcie4", Link(15e-6, 8.46e9), _ETHERNET_25, 8, _OVERLAP, _FITTED),
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
