"""When the steps of a call ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distrifusion.exchange.arriving import complete


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
    """Takes the times of one call.

    At the first and the last step it waits for an accelerator, and for latents of which stages still have pieces: a
    first stage is done with a step before the others are.
    """

    device: torch.device
    start: float = field(default_factory=time.perf_counter)
    ends: list[float] = field(default_factory=list)

    def step_ended(self, last: bool, tensors: Mapping[str, Any]) -> None:
        """Note the end of a step, whose latents are among the tensors if the pipeline shows them."""
        if last or not self.ends:
            complete(tensors.get("latents"))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter() - self.start)

    def times(self) -> RunTimes:
        """The times so far; now is the end of the call."""
        return RunTimes(tuple(self.ends), time.perf_counter() - self.start)


def timed_tensors(cls: type) -> tuple[str, ...]:
    """What a pipeline of this class is asked for after every step, so that the clock can wait for it."""
    return tuple(name for name in ("latents",) if name in getattr(cls, "_callback_tensor_inputs", ()))
