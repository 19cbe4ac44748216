"""Which rows of a picture cut into bands a rank gives to others, and takes from them, to have those it wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from distrifusion.layout.partition import Interval


@dataclass(frozen=True)
class Borders:
    """What one band gives to others, counted from its own first row, and takes from them, by place in the team."""

    outgoing: Mapping[int, Interval]
    incoming: Mapping[int, int]
    before: tuple[int, ...]
    after: tuple[int, ...]
    inside: Interval
    edges: tuple[int, int]


@lru_cache(maxsize=1024)
def borders_of(bands: tuple[Interval, ...], wants: tuple[Interval, ...], index: int) -> Borders:
    """The borders of the band at a place in the team; bands and wants of all are given in the team's order."""
    own, want, size = bands[index], wants[index], bands[-1].stop
    others = [j for j in range(len(bands)) if j != index]
    given = {j: part for j in others if len(part := own & wants[j])}
    taken = {j: len(part) for j in others if len(part := bands[j] & want)}
    return Borders(
        outgoing={j: Interval(part.start - own.start, part.stop - own.start) for j, part in given.items()},
        incoming=taken,
        before=tuple(j for j in taken if j < index),
        after=tuple(j for j in taken if j > index),
        inside=Interval((own & want).start - own.start, (own & want).stop - own.start),
        edges=(max(0, -want.start), max(0, want.stop - size)),
    )
