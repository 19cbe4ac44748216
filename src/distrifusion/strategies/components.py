"""Components in depth that run at once (AsyncDiff, arXiv 2406.06911): each on what the others gave a call before.

Every rank goes through the model's own forward. Layers of its component run. A layer of another one does not: what own
layers read of its output was sent by the rank that runs it, and zeros stand for what they do not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy.base import LinkSite
from distrifusion.errors import PlanError, UnsupportedModel
from distrifusion.exchange.verbs import Exchange
from distrifusion.nested import map_tensors, tensors_of
from distrifusion.plan import Plan
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.cutting import Cut, Cuts
from distrifusion.strategies.watching import Stopwatch, Watch
from distrifusion.strategies.weights import Aside

Forward = Callable[..., Any]


@dataclass(frozen=True)
class ComponentStep:
    """What a layer must know of the denoiser call it is in.

    Attributes:
        kind: what must be alike in two calls in which the same layers read the same.
        chain: what must be alike in two calls in which the same layers take the same time.
        team: ranks of the components, in their order.
        index: this rank's component.
        runs: this rank's component runs in this call; otherwise none of its layers does.
        keeps: what is taken must be there in the next call.
        cuts: if this kind of call is not cut yet, it is after this call.
    """

    kind: Hashable
    chain: Hashable
    team: tuple[int, ...]
    index: int
    runs: bool = True
    keeps: bool = False
    cuts: bool = True


@dataclass
class Whole:
    """A call that runs whole on every rank.

    Attributes:
        observer: looks on.
        sites: the layers that have run, by name, in their order.
        outputs: what they gave, if it must be kept.
    """

    observer: Watch | Stopwatch
    sites: list[str] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


class ComponentStrategy:
    """Runs the layers of one component.

    The first call of a kind runs whole on every rank and is watched, maybe some more are timed: what reads what, and
    what costs how much, says where the chain is cut, alike on all ranks. Only then it is known which weights a rank
    works with.
    """

    def __init__(self, exchange: Exchange, plan: Plan) -> None:
        self._exchange = exchange
        self._plan = plan
        self._cuts = Cuts(exchange, plan)
        self._step: ComponentStep | None = None
        self._whole: Whole | None = None
        self._uses: Counter[str] = Counter()
        self._stream: list[torch.Tensor] | None = None
        self._sites: Sequence[LinkSite] = ()
        self._first: nn.Parameter | None = None
        self._own: set[str] = set()
        self._aside = Aside(Attachment())

    def attach(self, model: nn.Module, sites: Sequence[LinkSite], attachment: Attachment) -> None:
        """Replace the forward of every layer of the chain, and set aside the weights of those that do not run here."""
        self._sites, self._first = sites, next(model.parameters())
        for site in sites:
            attachment.replace(site.module, "forward", partial(partial, self._layer, site))
        self._aside = Aside(attachment)
        self._aside.hold(self.idle)

    @property
    def idle(self) -> list[nn.Module]:
        """The layers of other components in every kind of call so far; none before the first was cut.

        Not the layer that has the model's first parameter: a model says by it on which device it is.
        """
        if not self._own:
            return []
        foreign = [site.module for site in self._sites if site.name not in self._own]
        return [module for module in foreign if all(p is not self._first for p in module.parameters())]

    def cut_of(self, kind: Hashable) -> Cut | None:
        """Who runs what in calls of a kind; None while they run whole."""
        return self._cuts.get(kind)

    def run(self, forward: Callable[[], Any], step: ComponentStep) -> Any:
        """The model's result: whole on every rank until a kind of call is cut, then on the last component's alone."""
        self._step, self._stream = step, None
        self._uses.clear()
        cut = self._cuts.get(step.kind)
        result = forward() if cut else self._run_whole(forward, step)
        if cut:
            self._check_all_ran(len(cut.places))
        self._stream = None
        return result

    def _check_all_ran(self, expected: int) -> None:
        if self._uses.total() != expected:
            raise UnsupportedModel(
                f"plan '{self._plan}': {self._uses.total()} layers ran where {expected} did in a call of the same "
                "arguments; what a model runs must not change within a run"
            )

    def _run_whole(self, forward: Callable[[], Any], step: ComponentStep) -> Any:
        expected = self._cuts.num_layers(step.kind)
        self._whole = whole = Whole(Watch() if expected is None else Stopwatch())
        try:
            with whole.observer:
                result = forward()
        finally:
            self._whole = None
        check_components(self._plan, len(whole.sites))
        self._check_all_ran(expected or len(whole.sites))
        self._cuts.note(step.kind, whole.observer, result)
        if step.cuts:
            self._cut(step, whole, next(tensors_of(result)).device)
        return result

    def _cut(self, step: ComponentStep, whole: Whole, device: torch.device) -> None:
        """Let components run from the next call on, which may take what the whole gave in this one."""
        cut = self._cuts.cut(step.kind, step.chain, device)
        self._own |= {whole.sites[place] for place in cut.depth.runs[step.index]}
        self._aside.hold(self.idle)
        names = list(cut.places)
        for place in sorted(cut.depth.takes[step.index]) if step.keeps else ():
            giver = step.team[cut.depth.owner[place]]
            self._exchange.keep(names[place], self._of_stream(whole.outputs[place], -1), giver)

    def _layer(self, site: LinkSite, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        use = self._uses[site.name]
        self._uses[site.name] += 1
        name = f"{site.name}, use {use + 1}" if use else site.name
        if self._stream is None:
            # Copies: a layer that runs may overwrite what it reads, and one that does not will not.
            self._stream = [tensor.clone() for tensor in tensors_of((args, kwargs))]
        assert self._step is not None, "a layer of a chain ran outside a denoiser call"
        if self._whole is not None:
            return self._look_on(self._whole, site, partial(self._whole.observer.run, name, forward, args, kwargs))
        cut, index = self._cuts.get(self._step.kind), self._step.index
        assert cut is not None
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

    def _look_on(self, whole: Whole, site: LinkSite, run: Callable[[], Any]) -> Any:
        """A layer's output in a call of the whole."""
        assert self._step is not None
        with self._aside.lent(site.module):
            output = run()
        whole.sites.append(site.name)
        if self._step.keeps:
            whole.outputs.append(map_tensors(output, torch.clone))
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
