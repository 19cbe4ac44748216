"""PipeFusion (arXiv 2405.14430): pieces of the tokens flow through stages of the blocks, one piece behind the other.

Each rank runs the model's own forward for every piece. Blocks of other stages pass on what they get; where the own
stage begins, the streams are replaced by what the stage before gives, and where it ends they go to the one after.
Attention sees this call's keys of the pieces that have come, and the last call's of those that have not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.blocks import BlockSite
from distrifusion.anatomy.tokens import JoinSite
from distrifusion.errors import ConfigError
from distrifusion.exchange.handles import Swap, with_length
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.mesh import StagePlace
from distrifusion.layout.partition import Interval
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.attention import AttentionCall, Piece, TokenStep, attend, starts_of
from distrifusion.strategies.tokens import TokenStrategy

Forward = Callable[..., Any]
FLOW = "flow"


class PieceAttention:
    """Attention of a piece's queries to the keys of all pieces, kept from call to call.

    Where a group of ranks shares a piece, the keys of a whole stand in the order of the ranks and are not arranged.

    Attributes:
        streams: numbers of tokens of the streams that the block at hand reads as keys, in the order of the keys.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.streams: tuple[int, ...] = ()

    def __call__(self, step: TokenStep, call: AttentionCall) -> torch.Tensor:
        """The result for the queries of the call, whose keys are those of the piece."""
        key, value, bias = call.key, call.value, call.bias
        kept = self._exchange.pieces(call.name)
        assert step.piece is not None
        if kept is not None and step.piece.num == 1:
            kept.keep(key, value, bias, self._read(key.shape[2]) if len(step.team) == 1 else ())
        elif kept is not None:
            if kept.streams:
                kept.arrange(order_of(kept.streams, step.piece).to(key.device))
            if step.piece.index == 0:
                kept.advance(self._exchange.forecast)
            key, value, bias = kept.renew(step.piece.index, step.piece.num, key, value, bias)
        return attend(call.query, key, value, bias, call.scale)

    def _read(self, num_keys: int) -> tuple[int, ...]:
        """The streams that so many keys are of: all, or one of them; none if that cannot be said."""
        found = (streams for streams in (self.streams, *((n,) for n in self.streams)) if sum(streams) == num_keys)
        return next(found, ())


def order_of(streams: Sequence[int], piece: Piece) -> torch.Tensor:
    """Where the tokens of all pieces, one piece after the other, stand in a whole [L] of streams of some lengths."""
    starts = starts_of(streams)
    places = []
    for index in range(piece.num):
        parts = [replace(piece, index=index).of(length) for length in streams]
        places += [torch.arange(a + part.start, a + part.stop) for a, part in zip(starts, parts, strict=False)]
    return torch.cat(places)


class Stream(NamedTuple):
    """A stream of tokens at the border of two stages: the argument's name, and what it is like."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, name: str, x: torch.Tensor) -> Stream:
        """What a tensor is like."""
        return cls(name, x.shape, x.dtype, x.device)


@dataclass
class Flow:
    """One call's way through the stages.

    Attributes:
        place: this rank's.
        piece: the piece that flows now.
        picture: tokens of the picture, known from the first call of the whole.
        streams: what comes from the stage before, by piece; known from the first call of pieces.
        coming: what was asked for before it was needed, by piece.
        joined: the last stage's tokens.
    """

    place: StagePlace
    piece: Piece
    picture: int = 0
    streams: dict[int, tuple[Stream, ...]] = field(default_factory=dict)
    coming: dict[int, list[Swap]] = field(default_factory=dict)
    received: bool = False
    sent: bool = False
    joined: torch.Tensor | None = None

    def turn(self, piece: Piece) -> None:
        """Go on to a piece."""
        self.piece, self.received, self.sent = piece, self.place.before is None, self.place.last


class StageStrategy:
    """Lets pieces flow from stage to stage, through the blocks of a transformer.

    Args:
        exchange: this rank's.
        tokens: cuts streams into pieces and has attention answered.
        attend: what answers for the pieces.
        prefix: begins the names of the model's layers.
    """

    def __init__(self, exchange: Exchange, tokens: TokenStrategy, attend: PieceAttention, prefix: str) -> None:
        self._exchange = exchange
        self._attend = attend
        self._tokens = tokens
        self._prefix = prefix
        self._own = Interval(0, 0)
        self._flow: Flow | None = None

    def attach(self, sites: Sequence[Site], own: Interval, attachment: Attachment) -> None:
        """Replace the forward of every site; `own` are the indices of this rank's blocks."""
        self._own = own
        blocks = [site for site in sites if isinstance(site, BlockSite)]
        joins = [site for site in sites if isinstance(site, JoinSite)]
        for block in blocks:
            signature = inspect.signature(block.module.forward)
            attachment.replace(block.module, "forward", partial(partial, self._block, block, signature))
        for join in joins:
            attachment.replace(join.module, "forward", partial(partial, self._join, join))
        # Around the blocks: a stream that begins at a block's argument is cut before the block is asked.
        self._tokens.attach([site for site in sites if not isinstance(site, BlockSite | JoinSite)], attachment)

    def begin(self, flow: Flow) -> None:
        """Set the call that the layers are in, and ask for what is known to come."""
        self._flow = flow
        for index, streams in flow.streams.items():
            flow.coming[index] = [self._ask(stream) for stream in streams]

    @property
    def flow(self) -> Flow:
        """The call that the layers are in."""
        assert self._flow is not None, "a block ran outside a denoiser call"
        return self._flow

    def _block(self, site: BlockSite, signature: inspect.Signature, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given, flow = bound.arguments, self.flow
        names = [name for name in site.kind.gives if given.get(name) is not None]
        # At the first block that runs: some calls leave blocks out.
        if not flow.received and site.index >= self._own.start:
            flow.received = True
            given.update(self._receive({name: given[name] for name in names}))
        if not flow.sent and site.index >= self._own.stop:
            flow.sent = True
            self._send({name: given[name] for name in names})
        if self._own.start <= site.index < self._own.stop:
            keys = (given.get(name) for name in site.kind.keys)
            self._attend.streams = tuple(x.shape[1] for x in keys if x is not None)
            return forward(*bound.args, **bound.kwargs)
        results = tuple(given[name] for name in site.kind.gives)
        return results if len(results) > 1 else results[0]

    def _receive(self, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        flow, index = self.flow, self.flow.piece.index
        if index not in flow.coming:
            flow.streams[index] = tuple(Stream.of(name, x) for name, x in like.items())
            flow.coming[index] = [self._ask(stream) for stream in flow.streams[index]]
        streams, swaps = flow.streams[index], flow.coming.pop(index)
        assert flow.place.before is not None
        return {s.name: swap.wait()[flow.place.before] for s, swap in zip(streams, swaps, strict=True)}

    def _ask(self, stream: Stream) -> Swap:
        place = self.flow.place
        assert place.before is not None
        room = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
        return self._exchange.swap(self._border(place.stage - 1, stream.name), {}, {place.before: room}, FLOW)

    def _send(self, streams: dict[str, torch.Tensor]) -> None:
        place = self.flow.place
        assert place.after is not None
        for name, x in streams.items():
            given = {place.after: x.contiguous()}
            self._exchange.underway.leave(self._exchange.swap(self._border(place.stage, name), given, {}, FLOW))

    def _border(self, stage: int, stream: str) -> str:
        return f"{self._prefix}{stream} from stage {stage}"

    def _join(self, site: JoinSite, forward: Forward, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """All tokens that have come so far, in the last stage; elsewhere nothing but a tensor of that shape."""
        flow = self.flow
        if not (flow.received and flow.sent):
            raise ConfigError(
                f"stage {flow.place.stage} of {flow.place.num_stages} and those after it were left out of a call, so "
                "there was nothing to give; skip fewer blocks, or use fewer stages"
            )
        if flow.piece.num == 1:
            (lengths,) = self._tokens.lengths(site, x, x.shape[site.dim])
            flow.picture = sum(lengths)
        if not flow.place.last:
            one = forward(x.narrow(site.dim, 0, 1), *args, **kwargs)
            return one.new_empty(with_length(one.shape, site.dim, flow.picture))
        part = self._tokens.join(site, forward(x, *args, **kwargs))
        if flow.piece.num == 1:
            return part
        if flow.joined is None:
            flow.joined = part.new_empty(with_length(part.shape, site.dim, flow.picture))
        own = flow.piece.of(flow.picture)
        flow.joined.narrow(site.dim, own.start, len(own)).copy_(part)
        return flow.joined
