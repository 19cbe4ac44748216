"""What is measured: plans on numbers of devices at sizes, a plain diffusers pipeline, and the machine's ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distrifusion.errors import ConfigError
from distrifusion.memory.use import MemoryUse
from distrifusion.plan import Plan

PLAIN = "diffusers"
AUTO = "auto"
CEILING = "ceiling"


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        label: what was asked for: a plan's text, `auto`, `diffusers` (a plain pipeline) or `ceiling` (every device
            draws a picture of its own, so nothing is exchanged but the last latents).
        plan: what draws; None for a plain pipeline.
        devices: how many may be used.
        size: width and height in pixels.
    """

    label: str
    plan: Plan | None
    devices: int
    size: tuple[int, int]

    @property
    def pictures(self) -> int:
        """Pictures of one call."""
        return self.devices if self.label == CEILING else 1

    def __str__(self) -> str:
        used = f" ({self.plan})" if self.label == AUTO else ""
        return f"{self.label}{used} on {self.devices} at {self.size[0]}x{self.size[1]}"


@dataclass
class Run:
    """One measurement.

    Attributes:
        seconds, per_step: of the call, and of a step after the first; None where it failed.
        foreign: cores' worth of time that other processes of the machine took meanwhile.
        error: why it failed.
    """

    seconds: float | None = None
    per_step: float | None = None
    foreign: float = 0.0
    error: str = ""


@dataclass
class Row:
    """A case and what was measured of it.

    Attributes:
        runs: all of them, failures too.
        psnr, ssim: of the first picture to that of the plain pipeline; None where there is none.
        memory: what every rank took in the run that warms up; empty where that failed.
        counted: bytes a step, kept, grown and all of a rank, and predicted seconds, where the model can be rehearsed.
        trace: file with the timeline.
    """

    case: Case
    runs: list[Run] = field(default_factory=list)
    psnr: float | None = None
    ssim: float | None = None
    memory: list[MemoryUse] = field(default_factory=list)
    counted: dict[str, Any] = field(default_factory=dict)
    trace: str = ""


def plans_for(words: Sequence[str], counts: Sequence[int]) -> list[tuple[str, Plan | None, int]]:
    """The named plans with the number of devices that each takes; `auto` with every number.

    Raises:
        ConfigError: if a number is below 1 or said twice, or a plan takes none of them.
        PlanError: if a plan cannot be read.
    """
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise ConfigError(f"devices {', '.join(map(str, counts)) or 'none'}: numbers of at least 1, each once")
    found: list[tuple[str, Plan | None, int]] = []
    for word in words:
        if word == AUTO:
            found += [(AUTO, None, count) for count in counts]
            continue
        plan = Plan.parse(word)
        if plan.num_ranks not in counts:
            raise ConfigError(
                f"plan '{plan}' takes {plan.num_ranks} devices, and --devices names {', '.join(map(str, counts))}; "
                f"add {plan.num_ranks}, or use '{plan.nearest(max(counts))}'"
            )
        found.append((str(plan), plan, plan.num_ranks))
    if len(set(found)) < len(found):
        raise ConfigError(f"plans {', '.join(words)}: one is named twice")
    return found
