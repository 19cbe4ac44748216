"""Everybody's tokens of one site, kept between calls: as they arrived, carried on by a forecast, or sent as codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from distrifusion.exchange.codec import Codec
from distrifusion.exchange.forecast import Weight, carry_on
from distrifusion.exchange.posted import Posted
from distrifusion.exchange.transport import Message, Transport
from distrifusion.plan import CODED_BITS, Plan

SAMPLED = 8  # one of so many own tokens tells how far they have moved


@dataclass(frozen=True)
class Sending:
    """How a site's values travel and are used again.

    Attributes:
        codec: codes differences to the last value that both sides hold (CompactFusion, arXiv 2507.17511); None sends
            the values themselves.
        forecasts: received values are kept for one call more, so that they can be extrapolated.
    """

    codec: Codec | None = None
    forecasts: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Sending:
        """As a plan says."""
        return cls(Codec.of(plan.delta) if plan.delta in CODED_BITS else None, forecasts=plan.forecast > 0)


AS_THEY_ARE = Sending()


class GatherBuffer(Posted):
    """Everybody's tokens of one site in one tensor [L, B, P, C] that attention reads in place.

    L tokens of all owners in band order, B batch, P pieces that travel together (key and value), C channels.

    Attributes:
        buffer: what attention reads; the own part is always fresh.
        parts: the tokens of each rank therein.
    """

    def __init__(
        self, name: str, like: torch.Tensor, num_pieces: int, lengths: tuple[int, ...], team: tuple[int, ...],
        index: int, sending: Sending,
    ) -> None:  # fmt: skip
        super().__init__(name)
        self.rank = team[index]
        self._team = team
        self._lengths = list(lengths)
        batch, _, channels = like.shape
        shape = (sum(lengths), batch, num_pieces, channels)
        self.buffer = like.new_zeros(shape) if sending.forecasts else like.new_empty(shape)
        self.parts = self._split(self.buffer)
        # Zeros: there is a call before there are two values to carry on, and what has no value yet may be anything.
        self._before = torch.zeros_like(self.buffer) if sending.forecasts else None
        self._num_received = 0
        self._sample: list[torch.Tensor] = []
        self._coded = _Coded(sending.codec) if sending.codec else None
        self._sends_codes = False

    def _split(self, buffer: torch.Tensor) -> dict[int, torch.Tensor]:
        return dict(zip(self._team, buffer.split(self._lengths), strict=True))

    @property
    def _remote(self) -> list[int]:
        return [rank for rank, part in self.parts.items() if rank != self.rank and part.numel()]

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is held."""
        coded = self._coded.num_bytes if self._coded else 0
        held = (self.buffer, *self._sample, *(() if self._before is None else (self._before,)))
        return sum(tensor.nbytes for tensor in held) + coded

    @property
    def is_steady(self) -> bool:
        """Whether later calls treat old values as the next one does: a forecast needs two."""
        return self._before is None or self._num_received > 1

    def settle(self) -> None:
        arrives = self._pending is not None
        super().settle()
        self._num_received += arrives
        if arrives and self._sends_codes:
            self._decode()

    def advance(self, weight: Weight | None) -> None:
        """Prepare the received parts for this call.

        Args:
            weight: they are to be read again, carried on by so much of their last change: 0 leaves them. None: they
                are about to be received anew.
        """
        if self._before is None:
            return
        before = self._split(self._before)
        if weight is not None:
            weight = weight if self._num_received > 1 else 0.0
            for rank in self._remote:
                carry_on(before[rank], self.parts[rank], weight, rows=1, out=before[rank])
        # What was just received is now the value before; the next one arrives where the forecast is read.
        self.turn()

    def turn(self) -> None:
        """Let the two buffers change places."""
        assert self._before is not None
        self.buffer, self._before = self._before, self.buffer
        self.parts = self._split(self.buffer)

    def write(self, pieces: Iterable[torch.Tensor]) -> None:
        """Put this rank's fresh pieces [B, L_own, C] into their place."""
        own = self.parts[self.rank]
        for i, piece in enumerate(pieces):
            own[:, :, i].copy_(piece.transpose(0, 1))

    def drift(self, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        """Squared change and squared size [2] of a sample of the own fresh pieces; infinite change the first time."""
        before, self._sample = self._sample, [piece[:, ::SAMPLED].float().clone() for piece in pieces]
        size = torch.stack([now.square().sum() for now in self._sample]).sum()
        changes = [(now - old).square().sum() for now, old in zip(self._sample, before, strict=False)]
        return torch.stack([torch.stack(changes).sum() if changes else size.new_tensor(torch.inf), size])

    def read(self) -> tuple[torch.Tensor, ...]:
        """Each piece of everybody, as a view [B, L, C]."""
        return tuple(piece.transpose(0, 1) for piece in self.buffer.unbind(2))

    def code(self, codes: bool) -> None:
        """Say whether the next values are sent as codes; what was sent once as it is must come before."""
        self._sends_codes = codes and self._coded is not None and self._coded.base is not None

    def messages(self) -> tuple[list[Message], list[Message]]:
        own, receives = self.parts[self.rank], self.parts
        if self._sends_codes:
            assert self._coded is not None
            own, receives = self._coded.encode(own), self._coded.room(self.parts, self._remote)
        others = [rank for rank in self._team if rank != self.rank]
        sends = [Message(rank, own, self.tag) for rank in others if own.numel()]
        return sends, [Message(rank, receives[rank], self.tag) for rank in self._remote]

    def post(self, transport: Transport) -> int:
        if self._coded and not self._sends_codes:
            self._coded.base = self.parts[self.rank].clone()
        return super().post(transport)

    def _decode(self) -> None:
        assert self._coded is not None
        before = None if self._before is None else self._split(self._before)
        for rank in self._remote:
            if before is not None:
                self.parts[rank].copy_(before[rank])
            self._coded.decode(rank, self.parts[rank])


class _Coded:
    """The codes of one site, and what the peers hold of its own values."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.base: torch.Tensor | None = None
        self._outgoing: torch.Tensor | None = None
        self._incoming: dict[int, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is held."""
        held = (self.base, self._outgoing, *self._incoming.values())
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def encode(self, own: torch.Tensor) -> torch.Tensor:
        """The codes of the own values [L, B, P, C]; what the peers hold moves on with them."""
        assert self.base is not None
        if self._outgoing is None:
            self._outgoing = self._empty(own)
        self._codec.encode_([piece.transpose(0, 1) for piece in own.unbind(2)], self.base, self._outgoing)
        return self._outgoing

    def room(self, parts: dict[int, torch.Tensor], ranks: list[int]) -> dict[int, torch.Tensor]:
        """Where the codes of some ranks arrive."""
        for rank in ranks:
            if rank not in self._incoming:
                self._incoming[rank] = self._empty(parts[rank])
        return self._incoming

    def decode(self, rank: int, held: torch.Tensor) -> None:
        """Move on what is held [L, B, P, C] of a rank's values by the codes that arrived."""
        self._codec.decode_(self._incoming[rank], held)

    def _empty(self, part: torch.Tensor) -> torch.Tensor:
        return part.new_empty(self._codec.num_bytes(part.shape), dtype=torch.uint8)
