"""A denoiser's calls cut in depth: each rank runs the layers of a component, and one gives the prediction."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from distrifusion.anatomy.base import Anatomy, BoundCall, LinkSite, Site
from distrifusion.anatomy.tokens import TokenAnatomy, TokenCall
from distrifusion.exchange.handles import Swap
from distrifusion.layout.mesh import CallLayout
from distrifusion.nested import map_tensors, take_rows, tensors_of
from distrifusion.rules.rule import Rule, Subject
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.components import ComponentStep, ComponentStrategy, check_components
from distrifusion.strategies.weights import num_bytes

Call = BoundCall | TokenCall


class ComponentRule(Rule[Anatomy | TokenAnatomy]):
    """How a denoiser is divided in depth within a team: every rank has all latents, and runs the layers of a component.

    A model without a chain of layers (a ControlNet) runs whole on every rank, for its rows of the batch.

    Raises:
        PlanError: if the plan has more components than the model has layers in a chain.
    """

    def __init__(self, subject: Subject[Anatomy | TokenAnatomy]) -> None:
        super().__init__(subject)
        self._components = ComponentStrategy(self._exchange, self._plan, self.aside)
        self._chain: list[LinkSite] = []
        self._expected: list[Swap] | None = None
        self._here: Swap | None = None
        self._whole = True

    def sites(self) -> list[Site]:
        """The layers of the chain."""
        links = self._anatomy.links(self._model)
        if links:
            check_components(self._plan, len(links))
        return list(links)

    def weight_bytes(self) -> int:
        """Bytes of the model's weights without the layers of other components; of all until it is known which."""
        return num_bytes(self.aside.modules if self._components.own else (), self._model)

    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of the layers."""
        self._chain = [site for site in sites if isinstance(site, LinkSite)]
        self._components.attach(self._chain, layers)

    def question(self, call: Call) -> None:
        """What is kept is known when the chain has been cut."""

    def compute(
        self, forward: Callable[..., Any], call: Call, layout: CallLayout, num_before: int, past_warmup: bool
    ) -> Any:
        """Run the model's own forward on this rank's batch rows; layers of other components do not run in it."""
        rows = partial(take_rows, layout.rows, call.sample.shape[0])
        args, kwargs = call.of_rows(rows)
        self._here = self._meet(call.sample)
        self._expected = None
        self._whole = True
        if not self._chain:
            return forward(*args, **kwargs)
        step = ComponentStep(
            kind=(layout.rows, call.key, form_of([*args, *sorted(kwargs.items())])),
            chain=call.key,
            team=layout.team,
            index=layout.index,
            runs=_is_last(layout) or self._plan.renews(num_before),
            keeps=self._plan.late and num_before + 1 >= self._plan.num_synchronous,
            cuts=num_before + 1 >= self._plan.num_whole,
        )
        if self._components.cut_of(step.kind) is None:
            self._components.foresee(self._model, forward, args, kwargs, step)
            # Of calls of a kind that is new nothing may have been kept.
            self._exchange.catch_up()
            step = replace(step, runs=True)
        given_at = self._exchange.given_at if self._plan.timeshift and layout.index else None
        if given_at is not None:
            args, kwargs = call.at(given_at).of_rows(rows)
        if (cut := self._components.cut_of(step.kind)) is not None:
            self._whole = False
            if not _is_last(layout):
                self._expected = self._expect(list(tensors_of(cut.result)), layout, call.sample.device)
        return self._components.run(partial(forward, *args, **kwargs), step)

    def _expect(self, result: Sequence[torch.Tensor], layout: CallLayout, device: torch.device) -> list[Swap]:
        """Ask for the prediction before the own layers run: who gives it does not wait until it is taken."""
        nothing = [like.new_empty(0, device=device) for like in result]
        return [self._trade(own, like.shape, layout, takers=()) for own, like in zip(nothing, result, strict=True)]

    def join(self, result: Any, call: Call, layout: CallLayout) -> Any:
        """The model's own output with all rows of the batch."""
        assert self._here is not None
        self._here.wait()
        if not self._chain and isinstance(call, BoundCall) and self._stays_cut(call):
            return result
        own = list(tensors_of(result))
        if self._expected is None:
            takers = layout.others_with_my_band if self._whole else self._mates(layout)
            swaps = [self._trade(tensor.contiguous(), tensor.shape, layout, takers) for tensor in own]
        else:
            swaps = self._expected
        wholes = iter([self._rows(swap, tensor, layout) for swap, tensor in zip(swaps, own, strict=True)])
        return map_tensors(result, lambda _: next(wholes))

    def _stays_cut(self, call: BoundCall) -> bool:
        return not isinstance(self._anatomy, TokenAnatomy) and self._anatomy.stays_cut(call)

    def _meet(self, like: torch.Tensor) -> Swap:
        """Say that this rank is in the call, and hear it of all: none is more than a call ahead of another.

        Who cancels a run relies on it, and nothing else makes a rank wait for those that come after its component.
        """
        transport = self._exchange.transport
        others = [rank for rank in range(transport.world_size) if rank != transport.rank]
        byte = torch.zeros(1, dtype=torch.uint8, device=like.device)
        return self._exchange.collect(f"{self._prefix}here", byte, dict.fromkeys(others, byte.shape))

    def _trade(self, own: torch.Tensor, shape: torch.Size, layout: CallLayout, takers: Sequence[int]) -> Swap:
        """Give the own rows of the prediction to some ranks, and ask for those of the ranks that have others."""
        givers = layout.others_with_my_band if self._whole else self._givers(layout)
        shapes = {rank: torch.Size((len(layout.batch[rank]), *shape[1:])) for rank in givers}
        return self._exchange.collect(f"{self._prefix}exit", own, shapes, takers)

    def _rows(self, swap: Swap, own: torch.Tensor, layout: CallLayout) -> torch.Tensor:
        """All rows of the prediction [B, ...], in the order of the batch."""
        parts = {layout.batch[rank].start: tensor for rank, tensor in swap.wait().items()}
        parts.setdefault(layout.rows.start, own)
        return torch.cat([parts[start] for start in sorted(parts)]) if len(parts) > 1 else parts[layout.rows.start]

    def _mates(self, layout: CallLayout) -> tuple[int, ...]:
        """The other ranks of this team, and of those that evaluate the other rows of the batch with it."""
        own = layout.team[layout.index]
        return tuple(r for r, replica in enumerate(layout.replica) if replica == layout.replica[own] and r != own)

    def _givers(self, layout: CallLayout) -> tuple[int, ...]:
        """The ranks that run the last component for this rank and others, and are not this one."""
        return tuple(rank for rank in self._mates(layout) if layout.band[rank] == len(layout.team) - 1)


def _is_last(layout: CallLayout) -> bool:
    return layout.index == len(layout.team) - 1


def form_of(value: Any) -> Hashable:
    """What is alike in two calls that run the same layers: shapes, words, switches, whole numbers in lists."""
    match value:
        case torch.Tensor():
            return tuple(value.shape), value.dtype
        case Mapping():
            return tuple((name, form_of(item)) for name, item in value.items())
        case list() | tuple():
            return tuple(item if type(item) is int else form_of(item) for item in value)
        case bool() | str() | None:
            return value
    return type(value).__name__
