"""The verbs by which a layer asks other ranks for what it lacks: gather, halo, share. Nothing else communicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distrifusion.exchange.pool import CallState, GatherBuffer, Parcel, Posted, Swapped, tag_of
from distrifusion.exchange.transport import Message, Transport
from distrifusion.partition import Interval
from distrifusion.plan import SiteKind


@dataclass(frozen=True)
class CallPolicy:
    """How the exchanges of one denoiser call behave.

    Attributes:
        team: ranks that share the picture of this call, in band order.
        index: this rank's place in the team.
        keep: kinds whose values are kept for the next call.
        stale: kinds, among `keep`, that use the last call's remote values now.
        state: where kept values live; None if nothing is kept.
    """

    team: tuple[int, ...]
    index: int
    keep: frozenset[SiteKind] = frozenset()
    stale: frozenset[SiteKind] = frozenset()
    state: CallState | None = None


class Gathered:
    """Everybody's pieces of one site, on their way."""

    def __init__(self, buffer: GatherBuffer, fresh: bool) -> None:
        self._buffer = buffer
        self._fresh = fresh

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The pieces [B, L, C] of all owners in band order."""
        if self._fresh:
            self._buffer.settle()
        return self._buffer.read()


class Exchange:
    """The exchanges of one rank.

    A fresh exchange sends, waits and returns this call's values. A stale one returns what was received during the last
    call and posts this call's values, without waiting, as soon as the old ones have been used (at the next verb at the
    latest). Every rank of a team calls the same verbs in the same order; names, not that order, tell values apart.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.bytes_sent: Counter[str] = Counter()
        self.num_posts = 0
        self._policy = CallPolicy((transport.rank,), 0)
        self._seen: Counter[str] = Counter()
        self._deferred: list[tuple[str, Posted]] = []

    def begin(self, policy: CallPolicy) -> None:
        """Start a denoiser call."""
        self._policy = policy
        self._seen.clear()
        self._deferred.clear()  # of a call that failed half way
        if policy.state is not None and policy.stale:
            policy.state.pack()

    def end(self) -> None:
        """End a denoiser call: what was not posted yet is posted, also of sites that were skipped in this call."""
        self._flush()
        state = self._policy.state
        if state is not None:
            for posted in state.posted():
                if isinstance(posted, Parcel) and posted.started:
                    self._post("parcel", posted)
            state.calls += 1

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
        fresh = entry is None or kind not in policy.stale
        if entry is None:
            batch, _, channels = pieces[0].shape
            buffer = pieces[0].new_empty(sum(lengths), batch, len(pieces), channels)
            entry = GatherBuffer(name, buffer, lengths, policy.team, policy.index)
            if state:
                state.gathers[name] = entry
        entry.settle()
        entry.write(pieces)
        if fresh:
            self._post(kind or "exit", entry)
        else:
            self._deferred.append((str(kind), entry))
        return Gathered(entry, fresh)

    def halo(
        self, site: str, x: torch.Tensor, dim: int, bands: Sequence[Interval], wants: Sequence[Interval]
    ) -> torch.Tensor:
        """This rank's rows extended to the interval it wants, zeros beyond the picture's edge.

        Args:
            site: name of the asking layer.
            x: this rank's rows [B, C, H, W], cut along `dim`.
            dim: dimension of the cut, 2 or 3.
            bands: rows owned, by band order; they cover 0..size.
            wants: rows wanted, by band order; may reach over both edges.
        """
        index, team = self._policy.index, self._policy.team
        own, want, size = bands[index], wants[index], bands[-1].stop

        def rows(part: Interval) -> torch.Tensor:
            return x.narrow(dim, part.start - own.start, len(part))

        others = [j for j in range(len(team)) if j != index]
        outgoing = {team[j]: rows(own & wants[j]) for j in others if len(own & wants[j])}
        owned = {j: bands[j] & want for j in others}
        incoming = {team[j]: _with_length(x.shape, dim, len(part)) for j, part in owned.items() if len(part)}
        received = self._swap(site, SiteKind.HALO, outgoing, incoming, x)
        pieces = [rows(own & want) if j == index else received.get(team[j]) for j in range(len(team))]
        zeros = [x.new_zeros(_with_length(x.shape, dim, n)) if n > 0 else None for n in (-want.start, want.stop - size)]
        present = [piece for piece in (zeros[0], *pieces, zeros[1]) if piece is not None]
        return torch.cat(present, dim)

    def share(self, site: str, kind: SiteKind, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Everybody's small tensor stacked in band order, own always fresh; and the own one that the others still use.

        The second value is None when the others use the fresh one.
        """
        index, team = self._policy.index, self._policy.team
        peers = [rank for j, rank in enumerate(team) if j != index]
        previous = self._previous(site, kind, peers)
        received = self._swap(site, kind, dict.fromkeys(peers, own), dict.fromkeys(peers, own.shape), own)
        return torch.stack([own if j == index else received[rank] for j, rank in enumerate(team)]), previous

    def collect(self, site: str, own: torch.Tensor, shapes: Mapping[int, torch.Size]) -> dict[int, torch.Tensor]:
        """The fresh tensors of other ranks, whose shapes are given by rank; each of them gets this rank's."""
        outgoing = dict.fromkeys(shapes, own) if own.numel() else {}
        return self._swap(site, None, outgoing, {r: s for r, s in shapes.items() if s.numel()}, own)

    def _previous(self, site: str, kind: SiteKind, peers: Sequence[int]) -> torch.Tensor | None:
        state = self._policy.state
        entry = state.swaps.get(self._next_name(site)) if state and kind in self._policy.stale else None
        if entry is None or not peers:
            return None
        if entry.parcel is not None:
            entry.parcel.settle()
        return entry.outgoing[peers[0]].clone()

    def _swap(
        self,
        site: str,
        kind: SiteKind | None,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Size],
        like: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """Send a small tensor to each peer, get one from each; what comes back is valid until the next verb."""
        self._flush()
        name = self._name(site)
        state = self._policy.state if kind in self._policy.keep else None
        entry = state.swaps.get(name) if state else None
        if entry is not None and kind in self._policy.stale and entry.parcel is not None:
            return self._swap_stale(name, entry, outgoing)
        sends = {peer: tensor.contiguous() for peer, tensor in outgoing.items()}
        receives = {peer: like.new_empty(shape) for peer, shape in incoming.items()}
        tag = tag_of(name)
        pending = self.transport.post(
            [Message(peer, tensor, tag) for peer, tensor in sends.items()],
            [Message(peer, tensor, tag) for peer, tensor in receives.items()],
        )
        self._count(kind or "exit", sum(t.nbytes for t in sends.values()))
        pending.wait()
        if state is not None and kind is not None:
            _keep(state, name, kind, sends, receives)
        return receives

    def _swap_stale(self, name: str, entry: Swapped, outgoing: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        parcel = entry.parcel
        assert parcel is not None
        parcel.settle()
        for peer, tensor in outgoing.items():
            entry.outgoing[peer].copy_(tensor)
        if parcel.mark(name):
            self._deferred.append(("parcel", parcel))
        return entry.incoming

    def _flush(self) -> None:
        for kind, posted in self._deferred:
            self._post(kind, posted)
        self._deferred.clear()

    def _post(self, kind: str, posted: Posted) -> None:
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


def _keep(
    state: CallState, name: str, kind: SiteKind, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]
) -> None:
    """Store the values of a fresh exchange for the next call, in their parcel if they already have one."""
    entry = state.swaps.get(name)
    if entry is None or entry.parcel is None:
        # Clones: a row block can be a view of an activation that later layers overwrite.
        state.swaps[name] = Swapped(kind, {peer: value.clone() for peer, value in sends.items()}, receives)
        return
    entry.parcel.settle()
    for kept, values in ((entry.outgoing, sends), (entry.incoming, receives)):
        for peer, value in values.items():
            kept[peer].copy_(value)


def _with_length(shape: torch.Size, dim: int, length: int) -> torch.Size:
    return torch.Size(length if d == dim else n for d, n in enumerate(shape))
