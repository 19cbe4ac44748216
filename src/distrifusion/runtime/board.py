"""A few numbers in memory shared by the caller and its workers: where every rank is, and where a call ends.

A number in shared memory costs a rank nothing to write and the caller nothing to read, where a message per step and
rank would wake processes that are computing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress

_OUTSIDE = -1
_BYTES = 8
# One number holds both a call and a boundary, so that no reader sees half of the pair.
_BOUNDARY_BITS = 32


class Board:
    """Steps and exchanges of all ranks, the last call that was cancelled, and the boundary at which the ranks leave it.

    Args:
        fd: of the shared memory, which the board owns from here on.
    """

    def __init__(self, fd: int, num_ranks: int) -> None:
        self.fd = fd
        self.num_ranks = num_ranks
        self._memory = mmap.mmap(fd, _size(num_ranks))
        self._cells = memoryview(self._memory).cast("q")
        self._cancelled, self._end = 2 * num_ranks, 2 * num_ranks + 1

    @classmethod
    def create(cls, num_ranks: int) -> Board:
        """A new board in a file that has no name, so that nothing is left behind however the processes end."""
        with tempfile.TemporaryFile() as file:
            file.truncate(_size(num_ranks))
            board = cls(os.dup(file.fileno()), num_ranks)
        board.clear()
        return board

    def clear(self) -> None:
        """No rank is in a loop, and none has exchanged anything."""
        for rank in range(self.num_ranks):
            self.write(rank, None)
            self._cells[self.num_ranks + rank] = 0

    def write(self, rank: int, step: int | None) -> None:
        """Say that `rank` is now in `step`, or outside a loop."""
        self._cells[rank] = _OUTSIDE if step is None else step

    def count(self, rank: int) -> None:
        """Say that `rank` begins one more exchange with its peers."""
        self._cells[self.num_ranks + rank] += 1

    def read(self) -> Sequence[int]:
        """A number per rank that changes when the rank moves on."""
        return list(self._cells[: self.num_ranks])

    def step_of(self, rank: int) -> int | None:
        """The step `rank` is in, or None outside a loop."""
        step = self._cells[rank]
        return None if step == _OUTSIDE else step

    def num_exchanges(self, rank: int) -> int:
        """Exchanges that `rank` has begun since it was started."""
        return self._cells[self.num_ranks + rank]

    def progress_of(self, rank: int) -> tuple[int, int, int]:
        """Orders ranks by how far they have come."""
        return (self._cells[rank], self.num_exchanges(rank), rank)

    def cancel(self, call: int) -> None:
        """Say that the caller wants `call` to end; from any thread and any signal handler."""
        with suppress(ValueError):  # the board was closed meanwhile, and with it the call
            self._cells[self._cancelled] = call

    def is_cancelled(self, call: int) -> bool:
        """True if the caller wants `call` to end."""
        return self._cells[self._cancelled] == call

    def end_call(self, call: int, boundary: int) -> None:
        """Say that all ranks leave `call` at `boundary`, or at their next one if they have passed it."""
        self._cells[self._end] = call << _BOUNDARY_BITS | boundary

    def last_boundary(self, call: int) -> int | None:
        """The boundary at which all ranks leave `call`, None if nobody said so."""
        ends, boundary = divmod(self._cells[self._end], 1 << _BOUNDARY_BITS)
        return boundary if ends == call else None

    def close(self) -> None:
        """Give the memory and the file back; a second close does nothing."""
        if not self._memory.closed:
            self._cells.release()
            self._memory.close()
            os.close(self.fd)


def _size(num_ranks: int) -> int:
    return (2 * num_ranks + 2) * _BYTES
