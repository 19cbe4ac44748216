"""Components in depth that run at once (AsyncDiff, arXiv 2406.06911): each on what the others gave a call before.

Every rank goes through the model's own forward. Layers of its component run. A layer of another one does not: what own
layers read of its output was sent by the rank that runs it, and zeros stand for what they do not read.
"""

from __future__ import annotations

import warnings
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
from distrifusion.strategies.foreseeing import foresee
from distrifusion.strategies.watching import Stopwatch, Uses, Watch
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
        outputs: what layers gave, in the order in which they ran, if it must be kept.
    """

    observer: Watch | Stopwatch
    outputs: list[Any] = field(default_factory=list)


class ComponentStrategy:
    """Runs the layers of one component.

    Before the first call of a kind it is foreseen what reads what, and what costs how much: that says where the chain
    is cut, alike on all ranks, and which weights a rank works with. Where it cannot be foreseen, or layers are to be
    timed, the first calls run whole on every rank and are watched; weights are then fetched for one layer at a time.

    Args:
        exchange: this rank's.
        plan: into how many components.
        aside: holds the layers of other components.

    Attributes:
        own: names of the layers that this rank runs in any kind of call so far.
    """

    def __init__(self, exchange: Exchange, plan: Plan, aside: Aside) -> None:
        self._exchange = exchange
        self._plan = plan
        self._aside = aside
        self._cuts = Cuts(exchange, plan)
        self._step: ComponentStep | None = None
        self._whole: Whole | None = None
        self._uses = Uses()
        self._stream: list[torch.Tensor] | None = None
        self._chain: dict[LinkSite, Forward] = {}
        self._warned = False
        self.own: set[str] = set()

    def attach(self, sites: Sequence[LinkSite], attachment: Attachment) -> None:
        """Replace the forward of every layer of the chain, and set aside the weights of those that do not run here."""
        self._chain = {site: site.module.forward for site in sites}
        for site in sites:
            attachment.replace(site.module, "forward", partial(partial, self._layer, site))
        self._set_aside()

    def _set_aside(self) -> None:
        self._aside.hold(site.module for site in self._chain if site.name not in self.own)

    def cut_of(self, kind: Hashable) -> Cut | None:
        """Who runs what in calls of a kind; None while they run whole."""
        return self._cuts.get(kind)

    def foresee(
        self, model: nn.Module, forward: Forward, args: Sequence[Any], kwargs: dict[str, Any], step: ComponentStep
    ) -> None:
        """Cut a kind of call before the first one is made, where shapes tell all that is wanted.

        Args:
            model: the denoiser.
            forward: its own.
            args, kwargs: of this rank's call.
            step: the call.
        """
        if self._plan.timed or self._cuts.num_layers(step.kind) is not None:
            return
        layers = {site.name: (site.module, forward) for site, forward in self._chain.items()}
        try:
            watch, result = foresee(model, forward, layers, args, kwargs)
        except Exception as error:  # the model's code may be anything; what is wrong with the call, the call will say
            self._warn(model, error)
            return
        check_components(self._plan, len(watch.seen))
        self._cuts.note(step.kind, watch, result)
        self._cut(step, next(tensors_of((args, kwargs))).device)

    def _warn(self, model: nn.Module, error: Exception) -> None:
        if not self._warned and self._exchange.transport.rank == 0:
            reason = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"plan '{self._plan}': shapes do not tell where {type(model).__name__} is cut "
                f"({type(error).__name__}: {reason}); the first call of a shape runs whole on every rank",
                stacklevel=2,
            )
        self._warned = True

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
        check_components(self._plan, self._uses.total())
        self._check_all_ran(expected or self._uses.total())
        self._cuts.note(step.kind, whole.observer, result)
        if step.cuts:
            cut = self._cut(step, next(tensors_of(result)).device)
            self._keep(cut, step, whole.outputs)
        return result

    def _cut(self, step: ComponentStep, device: torch.device) -> Cut:
        """Let components run in calls of a kind from now on."""
        cut = self._cuts.cut(step.kind, step.chain, device)
        uses = list(cut.seen.values())
        self.own |= {uses[place].site for place in cut.depth.runs[step.index]}
        self._set_aside()
        return cut

    def _keep(self, cut: Cut, step: ComponentStep, outputs: Sequence[Any]) -> None:
        """Let the next call take what layers gave in one that ran whole; nothing if there are no outputs."""
        names = list(cut.places)
        for place in sorted(cut.depth.takes[step.index]) if outputs else ():
            giver = step.team[cut.depth.owner[place]]
            self._exchange.keep(names[place], self._of_stream(outputs[place], -1), giver)

    def _layer(self, site: LinkSite, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        name = self._uses.next(site.name)
        if self._stream is None:
            # Copies: a layer that runs may overwrite what it reads, and one that does not will not.
            self._stream = [tensor.clone() for tensor in tensors_of((args, kwargs))]
        assert self._step is not None, "a layer of a chain ran outside a denoiser call"
        if self._whole is not None:
            return self._look_on(self._whole, site, partial(self._whole.observer.run, site.name, forward, args, kwargs))
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
