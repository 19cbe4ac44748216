"""One rank's denoiser calls without values and without peers: what it would compute, send and wait for.

The code that is rehearsed is the one that draws, so that nothing of a method is written twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.transport import Message
from distrifusion.mesh import RankGrid
from distrifusion.partition import partition_levels
from distrifusion.plan import Plan
from distrifusion.planner.calls import Arguments
from distrifusion.planner.operations import Counting, Operations

# Numbers that ranks tell each other in a call, by the message's tag.
Said = dict[int, torch.Tensor]


@dataclass
class Post:
    """Messages that leave at once.

    Attributes:
        sent: bytes by the rank that gets them.
        received: bytes by the rank that they come from.
        waited: this call waits for them; else they have until the next one.
    """

    sent: dict[int, int]
    received: dict[int, int]
    waited: bool = False

    @property
    def num_bytes(self) -> int:
        """The larger way: links carry both at once."""
        return max(sum(self.sent.values()), sum(self.received.values()))


@dataclass
class CallWork:
    """One denoiser call of one rank.

    Attributes:
        operations: what it computes.
        sent: bytes by kind of value, as the exchange counts them.
        posts: what leaves, in order.
        kept: bytes that live until the next call.
    """

    operations: Operations
    sent: Counter[str] = field(default_factory=Counter)
    posts: list[Post] = field(default_factory=list)
    kept: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        posts = [[post.sent, post.received, post.waited] for post in self.posts]
        return {"operations": self.operations.as_dict(), "sent": dict(self.sent), "posts": posts, "kept": self.kept}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """From JSON."""
        posts = [Post(_numbered(sent), _numbered(received), waited) for sent, received, waited in row["posts"]]
        return cls(Operations.from_dict(row["operations"]), Counter(row["sent"]), posts, row["kept"])


@dataclass(frozen=True)
class Rehearsed:
    """The calls of one rank: the first one of a request, and one after the warm-up.

    Attributes:
        rank: whose.
        fresh: a synchronous call.
        steady: a call after the warm-up.
    """

    rank: int
    fresh: CallWork
    steady: CallWork


class SilentTransport:
    """A rank's transport without peers: notes what is posted, and hands back what it was told that they say.

    Args:
        rank, world_size: of the rank.
        told: numbers of other ranks, by rank.
    """

    def __init__(self, rank: int, world_size: int, told: Mapping[int, Said]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.posts: list[Post] = []
        self.call = 0
        self.said: Said = {}
        self._told = told

    def begin(self) -> None:
        """Start a call."""
        self.posts = []
        self.call += 1

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Silence:
        """Note the messages; tensors with values are answered with what the peer said, or with the own."""
        for message in sends:
            if not message.tensor.is_meta:
                self.said[message.tag] = message.tensor.clone()
        for message in receives:
            if not message.tensor.is_meta:
                message.tensor.copy_(self._told.get(message.peer, self.said).get(message.tag, self.said[message.tag]))
        post = Post(_by_peer(sends), _by_peer(receives))
        self.posts.append(post)
        return _Silence(self, post, self.call)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        return value


@dataclass
class _Silence:
    """What was posted in a call; whoever waits for it in the same call is noted."""

    transport: SilentTransport
    post: Post
    call: int

    def wait(self) -> None:
        self.post.waited |= self.transport.call == self.call


def _numbered(by_rank: Mapping[str, int]) -> dict[int, int]:
    """JSON has no keys but text."""
    return {int(rank): n for rank, n in by_rank.items()}


def _by_peer(messages: Sequence[Message]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for message in messages:
        total[message.peer] += message.tensor.nbytes
    return dict(total)


def rehearse(model: nn.Module, plan: Plan, arguments: Arguments, rank: int | None = None) -> Rehearsed:
    """One rank's calls of a plan.

    Args:
        model: the denoiser, on the meta device.
        plan: one that this library draws with.
        arguments: of one call, on the meta device.
        rank: whose; None takes the busiest.

    Raises:
        PlanError, UnsupportedModel: if the plan cannot divide the model.
    """
    rank = busiest_rank(model, plan, arguments) if rank is None else rank
    calls, said = _calls(model, plan, arguments, rank, {})
    if said:
        # Parts of tokens differ by one where they do not divide: then each rank's numbers are heard.
        team = RankGrid(plan, rank).layout(_sample(arguments).shape[0]).team
        ends = {peer: _calls(model, plan, arguments, peer, {})[1] for peer in {team[0], team[-1]} - {rank}}
        if any(not torch.equal(ours, said[tag]) for theirs in ends.values() for tag, ours in theirs.items()):
            told = {peer: _calls(model, plan, arguments, peer, {})[1] for peer in team if peer != rank}
            calls, _ = _calls(model, plan, arguments, rank, told)
    return Rehearsed(rank, *calls)


def busiest_rank(model: nn.Module, plan: Plan, arguments: Arguments) -> int:
    """A rank with the largest band; of those the one nearest to the middle, which has two neighbours."""
    sample = _sample(arguments)
    anatomy = anatomy_of(model)
    layout = RankGrid(plan, 0).layout(sample.shape[0])
    if isinstance(anatomy, TokenAnatomy):
        return 0
    levels = partition_levels(*sample.shape[2:], anatomy.num_levels(model), len(layout.team), plan.split)
    bands = levels[0].bands or ()
    middle = (len(layout.team) - 1) / 2
    return max(layout.team, key=lambda r: (len(bands[r]) if bands else 0, -abs(r - middle)))


def _sample(arguments: Arguments) -> torch.Tensor:
    sample = arguments.get("sample", arguments.get("hidden_states"))
    assert isinstance(sample, torch.Tensor)
    return sample


def _calls(
    model: nn.Module, plan: Plan, arguments: Arguments, rank: int, told: Mapping[int, Said]
) -> tuple[list[CallWork], Said]:
    """A fresh call and a steady one, and the numbers that the rank said to others."""
    transport = SilentTransport(rank, plan.num_ranks, told)
    # One call of the warm-up is like another, and nobody can say without values when they have drifted too far.
    denoiser = ParallelDenoiser(model, replace(plan, warmup=0, timed=False, resync=None), transport)
    denoiser.attach()
    try:
        with torch.no_grad():
            denoiser.open("rehearsal")
            works = [_one(model, denoiser, transport, arguments)]
            # In the first call of a transformer ranks also tell each other how many tokens they have.
            if transport.said or not plan.exact:
                works.append(_one(model, denoiser, transport, arguments))
            transport.begin()  # what is still under way was not waited for by a call
            denoiser.close()
    finally:
        denoiser.detach()
    return [works[0], works[-1]], transport.said


def _one(model: nn.Module, denoiser: ParallelDenoiser, transport: SilentTransport, arguments: Arguments) -> CallWork:
    denoiser.slot = 0
    denoiser.exchange.bytes_sent.clear()
    transport.begin()
    with Counting() as counting:
        model(**arguments)
    return CallWork(
        counting.operations, Counter(denoiser.exchange.bytes_sent), transport.posts, denoiser.pool.num_bytes
    )
