"""A sum over a team: each rank adds one stretch of everybody's partial sums, and gives it to all.

Between two ranks the whole travels, and both add it: as many bytes as two halves, and one wait less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from distrifusion.layout.partition import split_evenly

# Kinds of what is exchanged where weights are divided: partial sums, and outputs that each rank has a part of.
SUM, PART = "sum", "part"

# Starts to give tensors to ranks and to fill some from ranks; what is returned waits for both.
Trade = Callable[[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]], Callable[[], None]]


class Sum:
    """A sum on its way: stretches of the partial sums travel to the ranks that add them.

    Parts are added in the order of the team, in fp32 or better, each stretch by one rank: all ranks have the same bits.

    Args:
        trade: with the ranks of the team; called twice.
        partial: this rank's partial sum, without gaps in memory, shaped and laid out alike on all ranks; it becomes the
            sum.
        team: ranks that add up, in order.
        index: this rank's place in it.
    """

    def __init__(self, trade: Trade, partial: torch.Tensor, team: Sequence[int], index: int) -> None:
        self._trade = trade
        self._partial = partial
        self._team = team
        flat = in_memory_order(partial)
        stretches = flat.split([len(stretch) for stretch in split_evenly(flat.numel(), len(team))])
        self._others = dict(zip(team, [flat, flat] if len(team) == 2 else stretches, strict=True))
        self._own = self._others.pop(team[index])
        self._room = {rank: torch.empty_like(self._own) for rank in self._others}
        self._come = trade(self._others, self._room)

    def wait(self) -> torch.Tensor:
        """The sum, on every rank of the team."""
        self._come()
        add_in_order([self._room.get(rank, self._own) for rank in self._team], self._own)
        if len(self._team) > 2:
            self._trade(dict.fromkeys(self._others, self._own), self._others)()
        return self._partial


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """All values of a tensor that is contiguous, or channels-last, as a view [n]."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(-1)


def add_in_order(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Add tensors one after the other, in fp32 or better; `out` may be one of them."""
    wide = torch.promote_types(out.dtype, torch.float32)
    total = parts[0].to(wide)
    for part in parts[1:-1]:
        total = total + part
    if out.dtype == wide:
        torch.add(total, parts[-1], out=out)
    else:
        out.copy_(total + parts[-1])
