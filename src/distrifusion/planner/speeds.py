"""How fast a device computes: rates by kind of layer, and what every kernel costs beside its work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from distrifusion.errors import ConfigError
from distrifusion.plan import Plan
from distrifusion.planner.operations import LayerKind, Operations


@dataclass(frozen=True)
class Speed:
    """One device.

    Attributes:
        name: of the device.
        rates: operations per second by kind of layer, where there is enough work in a kernel.
        bandwidth: bytes per second that other kernels read and write.
        layer: seconds that every kernel of a layer costs beside its operations: small bands are less efficient by it.
        launch: seconds that every other kernel costs beside its bytes.
        post: seconds of own work for every message or set of messages that leaves at once, beside their bytes.
        hand: the same of a stage, which hands its pieces on as they are and cuts nothing.
        divided: factor by which a rank computes slower while others compute beside it.
        convolved: the same for networks with convolutions of which each rank has fewer rows: published figures of SDXL
            show it, those of transformers do not.
        host: seconds in which the host starts a kernel while the device works on others: a call takes that for each of
            its kernels at least. 0 where calls are captured as graphs, or the host computes itself.
        places: ranks that compute at once on this machine; more take turns. 0 where each rank has a device.
        memory: bytes, 0 if not known.
        source: where the figures are from.
    """

    name: str
    rates: Mapping[LayerKind, float]
    bandwidth: float
    layer: float
    launch: float
    post: float
    hand: float
    divided: float
    convolved: float
    host: float
    places: int
    memory: int
    source: str

    def computing(self, work: Operations) -> float:
        """Seconds for the work itself."""
        return sum(n / self.rates[kind] for kind, n in work.flops.items()) + work.moved / self.bandwidth

    def launching(self, work: Operations) -> float:
        """Seconds for the kernels' start."""
        return work.calls.total() * self.layer + work.others * self.launch

    def starting(self, work: Operations) -> float:
        """Seconds for the host to start the kernels, which pass while the device computes."""
        return self.host * work.kernels

    def a_post(self, plan: Plan) -> float:
        """Seconds of own work for a post of a plan's denoiser calls."""
        return self.hand if plan.stages > 1 else self.post

    def turns(self, num_ranks: int) -> float:
        """By how much longer ranks take that have to share places."""
        return max(1.0, num_ranks / self.places) if self.places else 1.0

    def seconds(self, work: Operations) -> float:
        """Seconds for an undivided call."""
        return max(self.computing(work) + self.launching(work), self.starting(work))

    def made_to_take(self, seconds: float, work: Operations) -> Speed:
        """The same device, faster or slower in all kinds alike, so that an undivided call takes so many seconds."""
        wanted = seconds - self.launching(work)
        if wanted <= 0:
            raise ConfigError(f"{seconds} s are less than the start of {work.kernels} kernels takes on {self.name}")
        factor = self.computing(work) / wanted
        rates = {kind: rate * factor for kind, rate in self.rates.items()}
        return replace(self, rates=rates, bandwidth=self.bandwidth * factor)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rates": {str(kind): rate for kind, rate in self.rates.items()}}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """From JSON; raises ConfigError on a value that cannot work."""
        try:
            rates = {kind: float(row["rates"][kind]) for kind in LayerKind}
            seconds = {name: float(row[name]) for name in ("layer", "launch", "post", "hand", "host")}
            factors = {name: float(row[name]) for name in ("bandwidth", "divided", "convolved")}
            name, places, memory, source = str(row["name"]), int(row["places"]), int(row["memory"]), str(row["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the speed of a device has no usable {error}; calibrate it again") from error
        speed = cls(name=name, rates=rates, **seconds, **factors, places=places, memory=memory, source=source)
        positive, costs = [*rates.values(), *factors.values()], [*seconds.values(), places]
        if min(positive) <= 0 or min(costs) < 0 or not all(map(math.isfinite, [*positive, *costs])):
            raise ConfigError(f"the speed of {speed.name} has a rate that is not above 0; calibrate it again")
        return speed


_SHARE = "two thirds of the dense 16-bit rate for products, half for convolutions and attention"
_FIT = "layer and convolved fitted to half of the published rows of docs/scaling.md"


def _gpu(
    name: str,
    dense: float,
    bandwidth: float,
    gigabytes: int,
    source: str,
    layer: float = 13e-6,
    convolved: float = 1.11,
) -> Speed:
    """A GPU by its dense rate of 16-bit products, in operations per second; calls are captured as graphs."""
    rates = {
        LayerKind.CONVOLUTION: dense / 2,
        LayerKind.LINEAR: dense * 2 / 3,
        LayerKind.ATTENTION: dense / 2,
    }
    return Speed(
        name, rates, bandwidth, layer=layer, launch=2e-6, post=0.0, hand=0.0, divided=1.0, convolved=convolved,
        host=0.0, places=0, memory=gigabytes * 10**9, source=f"{_SHARE}; {source}",
    )  # fmt: skip


DEVICES: dict[str, Speed] = {
    speed.name: speed
    for speed in (
        _gpu("a100", 312e12, 1.5e12, 80, _FIT),
        _gpu("h100", 990e12, 2.7e12, 80, "A100's launch", 20e-6, 1.09),
        _gpu("a5000", 84e12, 0.7e12, 24, "A100's layer"),
        _gpu("l20", 120e12, 0.8e12, 48, "A100's launch"),
    )
}
# The device of each link profile, where none is named.
DEVICE_OF = {"nvlink-a100": "a100", "nvlink-h100": "h100", "pcie4": "a100", "ethernet-25g": "a100"}
