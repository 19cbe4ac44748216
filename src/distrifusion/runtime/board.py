"""A few numbers in memory shared by the caller and its workers: the denoising step every rank is in.

A number in shared memory costs a rank nothing to write and the caller nothing to read, where a message per step and
rank would wake processes that are computing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

OUTSIDE = -1
_BYTES = 8


class Board:
    """Steps of all ranks; `OUTSIDE` where a rank is not in a denoising loop."""

    def __init__(self, fd: int, num_ranks: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, num_ranks * _BYTES)
        self._steps = memoryview(self._memory).cast("q")

    @classmethod
    def create(cls, num_ranks: int) -> Board:
        """A new board in a file that has no name, so that nothing is left behind however the processes end."""
        with tempfile.TemporaryFile() as file:
            file.truncate(num_ranks * _BYTES)
            board = cls(os.dup(file.fileno()), num_ranks)
        for rank in range(num_ranks):
            board.write(rank, OUTSIDE)
        return board

    def write(self, rank: int, step: int) -> None:
        """Say that `rank` is now in `step`."""
        self._steps[rank] = step

    def read(self) -> Sequence[int]:
        """The step of every rank."""
        return list(self._steps)

    def step_of(self, rank: int) -> int | None:
        """The step `rank` is in, or None outside a loop."""
        step = self._steps[rank]
        return None if step == OUTSIDE else step

    def close(self) -> None:
        """Give the memory and the file back."""
        self._steps.release()
        self._memory.close()
        os.close(self.fd)
