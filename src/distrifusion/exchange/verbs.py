"""The verbs by which a layer asks other ranks for what it lacks: gather, halo, share, swap, collect, sum, give, take.

Nothing else communicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from distrifusion.exchange.borders import borders_of
from distrifusion.exchange.forecast import Weight
from distrifusion.exchange.gathering import AS_THEY_ARE, GatherBuffer
from distrifusion.exchange.handles import Gathered, Halo, Shared, Swap, with_length
from distrifusion.exchange.pieces import PieceBuffer
from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.pool import Parcel, Swapped
from distrifusion.exchange.posted import Posted, tag_of
from distrifusion.exchange.relay import Parties, Relay
from distrifusion.exchange.summing import SUM, Sum, Trade
from distrifusion.exchange.transport import Message, Transport
from distrifusion.exchange.underway import Underway
from distrifusion.exchange.waiting import named, settle, value_of
from distrifusion.layout.partition import Interval
from distrifusion.plan import SiteKind


class Exchange:
    """The exchanges of one rank.

    A fresh exchange sends, waits and returns this call's values. A stale one returns what was received during the last
    call and posts this call's values, without waiting, as soon as the old ones have been used (at the next verb at the
    latest). Every rank of a team calls the same verbs in the same order; names, not that order, tell values apart.
    Several verbs may be under way before the first is waited for, so that they cost one wait.

    Attributes:
        posting: kind and name of what was posted last, which a trace reads.
        underway: messages that outlast the call in which they were asked for.
        num_synchronous: calls in which no value of a call before was read.
        settles: what was posted is waited for before its call ends, not in the next one.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.posting = ("", "")
        self.bytes_sent: Counter[str] = Counter()
        self.num_posts = 0
        self.num_synchronous = 0
        self.settles = False
        self._policy = CallPolicy((transport.rank,), 0)
        self._seen: Counter[str] = Counter()
        self._deferred: list[tuple[str, Posted]] = []
        self._drift: list[torch.Tensor] = []
        self._given: list[Relay] = []
        self.underway = Underway()

    @property
    def team(self) -> tuple[int, ...]:
        """Ranks that share the picture of this call, in order."""
        return self._policy.team

    @property
    def given_at(self) -> Any:
        """Timestep of the call that gave what is taken late in this one; None where it is this call's own."""
        return self._policy.given_at

    def begin(self, policy: CallPolicy) -> None:
        """Start a denoiser call."""
        self._policy = policy
        self._seen.clear()
        self._deferred.clear()  # of a call that failed half way
        self._drift.clear()
        self._given.clear()
        self.num_synchronous += not (policy.stale or policy.late)
        if policy.state is not None and policy.stale:
            policy.state.pack()

    def end(self) -> None:
        """End a denoiser call: what was not posted yet is posted, also of sites that were skipped in this call."""
        self._flush()
        for given in self._given:
            settle(given, value_of(None, given.name))
        state = self._policy.state
        if state is not None:
            for posted in state.posted():
                if isinstance(posted, Parcel) and posted.started:
                    self._post("parcel", posted)
            if self.settles:
                for posted in state.posted():
                    settle(posted, f"values that are kept under '{posted.name}'")
            state.calls += 1
        self.underway.end_call()

    def catch_up(self) -> None:
        """Have what is taken in this call be this call's, also where a plan would take it late. Every rank calls it."""
        self.num_synchronous += self._policy.late
        self._policy = replace(self._policy, late=False, renews=True, given_at=None)

    def repeated(self, policy: CallPolicy, sent: Counter[str], num_posts: int) -> None:
        """Count a denoiser call of which the device repeated everything that this object does from `begin` to `end`."""
        self.num_synchronous += not policy.stale
        self.bytes_sent.update(sent)
        self.num_posts += num_posts
        if policy.state is not None:
            policy.state.calls += 1

    def keeps(self, *kinds: SiteKind) -> bool:
        """Whether values of one of these kinds are kept for a later call."""
        return not self._policy.keep.isdisjoint(kinds)

    def gather(
        self, site: str, kind: SiteKind | None, pieces: Sequence[torch.Tensor], lengths: tuple[int, ...]
    ) -> Gathered:
        """Everybody's pieces in band order; equals concatenation along dim 1 when fresh.

        Args:
            site: name of the asking layer.
            kind: what the pieces are; None for values that are never kept.
            pieces: this rank's tensors [B, L_own, C], which travel together.
            lengths: L of every owner in band order; zeros allowed.
        """
        self._flush()
        name = self._name(site)
        policy = self._policy
        state = policy.state if kind in policy.keep else None
        entry = state.gathers.get(name) if state else None
        fresh = entry is None or not policy.gathers_old(kind, name)
        if entry is None:
            sending = policy.sending if state else AS_THEY_ARE
            entry = GatherBuffer(name, pieces[0], len(pieces), lengths, policy.team, policy.index, sending)
            if state:
                state.gathers[name] = entry
        what = value_of(kind, site)
        settle(entry, what)
        entry.advance(None if fresh else policy.forecast)
        if policy.watches and state:
            self._drift.append(entry.drift(pieces))
        entry.write(pieces)
        entry.code(policy.codes)
        if not fresh:
            return Gathered(entry, partial(self._defer, str(kind), entry))
        self._post(kind or "exit", entry)
        return Gathered(entry, partial(settle, entry, what))

    def halo(self, site: str, x: torch.Tensor, dim: int, bands: Sequence[Interval], wants: Sequence[Interval]) -> Halo:
        """Ask for what this rank's rows lack of the interval it wants.

        Args:
            site: name of the layer that wants it.
            x: this rank's rows [B, C, H, W], cut along `dim`.
            dim: dimension of the cut, 2 or 3.
            bands: rows owned, by band order; they cover 0..size.
            wants: rows wanted, by band order; may reach over both edges.
        """
        team, borders = self._policy.team, borders_of(tuple(bands), tuple(wants), self._policy.index)
        return Halo(
            edges=borders.edges,
            inside=borders.inside,
            dim=dim,
            before=tuple(team[j] for j in borders.before),
            after=tuple(team[j] for j in borders.after),
            swap=self._swap(
                site,
                SiteKind.HALO,
                {team[j]: x.narrow(dim, part.start, len(part)) for j, part in borders.outgoing.items()},
                {team[j]: with_length(x.shape, dim, length) for j, length in borders.incoming.items()},
                x,
            ),
        )

    def share(self, site: str, kind: SiteKind, own: torch.Tensor) -> Shared:
        """Give everybody a small tensor and ask for everybody's."""
        team = self._policy.team
        peers = [rank for rank in team if rank != team[self._policy.index]]
        previous = self._previous(site, kind, peers)
        swap = self._swap(site, kind, dict.fromkeys(peers, own), dict.fromkeys(peers, own.shape), own)
        return Shared(own, previous, swap, team)

    def collect(
        self, site: str, own: torch.Tensor, shapes: Mapping[int, torch.Size], takers: Iterable[int] | None = None
    ) -> Swap:
        """Ask for the fresh tensors of other ranks, shapes given by rank; `takers` get this rank's (None: the same)."""
        outgoing = dict.fromkeys(shapes if takers is None else takers, own) if own.numel() else {}
        return self._swap(site, None, outgoing, {r: s for r, s in shapes.items() if s.numel()}, own)

    def pieces(self, site: str) -> PieceBuffer | None:
        """Where the request keeps keys and values of a site's pieces; None if it keeps nothing."""
        state = self._policy.state
        return None if state is None else state.pieces.setdefault(site, PieceBuffer(self._policy.sending.forecasts))

    @property
    def forecast(self) -> Weight:
        """The part of their last change by which old values are carried on in this call."""
        return self._policy.forecast

    def swap(
        self,
        site: str,
        given: Mapping[int, torch.Tensor],
        taken: Mapping[int, torch.Tensor],
        kind: str = SiteKind.KV,
    ) -> Swap:
        """Give a tensor of its own to each of some ranks, and fill one from each of some: always fresh, never kept.

        An all-to-all among a group, one turn of a ring, or what flows on in the network. Empty tensors do not travel.

        Args:
            site: name of the asking layer.
            given: contiguous tensors by the rank that gets them; not to be written until the wait is over.
            taken: contiguous tensors to fill, by the rank that they come from.
            kind: what they are.
        """
        wait = self._trade(kind, site)(given, taken)

        def take() -> dict[int, torch.Tensor]:
            wait()
            return dict(taken)

        return Swap(take)

    def give(self, site: str, value: Sequence[torch.Tensor], takers: Sequence[int]) -> None:
        """Send a layer's tensors to ranks that do not run it, without waiting; what is given is copied first.

        Args:
            site: name of the layer, and its use within the call where it has several.
            value: contiguous or not; shapes may differ.
            takers: ranks that call `take`.
        """
        self._flush()
        entry = self._relay(site, value, Parties(True, tuple(takers)), value[0].device)
        settle(entry, value_of(None, site))
        entry.put(value)
        self._post("hidden", entry)
        if self._policy.state is None:
            self._given.append(entry)

    def take(self, site: str, like: Sequence[torch.Tensor], giver: int, device: torch.device) -> list[torch.Tensor]:
        """New tensors with what a layer gave on the rank that runs it: in this call, or late in the last one.

        Args:
            site: as the giver names it.
            like: tensors of the same shapes and types, on any device.
            giver: rank that calls `give`.
            device: of the tensors.
        """
        self._flush()
        policy, what = self._policy, value_of(None, site)
        entry = self._relay(site, like, Parties(False, (giver,)), device)
        if policy.late and not policy.renews:
            assert entry.num_received, f"nothing was given at '{site}' before this call"
            return entry.read(policy.forecast)
        settle(entry, what)
        value = entry.read(policy.forecast) if policy.late and entry.num_received else None
        self._post("hidden", entry)
        if value is None:
            settle(entry, what)
            value = entry.read(0.0)
        return value

    def keep(self, site: str, value: Sequence[torch.Tensor], giver: int) -> None:
        """Keep for the next call what a layer gave, because this rank ran it too."""
        if self._policy.state is not None:
            entry = self._relay(site, value, Parties(False, (giver,)), value[0].device)
            settle(entry, value_of(None, site))
            entry.put(value)

    def _relay(self, site: str, like: Sequence[torch.Tensor], parties: Parties, device: torch.device) -> Relay:
        state = self._policy.state
        # By the parties too: another kind of call within a request may be cut elsewhere.
        entry = state.relays.get((site, parties)) if state else None
        if entry is None:
            entry = Relay(f"{site}#0", like, parties, self._policy.num_relayed, device)
            if state:
                state.relays[site, parties] = entry
        return entry

    def sum(self, site: str, partial: torch.Tensor) -> Sum:
        """Add up everybody's partial sums: the same bits on every rank of the team.

        Args:
            site: name of the asking layer.
            partial: this rank's part, contiguous or channels-last, shaped and laid out alike on all ranks. It is
                written, and becomes the sum.
        """
        return Sum(self._trade(SUM, site), partial, self._policy.team, self._policy.index)

    def _trade(self, kind: str, site: str) -> Trade:
        """What gives tensors to ranks, and fills some from ranks, for one value of a site; empty ones do not travel."""
        self._flush()
        name = self._name(site)
        tag, what = tag_of(name), value_of(kind, site)

        def trade(given: Mapping[int, torch.Tensor], taken: Mapping[int, torch.Tensor]) -> Callable[[], None]:
            sends = [Message(peer, tensor, tag) for peer, tensor in given.items() if tensor.numel()]
            receives = [Message(peer, tensor, tag) for peer, tensor in taken.items() if tensor.numel()]
            self.posting = (kind, name)
            pending = self.transport.post(sends, receives)
            self._count(kind, sum(message.tensor.nbytes for message in sends))

            def wait() -> None:
                with named(what):
                    pending.wait()

            return wait

        return trade

    def drift(self, like: torch.Tensor) -> torch.Tensor:
        """Relative change [1] in fp32 of this rank's own kept keys and values since the last call; 0 if it has none."""
        if not self._drift:
            return like.new_zeros(1, dtype=torch.float32)
        change, size = torch.stack(self._drift).sum(0)
        return (change / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt().reshape(1)

    def _previous(self, site: str, kind: SiteKind, peers: Sequence[int]) -> torch.Tensor | None:
        state = self._policy.state
        entry = state.swaps.get(self._next_name(site)) if state and kind in self._policy.stale else None
        if entry is None or not peers:
            return None
        if entry.parcel is not None:
            settle(entry.parcel, value_of(kind, site))
        return entry.outgoing[peers[0]].clone()

    def _swap(
        self,
        site: str,
        kind: SiteKind | None,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Size],
        like: torch.Tensor,
    ) -> Swap:
        """Send a small tensor to each peer, get one from each."""
        self._flush()
        name = self._name(site)
        state = self._policy.state if kind in self._policy.keep else None
        entry = state.swaps.get(name) if state else None
        if entry is not None and kind in self._policy.stale and entry.parcel is not None:
            settle(entry.parcel, value_of(kind, site))
            return self._swap_stale(name, entry, entry.parcel, outgoing)
        sends = {peer: tensor.contiguous() for peer, tensor in outgoing.items()}
        receives = {peer: like.new_empty(shape) for peer, shape in incoming.items()}
        tag = tag_of(name)
        self.posting = (str(kind or "exit"), name)
        pending = self.transport.post(
            [Message(peer, tensor, tag) for peer, tensor in sends.items()],
            [Message(peer, tensor, tag) for peer, tensor in receives.items()],
        )
        self._count(kind or "exit", sum(t.nbytes for t in sends.values()))

        def take() -> dict[int, torch.Tensor]:
            with named(value_of(kind, site)):
                pending.wait()
            if state is not None and kind is not None:
                state.keep(name, kind, sends, receives)
            return receives

        return Swap(take)

    def _swap_stale(self, name: str, entry: Swapped, parcel: Parcel, outgoing: Mapping[int, torch.Tensor]) -> Swap:
        if self._policy.frozen:
            return Swap(lambda: entry.incoming)
        for peer, tensor in outgoing.items():
            entry.outgoing[peer].copy_(tensor)

        def take() -> dict[int, torch.Tensor]:
            if parcel.mark(name):
                self._defer("parcel", parcel)
            return entry.incoming

        return Swap(take)

    def _defer(self, kind: str, posted: Posted) -> None:
        """Post at the next verb: until then the values that were received are still being used."""
        if not self._policy.frozen and all(posted is not other for _, other in self._deferred):
            self._deferred.append((kind, posted))

    def _flush(self) -> None:
        for kind, posted in self._deferred:
            self._post(kind, posted)
        self._deferred.clear()

    def _post(self, kind: str, posted: Posted) -> None:
        self.posting = (kind, posted.name)
        num_bytes = posted.post(self.transport)
        if isinstance(posted, Parcel):
            self.bytes_sent.update({str(k): n for k, n in posted.kind_bytes.items()})
            self.num_posts += 1
        else:
            self._count(kind, num_bytes)

    def _count(self, kind: str, num_bytes: int) -> None:
        self.bytes_sent[str(kind)] += num_bytes
        self.num_posts += 1

    def _next_name(self, site: str) -> str:
        return f"{site}#{self._seen[site]}"

    def _name(self, site: str) -> str:
        """The value's name: the site, and which of the site's uses within this call it is."""
        name = self._next_name(site)
        self._seen[site] += 1
        return name
