"""Which component runs which layer: a chain cut where the work is even, as plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

# What the last component may run a second time, as a share of all work.
REPEATED = 0.10


@dataclass(frozen=True)
class Layer:
    """One use of a layer in a call.

    Attributes:
        cost: operations.
        reads: places, in the order of the call, of the layers whose outputs it reads.
    """

    cost: int
    reads: frozenset[int]


@dataclass(frozen=True)
class Depth:
    """Who runs what.

    Attributes:
        runs: by component, the places of the layers that it runs.
        owner: by place, the component whose output the others take.
        takes: by component, the places of the layers that it reads and does not run.
    """

    runs: tuple[frozenset[int], ...]
    owner: tuple[int, ...]
    takes: tuple[frozenset[int], ...]

    def takers(self, place: int) -> tuple[int, ...]:
        """The components that take the output of a layer."""
        return tuple(component for component, taken in enumerate(self.takes) if place in taken)

    def loads(self, layers: Sequence[Layer]) -> list[int]:
        """Operations of a run of every component."""
        return [sum(layers[place].cost for place in own) for own in self.runs]


def divide(layers: Sequence[Layer], num_components: int, stride: int = 1, repeated: float = REPEATED) -> Depth:
    """Cut a chain into components that follow one another, so that the longest takes the least time.

    The last component also runs the first layers again whose outputs it reads past others (skip connections), in order
    while that costs little: so the newest input reaches the prediction within the call.

    Args:
        layers: in the order in which they run; each reads earlier ones.
        num_components: at least 1 and at most the number of layers.
        stride: calls in which every component but the last runs once, and so the calls that it may take.
        repeated: what the last component may run again, as a share of all work.
    """
    costs = [0, *accumulate(layer.cost for layer in layers)]
    if num_components == 1:
        edges, again = [0, len(layers)], frozenset[int]()
    else:
        edges, again = _best_edges(layers, costs, num_components, stride, repeated * costs[-1])
    spans = [range(a, b) for a, b in pairwise(edges)]
    runs = [frozenset(span) for span in spans]
    runs[-1] |= again
    owner = tuple(component for component, span in enumerate(spans) for _ in span)
    takes = [frozenset(v for u in own for v in layers[u].reads if v not in own) for own in runs]
    return Depth(tuple(runs), owner, tuple(takes))


def _best_edges(
    layers: Sequence[Layer], costs: Sequence[int], num_components: int, stride: int, budget: float
) -> tuple[list[int], frozenset[int]]:
    """Where components begin and end, and what the last runs again."""
    earlier = _even_edges(costs, num_components - 1)
    best: tuple[float, list[int], frozenset[int]] | None = None
    for last in range(num_components - 1, len(layers)):
        longest, edges = earlier[last]
        again = _repeated(layers, last, budget)
        own = costs[-1] - costs[last] + sum(layers[place].cost for place in again)
        time = max(longest / stride, own)
        if best is None or time < best[0]:
            best = time, [*edges, len(layers)], again
    assert best is not None, "there are at least as many layers as components"
    return best[1], best[2]


def _even_edges(costs: Sequence[int], num_parts: int) -> dict[int, tuple[int, list[int]]]:
    """For every number of first layers: the least longest of so many parts of them, and the parts' edges."""
    found = {stop: (costs[stop], [0, stop]) for stop in range(1, len(costs))}
    for parts in range(2, num_parts + 1):
        found = {
            stop: min(
                (max(found[edge][0], costs[stop] - costs[edge]), [*found[edge][1], stop])
                for edge in range(parts - 1, stop)
            )
            for stop in range(parts, len(costs))
        }
    return found


def _repeated(layers: Sequence[Layer], last: int, budget: float) -> frozenset[int]:
    """Layers before `last` that are read from there on, and what these read: the first ones, within a budget."""
    again: frozenset[int] = frozenset()
    for place in sorted({v for layer in layers[last:] for v in layer.reads if v < last}):
        wanted = again | _needed(layers, place)
        if sum(layers[v].cost for v in wanted) > budget:
            break
        again = wanted
    return again


def _needed(layers: Sequence[Layer], place: int) -> frozenset[int]:
    """A layer and everything that it depends on."""
    found: set[int] = set()
    ahead = [place]
    while ahead:
        layer = ahead.pop()
        if layer not in found:
            found.add(layer)
            ahead += layers[layer].reads
    return frozenset(found)
