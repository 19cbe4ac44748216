"""The tensors that live between denoiser calls: the only ones, each owned by one request and named by its site."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from distrifusion.exchange.gathering import GatherBuffer
from distrifusion.exchange.pieces import PieceBuffer
from distrifusion.exchange.posted import Posted
from distrifusion.exchange.relay import Parties, Relay
from distrifusion.exchange.transport import Message, Transport
from distrifusion.plan import SiteKind

PARCEL_SITES = 16
_ALIGNMENT = 16


def padded(num_bytes: int) -> int:
    """The place that a value of so many bytes takes in a parcel."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass
class Swapped:
    """The last values that one site sent to, and received from, each peer."""

    kind: SiteKind
    outgoing: dict[int, torch.Tensor]
    incoming: dict[int, torch.Tensor]
    parcel: Parcel | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held, in a parcel or alone."""
        return sum(tensor.nbytes for tensor in (*self.outgoing.values(), *self.incoming.values()))


class Parcel(Posted):
    """Small values of several sites in one flat buffer per peer and direction, so that they cost one message."""

    def __init__(self, sites: Mapping[str, Swapped]) -> None:
        super().__init__("parcel:" + next(iter(sites)))
        self.kind_bytes: dict[SiteKind, int] = {}
        self._sites = frozenset(sites)
        self._written: set[str] = set()
        for swapped in sites.values():
            sent = sum(t.nbytes for t in swapped.outgoing.values())
            self.kind_bytes[swapped.kind] = self.kind_bytes.get(swapped.kind, 0) + sent
            swapped.parcel = self
        self._outgoing = _flatten([s.outgoing for s in sites.values()])
        self._incoming = _flatten([s.incoming for s in sites.values()])

    def mark(self, site: str) -> bool:
        """Note that a site has put its value in; True when all have."""
        self._written.add(site)
        return self._written == self._sites

    @property
    def started(self) -> bool:
        """True when some value was put in since the last post."""
        return bool(self._written)

    @property
    def num_bytes(self) -> int:
        return sum(flat.nbytes for flat in (*self._outgoing.values(), *self._incoming.values()))

    def messages(self) -> tuple[list[Message], list[Message]]:
        sends = [Message(peer, flat, self.tag) for peer, flat in self._outgoing.items()]
        return sends, [Message(peer, flat, self.tag) for peer, flat in self._incoming.items()]

    def post(self, transport: Transport) -> int:
        self._written.clear()
        return super().post(transport)


def _flatten(groups: list[dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Move the tensors of every peer into one flat byte buffer, replacing each by its view there."""
    flats = {}
    for peer in sorted({peer for group in groups for peer in group}):
        tensors = [group[peer] for group in groups if peer in group]
        places = [padded(t.nbytes) for t in tensors]
        flats[peer] = torch.zeros(sum(places), dtype=torch.uint8, device=tensors[0].device)
        pieces = iter(flats[peer].split(places))
        for group in groups:
            if peer in group:
                old = group[peer]
                group[peer] = next(pieces)[: old.nbytes].view(old.dtype).view(old.shape)
                group[peer].copy_(old)
    return flats


@dataclass
class CallState:
    """What one request keeps for one slot: the values of the last call, how many calls there were, and when.

    Attributes:
        calls: denoiser calls that have ended.
        times: timesteps of the last three calls that sent values, as they were given, the latest last.
        drifted: the next call is to be synchronous, because kept values have moved too far.
        pieces: keys and values of pieces that flow through a rank, by site.
    """

    calls: int = 0
    times: tuple[Any, ...] = ()
    drifted: bool = False
    gathers: dict[str, GatherBuffer] = field(default_factory=dict)
    swaps: dict[str, Swapped] = field(default_factory=dict)
    relays: dict[tuple[str, Parties], Relay] = field(default_factory=dict)
    pieces: dict[str, PieceBuffer] = field(default_factory=dict)

    def keep(
        self, name: str, kind: SiteKind, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]
    ) -> None:
        """Store the small values of a fresh exchange for the next call, in their parcel if they already have one."""
        entry = self.swaps.get(name)
        if entry is None or entry.parcel is None:
            # Clones: a row block can be a view of an activation that later layers overwrite.
            self.swaps[name] = Swapped(kind, {peer: value.clone() for peer, value in sends.items()}, receives)
            return
        entry.parcel.settle()
        for kept, values in ((entry.outgoing, sends), (entry.incoming, receives)):
            for peer, value in values.items():
                kept[peer].copy_(value)

    def gathers_last(self, name: str, count: int) -> bool:
        """Whether a site was among the last `count` that gathered in the request's first call, on every rank alike."""
        return name in islice(reversed(self.gathers), count)

    def pack(self) -> None:
        """Put small values that still stand alone into parcels; names, not this order, say later which is which.

        Parcels are cut by number of sites, which is the same on every rank; sizes are not.
        """
        alone = [(name, swapped) for name, swapped in self.swaps.items() if swapped.parcel is None]
        for start in range(0, len(alone), PARCEL_SITES):
            Parcel(dict(alone[start : start + PARCEL_SITES]))

    def posted(self) -> Iterator[Posted]:
        """Everything that can be under way."""
        yield from self.gathers.values()
        yield from self.relays.values()
        yield from {id(s.parcel): s.parcel for s in self.swaps.values() if s.parcel is not None}.values()

    @property
    def num_bytes(self) -> int:
        """Bytes of all values held."""
        alone = sum(swapped.num_bytes for swapped in self.swaps.values() if swapped.parcel is None)
        pieces = sum(buffer.num_bytes for buffer in self.pieces.values())
        return alone + pieces + sum(posted.num_bytes for posted in self.posted())


class Pool:
    """Call states by request, slot and shape; a request's states end with it."""

    def __init__(self) -> None:
        self._states: dict[Hashable, dict[Hashable, CallState]] = {}

    def state(self, request: Hashable, slot: Hashable) -> CallState:
        """The state of a request's slot, new if there was none."""
        return self._states.setdefault(request, {}).setdefault(slot, CallState())

    def close(self, request: Hashable) -> None:
        """Wait for what a request still has under way and forget it. Every rank calls it."""
        for state in self._states.pop(request, {}).values():
            for posted in state.posted():
                posted.settle()

    @property
    def num_requests(self) -> int:
        """Requests that hold tensors now."""
        return len(self._states)

    @property
    def num_bytes(self) -> int:
        """Bytes of all values held now."""
        return sum(state.num_bytes for slots in self._states.values() for state in slots.values())
