"""A transformer's calls divided in depth: pieces of the tokens flow through stages, each rank runs its own blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.blocks import BlockSite, alike_parts, blocks_of
from distrifusion.anatomy.tokens import TokenAnatomy, TokenAttentionSite, TokenCall
from distrifusion.errors import PlanError
from distrifusion.exchange.arriving import Arriving, arrive, complete
from distrifusion.layout.mesh import AttentionAxes, CallLayout, StagePlace
from distrifusion.memory.tokens import StageQuestion, TokenQuestion, TokenShapes
from distrifusion.nested import map_tensors
from distrifusion.rules.predictions import Predictions, bands_of
from distrifusion.rules.rule import Rule, Subject
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.attention import Piece, TokenStep
from distrifusion.strategies.pipefusion import Flow, PieceAttention, StageStrategy, Stream
from distrifusion.strategies.tokens import TokenStrategy, TooFewTokens
from distrifusion.strategies.ulysses import UlyssesAttention


@dataclass
class Shapes:
    """What calls of one shape have in common; the first one of a request, which is of the whole, tells it.

    Attributes:
        pieces: what flows after the warm-up.
        picture: tokens of the picture.
        streams: what comes from the stage before, by piece.
    """

    pieces: tuple[Piece, ...]
    picture: int
    streams: dict[int, tuple[Stream, ...]] = field(default_factory=dict)


class StageRule(Rule[TokenAnatomy]):
    """How a transformer is divided in depth within a team (PipeFusion, arXiv 2405.14430).

    Raises:
        PlanError: if the model has skip connections, or fewer blocks than the plan has stages.
        UnsupportedModel: if it is not known what its blocks give to each other.
    """

    def __init__(self, subject: Subject[TokenAnatomy]) -> None:
        subject.plan.check_tokens(type(subject.model).__name__)
        super().__init__(subject)
        attend = PieceAttention(self._exchange)
        method = UlyssesAttention(self._exchange, attend) if self._plan.ulysses > 1 else attend
        self._tokens = TokenStrategy(self._exchange, method)
        self._stages = StageStrategy(self._exchange, self._tokens, attend, self._prefix)
        self._without_values = TokenShapes(self._model, self._anatomy, StageQuestion)
        self._shapes: dict[Hashable, Shapes] = {}
        self._check(blocks_of(self._model, self._anatomy.blocks))

    def _check(self, blocks: Sequence[BlockSite]) -> None:
        name = type(self._model).__name__
        if any(block.kind.skips for block in blocks):
            near = replace(self._plan, stages=1, pieces=None, late=False, forecast=0, ulysses=self._plan.team)
            raise PlanError(
                f"plan '{self._plan}': {name} has skip connections between the halves of its blocks, which would cross "
                f"the stages; use '{near}'"
            )
        if self._plan.stages > len(blocks):
            raise PlanError(
                f"plan '{self._plan}': {name} has {len(blocks)} blocks, so it has at most as many stages; use "
                f"'{replace(self._plan, stages=len(blocks))}'"
            )

    def sites(self) -> list[Site]:
        """All sites in the model's own order, blocks last; raises UnsupportedModel naming a layer without a rule."""
        return [*self._anatomy.sites(self._model), *blocks_of(self._model, self._anatomy.blocks)]

    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of the sites, and set the weights of other stages aside."""
        blocks = [site for site in sites if isinstance(site, BlockSite)]
        attentions = [site for site in sites if isinstance(site, TokenAttentionSite)]
        place = self._exchange.transport.rank % self._plan.team
        stage = place // (self._plan.team // self._plan.stages)
        own = alike_parts(blocks, attentions, self._plan.stages)[stage]
        self.aside.hold(block.module for block in blocks if not own.start <= block.index < own.stop)
        self._stages.attach(sites, own, layers)

    def question(self, call: TokenCall) -> TokenQuestion | None:
        """The call as one whose values are to be kept; None, with a warning, where shapes do not tell."""
        return self._without_values.question(call, self._plan)

    def compute(
        self, forward: Callable[..., Any], call: TokenCall, layout: CallLayout, num_before: int, past_warmup: bool
    ) -> Any:
        """Run the model's own forward for every piece, and get what the last stage predicts for all rows."""
        key, num_rows = call.key, call.sample.shape[0]
        shapes = self._shapes.get(key) if past_warmup else None
        in_pieces = shapes is not None and len(shapes.pieces) > 1
        latents = self._latents(call, shapes if in_pieces else None)
        call = call.take_rows(layout.rows)
        place = StagePlace.of(self._plan, layout)
        if shapes is not None and in_pieces:
            flow = Flow(place, shapes.pieces[0], shapes.picture, shapes.streams)
            return self._flow(forward, call, flow, layout, num_rows, latents)
        flow = Flow(place, Piece())
        result = self._flow(forward, call, flow, layout, num_rows, None)
        self._shapes.setdefault(key, self._shapes_of(call, flow.picture))
        return result

    def _latents(self, call: TokenCall, shapes: Shapes | None) -> Arriving | None:
        """The latents if they still arrive in the pieces of this call; otherwise they have arrived."""
        sample = call.sample
        if not isinstance(sample, Arriving):
            return None
        wanted = None if shapes is None else bands_of(sample, shapes.pieces, shapes.picture)
        if not self._anatomy.local or sample.bands != wanted:
            complete(sample)
            return None
        call.bound.arguments[self._anatomy.sample] = sample.so_far()
        return sample

    def _flow(
        self,
        forward: Callable[..., Any],
        call: TokenCall,
        flow: Flow,
        layout: CallLayout,
        num_rows: int,
        latents: Arriving | None,
    ) -> Any:
        """Run the forward for all pieces, each when its latents have come."""
        pieces = [replace(flow.piece, index=i) for i in range(flow.piece.num)]
        predictions: Predictions | None = None
        result = None
        self._stages.begin(flow)
        for piece in pieces:
            flow.turn(piece)
            if latents is not None and flow.place.stage == 0:
                arrive(latents, piece.index)
            result = self._run(forward, call, flow)
            predictions = predictions or Predictions(
                self._exchange, self._prefix, flow.place, layout, pieces, flow.picture
            )
            if flow.place.last:
                predictions.give(piece, result)
        if latents is not None:
            complete(latents)
        assert predictions is not None
        return map_tensors(result, partial(predictions.take, num_rows))

    def _run(self, forward: Callable[..., Any], call: TokenCall, flow: Flow) -> Any:
        place = flow.place
        axes = AttentionAxes.of(self._plan, len(place.group), place.index)
        step = TokenStep(place.group, place.index, axes, piece=flow.piece)
        run, cuts = self._tokens.run, self._anatomy.own_cuts
        try:
            return run(step, forward, call, cuts)
        except TooFewTokens:
            # Before anything was sent: every rank of the stage then has all tokens.
            own = place.group[place.index :][:1]
            alone = AttentionAxes((0,), (0,), (0, 0))
            return run(replace(step, team=own, index=0, axes=alone), forward, call, cuts)

    def _shapes_of(self, call: TokenCall, picture: int) -> Shapes:
        """How calls of this shape are cut: in as many pieces as asked for, fewer where a stream has fewer tokens."""
        num = max(1, min(self._plan.pieces or self._plan.stages, self._tokens.fewest // self._plan.ulysses))
        width = _width(call.sample, picture)
        lines = picture // width if width else 0
        if width and lines >= num and lines // num * width >= self._plan.ulysses:
            return Shapes(tuple(Piece(i, num, picture, width) for i in range(num)), picture)
        return Shapes(tuple(Piece(i, num) for i in range(num)), picture)

    def join(self, result: Any, call: TokenCall, layout: CallLayout) -> Any:
        """The model's own output: every piece has been sent to all ranks when it was there."""
        if layout.twins:
            # Nothing else passes between teams that do the same, and all ranks meet in every call (see cancelling.py).
            mark = call.sample.new_zeros(1)
            self._exchange.collect(f"{self._prefix}twin", mark, dict.fromkeys(layout.twins, mark.shape)).wait()
        return result


def _width(sample: torch.Tensor, picture: int) -> int:
    """Tokens of one line of a picture [B, C, H, W] that is embedded in square patches; 0 where it is not such a one."""
    if sample.dim() != 4:
        return 0
    height, width = sample.shape[2:]
    size = math.isqrt(height * width // picture)
    even = size and height % size == width % size == 0 and height * width == picture * size**2
    return width // size if even else 0
