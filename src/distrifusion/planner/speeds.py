"""How fast a device computes: rates by kind of layer, and what every kernel costs beside its work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from distrifusion.errors import ConfigError
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
        divided: factor by which a divided call takes longer than its share of the work says.
        memory: bytes, 0 if not known.
        source: where the figures are from.
    """

    name: str
    rates: Mapping[LayerKind, float]
    bandwidth: float
    layer: float
    launch: float
    divided: float
    memory: int
    source: str

    def computing(self, work: Operations) -> float:
        """Seconds for the work itself."""
        return sum(n / self.rates[kind] for kind, n in work.flops.items()) + work.moved / self.bandwidth

    def launching(self, work: Operations) -> float:
        """Seconds for the kernels' start."""
        return work.calls.total() * self.layer + work.others * self.launch

    def seconds(self, work: Operations) -> float:
        """Seconds for an undivided call."""
        return self.computing(work) + self.launching(work)

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
            bandwidth, layer, launch, divided = (float(row[n]) for n in ("bandwidth", "layer", "launch", "divided"))
            name, memory, source = str(row["name"]), int(row["memory"]), str(row["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the speed of a device has no usable {error}; calibrate it again") from error
        speed = cls(name, rates, bandwidth, layer, launch, divided, memory, source)
        positive = [*rates.values(), speed.bandwidth, speed.divided]
        if not all(math.isfinite(x) and x > 0 for x in positive) or not 0 <= min(speed.layer, speed.launch) < math.inf:
            raise ConfigError(f"the speed of {speed.name} has a rate that is not above 0; calibrate it again")
        return speed


_C, _L, _A = LayerKind.CONVOLUTION, LayerKind.LINEAR, LayerKind.ATTENTION
_SHARE = "two thirds of the dense 16-bit rate for products, half for convolutions and attention"
_FIT = "layer and divided fitted to half of the published rows of docs/scaling.md"
DEVICES: dict[str, Speed] = {
    speed.name: speed
    for speed in (
        Speed("a100", {_C: 156e12, _L: 208e12, _A: 156e12}, 1.5e12, 15e-6, 2e-6, 1.12, 80 * 10**9, f"{_SHARE}; {_FIT}"),
        Speed(
            "h100",
            {_C: 495e12, _L: 660e12, _A: 495e12},
            2.7e12,
            20e-6,
            2e-6,
            1.09,
            80 * 10**9,
            f"{_SHARE}; A100's launch",
        ),
        Speed(
            "a5000", {_C: 42e12, _L: 56e12, _A: 42e12}, 0.7e12, 15e-6, 2e-6, 1.12, 24 * 10**9, f"{_SHARE}; A100's layer"
        ),
        Speed(
            "l20", {_C: 60e12, _L: 80e12, _A: 60e12}, 0.8e12, 15e-6, 2e-6, 1.12, 48 * 10**9, f"{_SHARE}; A100's launch"
        ),
    )
}
# The device of each link profile, where none is named.
DEVICE_OF = {"nvlink-a100": "a100", "nvlink-h100": "h100", "pcie4": "a100", "ethernet-25g": "a100"}
