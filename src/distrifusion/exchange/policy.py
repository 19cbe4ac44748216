"""How the exchanges of one denoiser call behave: what a verb reads before it does anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distrifusion.exchange.forecast import Weight
from distrifusion.exchange.gathering import AS_THEY_ARE, Sending
from distrifusion.exchange.pool import CallState
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
        frozen: kept values are used again and not renewed.
        sending: how keys and values travel.
        codes: keys and values are sent as codes in this call.
        forecast: how much of their last change stale keys and values are carried on by.
        num_fresh: attentions, the last of a call, whose keys and values are this call's all the same.
        watches: whether the drift of kept keys and values is measured.
        late: what is taken is the last value that was given, not this call's.
        renews: what is given and taken late moves on in this call.
        num_relayed: values that a rank keeps of what it takes.
        given_at: timestep of the call that gave what is taken late; None where it is this call's.
    """

    team: tuple[int, ...]
    index: int
    keep: frozenset[SiteKind] = frozenset()
    stale: frozenset[SiteKind] = frozenset()
    state: CallState | None = None
    frozen: bool = False
    sending: Sending = AS_THEY_ARE
    codes: bool = False
    forecast: Weight = 0.0
    num_fresh: int = 0
    watches: bool = False
    late: bool = False
    renews: bool = True
    num_relayed: int = 1
    given_at: Any = None

    def gathers_old(self, kind: SiteKind | None, name: str) -> bool:
        """Whether a site that has gathered before is to read what the last call sent."""
        return kind in self.stale and not (self.state and self.state.gathers_last(name, self.num_fresh))
