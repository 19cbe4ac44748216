"""One interval per rank, uneven where they must be: of rows (or columns) of every level, or of what costs unlike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil

from distrifusion.plan import Split


@dataclass(frozen=True)
class Interval:
    """The half-open range start <= i < stop."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __and__(self, other: Interval) -> Interval:
        start = max(self.start, other.start)
        return Interval(start, max(start, min(self.stop, other.stop)))


def split_evenly(total: int, parts: int) -> tuple[Interval, ...]:
    """Cut 0..total into contiguous intervals whose lengths differ by at most one, the longer ones first."""
    short, extra = divmod(total, parts)
    edges = [i * short + min(i, extra) for i in range(parts + 1)]
    return tuple(Interval(a, b) for a, b in pairwise(edges))


@lru_cache(maxsize=256)
def token_intervals(num_tokens: int, num_owners: int) -> tuple[Interval, ...]:
    """The tokens of one stream (picture or text) that each owner has, in order.

    Cuts need not lie between rows of tokens: what is done to a token beside attention does not look at its neighbours,
    so the parts are as even as can be.
    """
    return split_evenly(num_tokens, num_owners)


@lru_cache(maxsize=256)
def piece_intervals(num_tokens: int, num_pieces: int, width: int) -> tuple[Interval, ...]:
    """The tokens of one stream that each of some pieces has, cut between lines of `width` tokens.

    Pieces then are bands of the picture, so that what a sampler does to a band can begin before the others are there.
    """
    lines = split_evenly(num_tokens // width, num_pieces)
    return tuple(Interval(part.start * width, part.stop * width) for part in lines)


@dataclass(frozen=True)
class Level:
    """One resolution of the network and who owns which part of it.

    Attributes:
        height, width: full size of the level.
        split: direction of the cut.
        bands: one interval per band owner along the cut, or None if every owner holds the whole level.
    """

    height: int
    width: int
    split: Split
    bands: tuple[Interval, ...] | None

    @property
    def size(self) -> int:
        """Length along the cut."""
        return self.height if self.split is Split.ROWS else self.width

    @property
    def across(self) -> int:
        """Length across the cut."""
        return self.width if self.split is Split.ROWS else self.height

    def band_shape(self, index: int) -> tuple[int, int]:
        """Height and width of one owner's part."""
        length = len(self.bands[index]) if self.bands else self.size
        return (length, self.width) if self.split is Split.ROWS else (self.height, length)


@lru_cache(maxsize=256)
def partition_levels(height: int, width: int, num_levels: int, num_bands: int, split: Split) -> tuple[Level, ...]:
    """Give every level of a network that halves its resolution `num_levels - 1` times one band per owner.

    Cuts lie on the grid of the coarsest level that has a row for every owner, so halving never crosses a cut above it;
    levels coarser than that are held whole by every owner (`bands` is None). If even the finest level is too small,
    all levels are whole.

    Args:
        height, width: size of the finest level, at least 1.
        num_levels: number of resolutions, at least 1; each is half the one before, rounded up.
        num_bands: number of owners, at least 1.
        split: direction of the cut.
    """
    shapes = tuple((ceil(height / 2**i), ceil(width / 2**i)) for i in range(num_levels))
    return partition_shapes(shapes, num_bands, split)


@lru_cache(maxsize=256)
def partition_shapes(shapes: tuple[tuple[int, int], ...], num_bands: int, split: Split) -> tuple[Level, ...]:
    """As `partition_levels`, for resolutions that are given.

    Args:
        shapes: height and width of every level, each half the one before, rounded up or down.
        num_bands: number of owners, at least 1.
        split: direction of the cut.
    """
    sizes = [h if split is Split.ROWS else w for h, w in shapes]
    coarsest = max((i for i, size in enumerate(sizes) if size >= num_bands), default=-1)
    units = split_evenly(sizes[coarsest], num_bands) if coarsest >= 0 else ()
    levels = []
    for i, (h, w) in enumerate(shapes):
        bands = _scale(units, 2 ** (coarsest - i), sizes[i]) if i <= coarsest else None
        levels.append(Level(h, w, split, bands))
    return tuple(levels)


def _scale(units: Sequence[Interval], factor: int, size: int) -> tuple[Interval, ...]:
    """Intervals of a finer level, of which the last one takes what rounding has left or wants."""
    *others, last = (Interval(u.start * factor, u.stop * factor) for u in units)
    return (*others, Interval(last.start, size))


def balance(costs: Sequence[float], num_parts: int) -> tuple[Interval, ...]:
    """Cut a sequence into contiguous parts, none empty, so that the most costly part costs least."""
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}
    for parts in range(1, num_parts + 1):
        for stop in range(parts, len(costs) + 1):
            best[parts, stop] = min(
                (max(best[parts - 1, start][0], sum(costs[start:stop])), (*best[parts - 1, start][1], stop))
                for start in range(parts - 1, stop)
                if (parts - 1, start) in best
            )
    return tuple(Interval(a, b) for a, b in pairwise(best[num_parts, len(costs)][1]))
