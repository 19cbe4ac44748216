"""Bytes that a plan keeps of a transformer, from a pass of the model's own code over tensors that have no values.

How many tokens attend at a layer, only the model's code knows. It is run on torch's "meta" device, on a model of the
same configuration: nothing is computed, and what a model keeps of its own calls (tables of positions) is not touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.base import Site
from distrifusion.anatomy.blocks import alike_parts, blocks_of
from distrifusion.anatomy.tokens import JoinSite, TokenAnatomy, TokenAttentionSite, TokenCall
from distrifusion.errors import UnsupportedModel
from distrifusion.exchange.handles import with_length
from distrifusion.exchange.transport import SingleTransport
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.mesh import AttentionAxes, RankGrid, StagePlace
from distrifusion.layout.partition import Interval, split_evenly, token_intervals
from distrifusion.memory.prediction import gathered_bytes
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan, SiteKind
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.attention import Piece, TokenStep
from distrifusion.strategies.token_patch import GatheredAttention
from distrifusion.strategies.tokens import TokenStrategy, TooFewTokens

_MOST_ASKED = 16  # calls of different shapes whose answers are kept


def pool_bytes_of_call(model: nn.Module, plan: Plan, *args: Any, **kwargs: Any) -> list[int]:
    """Bytes that every rank keeps between calls of a transformer; an exact plan keeps nothing.

    Args:
        model: the denoiser, divided or not, on any device.
        plan: how it is divided.
        args, kwargs: arguments of one call for all ranks, on any device; of tensors only shapes and types count.

    Raises:
        UnsupportedModel: if the model is no transformer that is known, or cannot be built from its configuration, or
            does something in its forward that needs values.
    """
    anatomy = anatomy_of(model)
    if not isinstance(anatomy, TokenAnatomy):
        raise UnsupportedModel(f"{type(model).__name__} has rows and columns; ask pool_bytes of memory.prediction")
    question = StageQuestion if plan.stages > 1 else TokenQuestion
    call = anatomy.bind(type(model).forward.__get__(model), args, kwargs)
    return question(TokenShapes(model, anatomy), call).by_rank(plan)


@dataclass(frozen=True)
class _Part:
    """Keys, and as many values, of one place at one use of a layer.

    Attributes:
        name: of the layer.
        shape: L tokens, B batch, 2 pieces, channels of all heads.
        num_heads: that share the channels.
        itemsize: bytes of a value.
        bias: values that are added to the scores of one key; 0 without a mask.
    """

    name: str
    shape: tuple[int, int, int, int]
    num_heads: int
    itemsize: int
    bias: int


class TokenShapes:
    """What attention of a transformer is asked, as shapes.

    Args:
        model: the transformer.
        anatomy: its family's.
        kind: of question that is made of a call; None: `TokenQuestion`.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: TokenAnatomy,
        kind: Callable[[TokenShapes, TokenCall], TokenQuestion] | None = None,
    ) -> None:
        self._model = model
        self._anatomy = anatomy
        self._kind = kind or TokenQuestion
        self._empty: tuple[nn.Module, _Listener] | None = None
        self._asked: dict[str, TokenQuestion | None] = {}

    def question(self, call: TokenCall, plan: Plan) -> TokenQuestion | None:
        """A call as one whose values a plan is to keep; None, with a warning, where shapes do not tell."""
        # Not asked again for each request: a pass runs all of the model's Python.
        alike = repr(map_tensors(dict(call.bound.arguments), lambda tensor: (tensor.shape, tensor.dtype)))
        if alike not in self._asked:
            if len(self._asked) == _MOST_ASKED:
                self._asked.clear()
            self._asked[alike] = self._ask(call, plan)
        return self._asked[alike]

    def _ask(self, call: TokenCall, plan: Plan) -> TokenQuestion | None:
        question = self._kind(self, call)
        try:
            question.by_rank(plan)
        except UnsupportedModel as error:
            warnings.warn(f"{error}; a plan that does not fit will end with OutOfMemory instead", stacklevel=2)
            return None
        return question

    def stages(self, num_stages: int) -> list[tuple[str, ...]]:
        """How the names of the layers of every stage begin."""
        blocks = blocks_of(self._model, self._anatomy.blocks)
        attentions = [site for site in self._anatomy.sites(self._model) if isinstance(site, TokenAttentionSite)]
        parts = alike_parts(blocks, attentions, num_stages)
        return [tuple(f"{block.name}." for block in blocks[part.start : part.stop]) for part in parts]

    def run(self, call: TokenCall, team: int, index: int, piece: Piece | None = None) -> tuple[list[_Part], list[int]]:
        """What one place has in a call without values, and the lengths of all streams that were cut.

        Raises:
            TooFewTokens: if one of them has fewer tokens than the team has places.
            UnsupportedModel: if shapes do not tell.
        """
        if self._empty is None:
            model, listener = _without_values(self._model), _Listener()
            listener.attach(self._anatomy.sites(model), Attachment())
            self._empty = model, listener
        model, listener = self._empty
        listener.parts.clear()
        step = TokenStep(tuple(range(team)), index, AttentionAxes.of(Plan(patch=team), team, index), piece=piece)
        try:
            with torch.no_grad():
                listener.run(step, model.forward, call, self._anatomy.own_cuts)
        except RuntimeError as error:
            raise UnsupportedModel(
                f"{type(model).__name__} needs more than shapes to tell how many tokens attend, so what a plan keeps "
                f"is not known before: {error}"
            ) from error
        return [*listener.parts], [*listener.wholes.values()]


class TokenQuestion:
    """What a call of a transformer keeps."""

    def __init__(self, shapes: TokenShapes, call: TokenCall) -> None:
        self._shapes = shapes
        self._call = call.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        self._found: dict[tuple[int, int], list[list[_Part]]] = {}

    def by_rank(self, plan: Plan) -> list[int]:
        """Bytes that every rank of a plan would keep."""
        return [self._kept_by(plan, rank) if SiteKind.KV in plan.kept else 0 for rank in range(plan.num_ranks)]

    def smaller(self, part: float) -> None:
        """Which arguments would be smaller for a smaller picture only the pipeline knows."""

    def parts(self, rows: Interval, team: int) -> list[list[_Part]]:
        """What every place of a team has at every layer that attends, in the order of their calls.

        Raises:
            UnsupportedModel: if shapes do not tell.
        """
        key = (len(rows), team)
        if key not in self._found:
            try:
                self._found[key] = [*self._by_place(self._call.take_rows(rows), team)]
            except TooFewTokens:  # every rank has all of them, and keeps nothing
                self._found[key] = [[]] * team
        return self._found[key]

    def _kept_by(self, plan: Plan, rank: int) -> int:
        layout = RankGrid(plan, rank).layout(self._call.sample.shape[0])
        uses = zip(*self.parts(layout.rows, len(layout.team)), strict=True)
        return sum(gathered_bytes(plan, [p.shape for p in use], layout.index, use[0].itemsize) for use in uses)

    def _by_place(self, call: TokenCall, team: int) -> Iterator[list[_Part]]:
        self._shapes.run(call, 1, 0)  # all tokens at every join, which the passes of the parts are told
        first, streams = self._shapes.run(call, team, 0)
        places = [tuple(len(token_intervals(length, team)[place]) for length in streams) for place in range(team)]
        found = {places[0]: first}
        for place, lengths in enumerate(places):
            if lengths not in found:
                found[lengths], _ = self._shapes.run(call, team, place)
            yield found[lengths]


class StageQuestion(TokenQuestion):
    """What a call keeps whose pieces flow through stages: each rank the keys and values of its own blocks."""

    def __init__(self, shapes: TokenShapes, call: TokenCall) -> None:
        super().__init__(shapes, call)
        self._wholes: dict[int, tuple[list[_Part], list[int]]] = {}

    def by_rank(self, plan: Plan) -> list[int]:
        """Bytes that every rank of a plan would keep."""
        return [self._kept_by(plan, rank) if plan.late else 0 for rank in range(plan.num_ranks)]

    def _kept_by(self, plan: Plan, rank: int) -> int:
        layout = RankGrid(plan, rank).layout(self._call.sample.shape[0])
        place = StagePlace.of(plan, layout)
        num_rows = len(layout.rows)
        if num_rows not in self._wholes:
            self._wholes[num_rows] = self._shapes.run(self._call.take_rows(layout.rows), 1, 0, Piece())
        parts, streams = self._wholes[num_rows]
        own = self._shapes.stages(plan.stages)[place.stage]
        # Where a stream has fewer tokens than a stage has ranks, each of them has all heads.
        size, index = (len(place.group), place.index) if min(streams) >= len(place.group) else (1, 0)
        return sum(_piece_bytes(part, plan, size, index) for part in parts if part.name.startswith(own))


def _piece_bytes(part: _Part, plan: Plan, size: int, index: int) -> int:
    """Bytes of the keys and values of all tokens at one layer whose heads a group divides, and of their bias."""
    heads = len(split_evenly(part.num_heads, size)[index])
    pairs = prod(part.shape) // part.num_heads * heads * (2 if plan.forecast else 1)
    return part.itemsize * (pairs + (part.bias * part.shape[0] if heads else 0))


class _Listener(TokenStrategy):
    """Cuts streams as ever, and notes what attention is asked instead of exchanging anything."""

    def __init__(self) -> None:
        nobody = Exchange(SingleTransport())
        super().__init__(nobody, GatheredAttention(nobody))
        self.parts: list[_Part] = []
        self._whole: dict[str, int] = {}

    def answer(
        self,
        site: Site,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Note the keys [B, N, L, D]; anything of the shape of the queries is an answer."""
        batch, num_heads, length, channels = key.shape
        shape = (length, batch, 2, num_heads * channels)
        bias = 0 if attn_mask is None else attn_mask.shape[0] * attn_mask.shape[1]
        self.parts.append(_Part(site.name, shape, num_heads, key.dtype.itemsize, bias))
        return torch.empty_like(query)

    def join(self, site: JoinSite, own: torch.Tensor) -> torch.Tensor:
        """As many tokens as there were in the pass that had all."""
        if len(self.step.team) == 1:
            self._whole[site.name] = own.shape[site.dim]
        return own.new_empty(with_length(own.shape, site.dim, self._whole[site.name]))


def _without_values(model: Any) -> nn.Module:
    """A model of the same configuration and types whose parameters have no values; raises UnsupportedModel."""
    if not isinstance(model, ConfigMixin):
        raise UnsupportedModel(f"{type(model).__name__} has no configuration to build it from without its weights")
    with torch.device("meta"):
        empty = type(model).from_config(model.config)
    types = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in empty.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(types.get(name, model.dtype))  # an adapter's layers have names of their own
    return empty.eval()
