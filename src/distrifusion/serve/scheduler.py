"""Which request is drawn next: integers in, integers out; no clock, no tensor, no rank."""

from __future__ import annotations

from collections import deque

# Finished requests that say how long work takes.
_SEEN = 8


class QueueFull(Exception):
    """There is no place to wait.

    Attributes:
        free_in: milliseconds until a place is likely to be free, None where nothing was drawn yet.
    """

    def __init__(self, max_waiting: int, free_in: int | None) -> None:
        super().__init__(f"the queue is full: {max_waiting} waiting")
        self.free_in = free_in


class Scheduler:
    """Requests by number: those that wait, in the order in which they came, and those that are being drawn.

    Args:
        max_waiting: how many may wait; 0: a request is taken only if it can begin at once.
        num_slots: how many are drawn at the same time.
    """

    def __init__(self, max_waiting: int, num_slots: int = 1) -> None:
        self.max_waiting = max_waiting
        self.num_slots = num_slots
        # Work (pixels times steps) of a request by its number; a dict keeps the order.
        self._waiting: dict[int, int] = {}
        self._drawn: dict[int, int] = {}
        self._seen: deque[tuple[int, int]] = deque(maxlen=_SEEN)

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def num_drawn(self) -> int:
        """How many are being drawn."""
        return len(self._drawn)

    def add(self, number: int, work: int) -> None:
        """Let a request wait for its turn.

        Args:
            number: of the request; each comes once.
            work: pixels times steps, at least 1.

        Raises:
            QueueFull: if too many wait.
        """
        free_slots = self.num_slots - len(self._drawn)
        if len(self._waiting) >= self.max_waiting + free_slots:
            raise QueueFull(self.max_waiting, self._free_in())
        self._waiting[number] = work

    def next(self) -> int | None:
        """The request that is drawn now; None if none waits or no slot is free."""
        if not self._waiting or len(self._drawn) >= self.num_slots:
            return None
        number = next(iter(self._waiting))
        self._drawn[number] = self._waiting.pop(number)
        return number

    def withdraw(self, number: int) -> bool:
        """Take a request out that waits; False if it does not."""
        return self._waiting.pop(number, None) is not None

    def withdraw_all(self) -> list[int]:
        """Take all out that wait; returns their numbers in order."""
        numbers = list(self._waiting)
        self._waiting.clear()
        return numbers

    def ended(self, number: int, milliseconds: int | None) -> None:
        """A request that was drawn has ended; `milliseconds` if it was drawn to its end."""
        work = self._drawn.pop(number)
        if milliseconds is not None:
            self._seen.append((work, milliseconds))

    def ahead(self, number: int) -> int:
        """How many are drawn before this one, which waits; 0 for one that is being drawn, or is not known."""
        if number not in self._waiting:
            return 0
        return len(self._drawn) + list(self._waiting).index(number)

    def _free_in(self) -> int | None:
        work, milliseconds = (sum(column) for column in zip(*self._seen, strict=True)) if self._seen else (0, 0)
        return -(-milliseconds * min(self._drawn.values(), default=0) // work) if work else None
