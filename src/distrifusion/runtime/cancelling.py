"""Ending a running call early: every rank leaves it at the same step boundary.

The boundaries of a call are counted: 0 where its first denoising loop begins, one more after every step. Between two
boundaries all ranks meet in the denoiser. So what a rank writes before it passes boundary k is seen by every rank at
boundary k+1, and no rank has passed that one by then: "leave at k+1" is an agreement that costs no message of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist

from distrifusion.errors import Cancelled
from distrifusion.runtime.board import Board


class Agreement(Protocol):
    """How the ranks agree on the boundary at which they leave a call."""

    def stops(self, call: int, boundary: int) -> bool:
        """True if every rank leaves `call` at this boundary. Every rank asks at every boundary."""


class OwnAgreement:
    """One rank alone agrees with itself at once."""

    def __init__(self) -> None:
        self._cancelled: int | None = None

    def cancel(self, call: int) -> None:
        """Let `call` end at its next boundary; from any thread."""
        self._cancelled = call

    def stops(self, call: int, boundary: int) -> bool:
        return self._cancelled == call


class BoardAgreement:
    """Worker processes: the caller cancels on the board, and rank 0 says there where all leave."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank

    def stops(self, call: int, boundary: int) -> bool:
        last = self._board.last_boundary(call)
        if last is None and self._rank == 0 and self._board.is_cancelled(call):
            self._board.end_call(call, boundary + 1)
        return last is not None and boundary >= last


class StoreAgreement:
    """Ranks of torchrun: any of them may cancel, and says in the process group's store where all leave.

    Two ranks that cancel between the same boundaries write the same number, whoever is first.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._cancelled: int | None = None

    def cancel(self, call: int) -> None:
        """Let all ranks leave `call` after this rank's next boundary; from any thread."""
        self._cancelled = call

    def stops(self, call: int, boundary: int) -> bool:
        if self._store.check([str(call)]):
            return boundary >= int(self._store.get(str(call)))
        if self._cancelled == call:
            self._store.set(str(call), str(boundary + 1))
        return False


class Boundaries:
    """Follows one rank through the denoising loops of its calls, and ends a call at the boundary that was agreed.

    Attributes:
        step: the denoising step (from 0) the rank is in, or None outside a loop; after an error, where it was raised.
    """

    def __init__(self, agreement: Agreement, show: Callable[[int | None], None] | None = None) -> None:
        self.step: int | None = None
        self._agreement = agreement
        self._show = show
        self._call = 0
        self._boundary = 0
        self._moved = 0

    def begin(self, call: int) -> None:
        """A call begins; `call` is its number, the same on every rank."""
        self._call = call
        self._boundary = 0
        self._enter(None)

    def loop_begins(self) -> None:
        """A denoising loop begins. Raises Cancelled if the call ends here."""
        self._moved = 0
        self._enter(0)
        self._check()

    def step_ends(self, step: int) -> None:
        """A step is over, the caller's callback included; pipelines without a callback do not say so."""
        self._enter(step + 1)

    def bar_moves(self) -> None:
        """What every loop of every pipeline comes to after a step. Raises Cancelled if the call ends here."""
        self._moved += 1
        self._enter(max(self._moved, self.step or 0))
        self._boundary += 1
        self._check()

    def loop_ends(self) -> None:
        """The denoising loop is over."""
        self._enter(None)

    def _enter(self, step: int | None) -> None:
        self.step = step
        if self._show is not None:
            self._show(step)

    def _check(self) -> None:
        if self._agreement.stops(self._call, self._boundary):
            last = self.step - 1 if self.step else None
            where = "before the first step" if last is None else f"after step {last}"
            raise Cancelled(f"the call was cancelled {where}; the pipeline is ready for the next", step=last)
