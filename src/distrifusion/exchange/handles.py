"""What a verb gives at once: values on their way, to be waited for when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from distrifusion.exchange.gathering import GatherBuffer
from distrifusion.layout.partition import Interval


class Gathered:
    """Everybody's pieces of one site, on their way."""

    def __init__(self, buffer: GatherBuffer, taken: Callable[[], None]) -> None:
        self._buffer = buffer
        self._taken = taken

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The pieces [B, L, C] of all owners in band order, valid until the next verb."""
        self._taken()
        return self._buffer.read()


@dataclass
class Swap:
    """Small tensors of other ranks, by rank, on their way; `take` waits for them or says that they were used."""

    take: Callable[[], dict[int, torch.Tensor]]

    def wait(self) -> dict[int, torch.Tensor]:
        """What came from each peer, valid until the next verb."""
        return self.take()


@dataclass
class Shared:
    """Everybody's small tensor of one site, on their way."""

    own: torch.Tensor
    previous: torch.Tensor | None
    swap: Swap
    team: tuple[int, ...]

    def wait(self) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """All in band order, own always fresh; and the own one that the others still use, None if fresh."""
        received = self.swap.wait()
        return [received.get(rank, self.own) for rank in self.team], self.previous


@dataclass
class Halo:
    """Rows that one band wants beyond its own, on their way.

    Attributes:
        edges: rows of zeros wanted before the first and after the last row of the picture.
        inside: the part of the own rows that is wanted, counted from the first own one.
        dim: dimension of the cut, 2 or 3.
    """

    edges: tuple[int, int]
    inside: Interval
    dim: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    swap: Swap

    def wait(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The rows of other ranks before and after the own ones, valid until the next verb."""
        received = self.swap.wait()
        return [received[rank] for rank in self.before], [received[rank] for rank in self.after]

    def extend(self, x: torch.Tensor) -> torch.Tensor:
        """Wait, and put the rows around the own ones x [B, C, H, W], with zeros beyond the picture's edges."""
        before, after = self.wait()
        own = x.narrow(self.dim, self.inside.start, len(self.inside))
        zeros = [x.new_zeros(with_length(x.shape, self.dim, n)) if n else None for n in self.edges]
        pieces = (zeros[0], *before, own, *after, zeros[1])
        return torch.cat([piece for piece in pieces if piece is not None], self.dim)

    def fill(self, room: torch.Tensor) -> None:
        """Wait, and write the rows into a tensor that has room for them around the own ones, and zeros beyond."""
        before, after = self.wait()
        lengths = [[rows.shape[self.dim] for rows in side] for side in (before, after)]
        pieces = room.split([self.edges[0], *lengths[0], len(self.inside), *lengths[1], self.edges[1]], self.dim)
        pieces[0].zero_()
        pieces[-1].zero_()
        places = (*pieces[1 : 1 + len(before)], *pieces[2 + len(before) : -1])
        for place, rows in zip(places, (*before, *after), strict=True):
            place.copy_(rows)


def with_length(shape: torch.Size, dim: int, length: int) -> torch.Size:
    """A shape with another length in one dimension."""
    return torch.Size(length if d == dim else n for d, n in enumerate(shape))
