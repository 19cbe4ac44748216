"""Where the chain of layers of a kind of call is cut: seen in a call of the whole, without values or with, maybe timed.

Of calls that are timed the first is not: weights are read for the first time in it, and memory is taken. All ranks know
of the same calls, and take the times of the first rank, so all of them cut alike.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.depth import Depth, divide
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan
from distrifusion.strategies.watching import Seen, Stopwatch, Watch


@dataclass(frozen=True)
class Cut:
    """A kind of call: its layers by name, in the order in which they run, who runs them, and what the model gives."""

    seen: dict[str, Seen]
    places: dict[str, int]
    depth: Depth
    result: Any


@dataclass
class Known:
    """What calls of the whole have shown of a kind of call.

    Attributes:
        seen: uses of layers, in their order.
        result: what the model gives, with tensors that have no values.
        took: nanoseconds of every use, the least of the calls that were timed; none if none was.
    """

    seen: list[Seen]
    result: Any
    took: list[int] = field(default_factory=list)


class Cuts:
    """The cuts of all kinds of calls.

    Args:
        exchange: this rank's.
        plan: into how many components.
    """

    def __init__(self, exchange: Exchange, plan: Plan) -> None:
        self._exchange = exchange
        self._plan = plan
        self._known: dict[Hashable, Known] = {}
        self._cuts: dict[Hashable, Cut] = {}
        self._costs: dict[Hashable, list[int]] = {}

    def get(self, kind: Hashable) -> Cut | None:
        """Where calls of a kind are cut, if that is known."""
        return self._cuts.get(kind)

    def num_layers(self, kind: Hashable) -> int | None:
        """How many layers run in calls of a kind, if one was seen."""
        known = self._known.get(kind)
        return None if known is None else len(known.seen)

    def note(self, kind: Hashable, observer: Watch | Stopwatch, result: Any) -> None:
        """Keep what was seen in a call of the whole, made or foreseen."""
        if isinstance(observer, Watch):
            self._known[kind] = Known(observer.seen, map_tensors(result, _without_values))
        else:
            known = self._known[kind]
            known.took = list(map(min, known.took or observer.nanoseconds, observer.nanoseconds))

    def cut(self, kind: Hashable, chain: Hashable, device: torch.device) -> Cut:
        """Cut calls of a kind from now on; every rank calls it.

        Args:
            kind: one that was seen.
            chain: what must be alike in two kinds whose layers take the same time.
            device: on which ranks tell each other what they took.
        """
        known = self._known[kind]
        names = [use.name for use in known.seen]
        # Kinds that may follow each other in one request, as when a ControlNet ends, must be cut alike.
        chain = chain, tuple(names)
        if chain not in self._costs:
            took, counted = known.took, [use.layer.cost for use in known.seen]
            self._costs[chain] = self._of_first_rank(took, names[0], device) if took else counted
        layers = [replace(use.layer, cost=cost) for use, cost in zip(known.seen, self._costs[chain], strict=True)]
        depth = divide(layers, self._plan.components, self._plan.stride)
        places = {name: place for place, name in enumerate(names)}
        self._cuts[kind] = Cut(dict(zip(names, known.seen, strict=True)), places, depth, known.result)
        return self._cuts[kind]

    def _of_first_rank(self, took: list[int], name: str, device: torch.device) -> list[int]:
        """What layers took on the first rank, told to all."""
        own, transport = torch.tensor(took, device=device), self._exchange.transport
        takers = range(1, transport.world_size) if transport.rank == 0 else ()
        shapes = {0: own.shape} if transport.rank else {}
        told: list[int] = self._exchange.collect(f"times of {name}", own, shapes, takers).wait().get(0, own).tolist()
        return told


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")
