"""Components in depth that run at once (AsyncDiff, arXiv 2406.06911): each on what the others gave a call before.

Every rank goes through the model's own forward. Layers of its component run. A layer of another one does not: what own
layers read of its output was sent by the rank that runs it, and zeros stand for what they do not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from distrifusion.anatomy.base import LinkSite
from distrifusion.depth import Depth, divide
from distrifusion.errors import PlanError, UnsupportedModel
from distrifusion.exchange.verbs import Exchange
from distrifusion.nested import map_tensors, tensors_of
from distrifusion.plan import Plan
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.watching import Seen, Watch

Forward = Callable[..., Any]


@dataclass(frozen=True)
class ComponentStep:
    """What a layer must know of the denoiser call it is in.

    Attributes:
        kind: what must be alike in two calls in which the same layers read the same.
        team: ranks of the components, in their order.
        index: this rank's component.
        runs: this rank's component runs in this call; otherwise none of its layers does.
        keeps: what is taken must be there in the next call.
    """

    kind: Hashable
    team: tuple[int, ...]
    index: int
    runs: bool = True
    keeps: bool = False


@dataclass(frozen=True)
class Cut:
    """A kind of call: its layers by name, in the order in which they run, who runs them, and what the model gives."""

    seen: dict[str, Seen]
    places: dict[str, int]
    depth: Depth
    result: Any


class ComponentStrategy:
    """Runs the layers of one component.

    The first call of a kind runs whole on every rank and is watched: what reads what, and what costs how much, says
    where the chain is cut, alike on all ranks.
    """

    def __init__(self, exchange: Exchange, plan: Plan) -> None:
        self._exchange = exchange
        self._plan = plan
        self._cuts: dict[Hashable, Cut] = {}
        self._step: ComponentStep | None = None
        self._watch: Watch | None = None
        self._uses: Counter[str] = Counter()
        self._stream: list[torch.Tensor] | None = None

    def attach(self, sites: Sequence[LinkSite], attachment: Attachment) -> None:
        """Replace the forward of every layer of the chain."""
        for site in sites:
            attachment.replace(site.module, "forward", partial(partial, self._layer, site))

    def cut_of(self, kind: Hashable) -> Cut | None:
        """Who runs what in calls of a kind; None before the first."""
        return self._cuts.get(kind)

    def run(self, forward: Callable[[], Any], step: ComponentStep) -> Any:
        """The model's result: whole on every rank in the first call of a kind, then on the last component's alone."""
        self._step, self._stream = step, None
        self._uses.clear()
        if step.kind not in self._cuts:
            result = self._watched(forward, step)
        else:
            result = forward()
            self._check_all_ran(self._cuts[step.kind])
        self._stream = None
        return result

    def _check_all_ran(self, cut: Cut) -> None:
        if self._uses.total() != len(cut.places):
            raise UnsupportedModel(
                f"plan '{self._plan}': {self._uses.total()} layers ran where {len(cut.places)} did in a call of the "
                "same arguments; what a model runs must not change within a run"
            )

    def _watched(self, forward: Callable[[], Any], step: ComponentStep) -> Any:
        self._watch = watch = Watch(retain=step.keeps)
        try:
            with watch:
                result = forward()
        finally:
            self._watch = None
        check_components(self._plan, len(watch.seen))
        depth = divide([seen.layer for seen in watch.seen], self._plan.components, self._plan.stride)
        names = [seen.name for seen in watch.seen]
        cut = Cut(
            seen=dict(zip(names, watch.seen, strict=True)),
            places={name: place for place, name in enumerate(names)},
            depth=depth,
            result=map_tensors(result, lambda tensor: torch.empty_like(tensor, device="meta")),
        )
        self._cuts[step.kind] = cut
        for place in sorted(depth.takes[step.index]) if step.keeps else ():
            giver = step.team[depth.owner[place]]
            self._exchange.keep(names[place], self._of_stream(watch.outputs[place], -1), giver)
        return result

    def _layer(self, site: LinkSite, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        use = self._uses[site.name]
        self._uses[site.name] += 1
        name = f"{site.name}, use {use + 1}" if use else site.name
        if self._stream is None:
            # Copies: a layer that runs may overwrite what it reads, and one that does not will not.
            self._stream = [tensor.clone() for tensor in tensors_of((args, kwargs))]
        if self._watch is not None:
            return self._watch.run(name, forward, args, kwargs)
        assert self._step is not None, "a layer of a chain that was cut ran outside a denoiser call"
        cut, index = self._cuts[self._step.kind], self._step.index
        if name not in cut.places:
            raise UnsupportedModel(f"plan '{self._plan}': layer '{name}' did not run in an earlier call of this kind")
        place = cut.places[name]
        if place not in cut.depth.runs[index]:
            return self._foreign(name, cut) if place in cut.depth.takes[index] else self._room(name, cut)
        if not self._step.runs:
            return self._room(name, cut)
        output = forward(*args, **kwargs)
        if cut.depth.owner[place] == index and (takers := cut.depth.takers(place)):
            self._exchange.give(name, self._of_stream(output, -1), [self._step.team[taker] for taker in takers])
        return output

    def _foreign(self, name: str, cut: Cut) -> Any:
        """A layer's output as the rank that runs it gave it."""
        assert self._step is not None and self._stream is not None
        output, giver = cut.seen[name].output, self._step.team[cut.depth.owner[cut.places[name]]]
        taken = self._exchange.take(name, list(tensors_of(output)), giver, self._stream[0].device)
        return _filled(output, self._of_stream(taken, 1))

    def _room(self, name: str, cut: Cut) -> Any:
        """What stands for a layer's output where no own layer reads it."""
        assert self._stream is not None
        device = self._stream[0].device
        return map_tensors(cut.seen[name].output, lambda like: torch.zeros_like(like, device=device))

    def _of_stream(self, output: Any, sign: int) -> list[torch.Tensor]:
        """The tensors of a layer's output, less (or plus) what the chain began with where that has the same shape.

        What travels is so what the layers have added; the newest beginning is under it on both sides.
        """
        assert self._stream is not None
        found = []
        for tensor in tensors_of(output):
            base = next((t for t in self._stream if t.shape == tensor.shape and t.dtype == tensor.dtype), None)
            found.append(tensor if base is None else torch.add(tensor, base, alpha=sign))
        return found


def _filled(like: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Nested tensors in the form of others."""
    each = iter(tensors)
    return map_tensors(like, lambda _: next(each))


def check_components(plan: Plan, num_layers: int) -> None:
    """Raise PlanError if a plan has more components than a chain has layers."""
    if plan.components > num_layers:
        raise PlanError(
            f"plan '{plan}': a chain of {num_layers} layers cannot be cut into {plan.components} components; use "
            f"'async{num_layers}' or fewer"
        )
