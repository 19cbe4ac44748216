"""The timesteps of a pipeline whose loop serves a sampler: one for each denoiser call, while there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class Rounds:
    """Looks to a pipeline's loop like the scheduler's timesteps, and ends when the sampler has.

    Args:
        timesteps: the scheduler's: [N].
        rounds: begins at a step and gives the timestep that each of the loop's rounds is told; there are never more
            rounds than steps.
        first: the step that the loop begins at; image-to-image leaves out those before.
    """

    def __init__(
        self, timesteps: torch.Tensor, rounds: Callable[[int], Iterator[torch.Tensor]], first: int = 0
    ) -> None:
        self._timesteps = timesteps
        self._rounds = rounds
        self._first = first

    def __iter__(self) -> Iterator[torch.Tensor]:
        # A loop that was interrupted goes round without an answer, and is to end all the same.
        for _, timestep in zip(range(len(self)), self._rounds(self._first), strict=False):
            yield timestep

    def __len__(self) -> int:
        return len(self._timesteps) - self._first

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.stop is None and index.step is None:
            first = range(self._first, len(self._timesteps))[index].start
            return Rounds(self._timesteps, self._rounds, first)
        return self._timesteps[self._first :][index]

    def __reduce__(self) -> tuple[Any, ...]:
        # A callback may look at the scheduler from another process.
        return self._timesteps[self._first :].__reduce_ex__(2)
