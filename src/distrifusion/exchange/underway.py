"""Messages that outlast the denoiser call in which they were asked for, and when they have to be over."""

from __future__ import annotations

import weakref

from distrifusion.exchange.arriving import Arriving, complete
from distrifusion.exchange.handles import Swap


class Underway:
    """What one rank has under way between its denoiser calls."""

    def __init__(self) -> None:
        self._leaving: list[Swap] = []
        self._left: list[Swap] = []
        self._followed: list[weakref.ref[Arriving]] = []

    def leave(self, swap: Swap) -> None:
        """Have a message go that nobody waits for: it has left when the next call ends."""
        self._leaving.append(swap)

    def follow(self, arriving: Arriving) -> None:
        """See to it that a tensor has arrived when the request ends."""
        self._followed = [ref for ref in self._followed if isinstance(ref(), Arriving)]
        self._followed.append(weakref.ref(arriving))

    def end_call(self) -> None:
        """End a call: what was to leave in the one before has left."""
        for swap in self._left:
            swap.wait()
        self._left, self._leaving = self._leaving, []

    def finish(self) -> None:
        """End a request: nothing is under way any more. Every rank calls it."""
        leaving, followed = [*self._left, *self._leaving], self._followed
        self._left, self._leaving, self._followed = [], [], []
        for ref in followed:
            if (arriving := ref()) is not None:
                complete(arriving)
        for swap in leaving:
            swap.wait()
