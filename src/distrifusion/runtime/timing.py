"""When the steps of a call ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class RunTimes:
    """Times of one call in seconds since its start, taken on rank 0.

    Attributes:
        steps: the end of every denoising step.
        total: the end of the call, text encoding and VAE included.
    """

    steps: tuple[float, ...]
    total: float

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps after the first, which carries one-time costs; the whole call if it has one step."""
        if len(self.steps) < 2:
            return self.total
        return (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1)


@dataclass
class StepClock:
    """Takes the times of one call; on an accelerator it waits for the device at the first and the last step only."""

    device: torch.device
    start: float = field(default_factory=time.perf_counter)
    ends: list[float] = field(default_factory=list)

    def step_ended(self, last: bool) -> None:
        """Note the end of a step."""
        if self.device.type == "cuda" and (last or not self.ends):
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter() - self.start)

    def times(self) -> RunTimes:
        """The times so far; now is the end of the call."""
        return RunTimes(tuple(self.ends), time.perf_counter() - self.start)
