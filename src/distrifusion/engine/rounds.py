"""The timesteps of a pipeline whose loop serves a sampler: one for each denoiser call, while there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class Rounds:
    """Looks to a pipeline's loop like the scheduler's timesteps, and ends when the sampler has.

    Args:
        timesteps: the scheduler's: [N]. There are never more rounds.
        now: the timestep that the loop's next round is told; None when the sampler has ended.
    """

    def __init__(self, timesteps: torch.Tensor, now: Callable[[], torch.Tensor | None]) -> None:
        self._timesteps = timesteps
        self._now = now

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(len(self)):
            timestep = self._now()
            if timestep is None:
                return
            yield timestep

    def __len__(self) -> int:
        return len(self._timesteps)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._timesteps[index]

    def __reduce__(self) -> tuple[Any, ...]:
        # A callback may look at the scheduler from another process.
        return self._timesteps.__reduce_ex__(2)
