"""One rank's denoiser calls without values and without peers: what it would compute, send and wait for.

The code that is rehearsed is the one that draws, so that nothing of a method is written twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.transport import Message
from distrifusion.layout.mesh import RankGrid
from distrifusion.layout.partition import partition_levels
from distrifusion.plan import Plan
from distrifusion.planner.calls import Arguments
from distrifusion.planner.operations import Counting, Operations

# Numbers that ranks tell each other, by the call and the message's tag; and those of all ranks of a team, by the team.
Said = dict[tuple[int, int], torch.Tensor]
Heard = dict[tuple[int, ...], dict[int, Said]]
_ROUNDS = 3  # of hearing what others say


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
    """The calls of one rank of a request.

    Attributes:
        rank: whose.
        weights: bytes of the model's weights that it works with.
        fresh: the first call, which is synchronous.
        cycle: calls after the warm-up, which repeat; more than one where components run in some of them alone.
    """

    rank: int
    weights: int
    fresh: CallWork
    cycle: tuple[CallWork, ...]

    @property
    def steady(self) -> CallWork:
        """The first call of the cycle."""
        return self.cycle[0]

    @property
    def work(self) -> int:
        """Operations of a cycle."""
        return sum(call.operations.total for call in self.cycle)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        cycle = [call.as_dict() for call in self.cycle]
        return {"rank": self.rank, "weights": self.weights, "fresh": self.fresh.as_dict(), "cycle": cycle}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """From JSON."""
        cycle = tuple(CallWork.from_dict(call) for call in row["cycle"])
        return cls(row["rank"], row["weights"], CallWork.from_dict(row["fresh"]), cycle)


class SilentTransport:
    """A rank's transport without peers: notes what is posted, and hands back what it was told that they say.

    What they say are whole numbers; other tensors are left as they are.

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
        """Note the messages; numbers are answered with what the peer said, or with the own."""
        for message in sends:
            if _are_numbers(message.tensor):
                self.said[self.call, message.tag] = message.tensor.clone()
        for message in receives:
            if _are_numbers(message.tensor):
                key = self.call, message.tag
                message.tensor.copy_(self._told.get(message.peer, self.said).get(key, self.said[key]))
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


def _are_numbers(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.int64 and not tensor.is_meta


def _numbered(by_rank: Mapping[str, int]) -> dict[int, int]:
    """JSON has no keys but text."""
    return {int(rank): n for rank, n in by_rank.items()}


def _by_peer(messages: Sequence[Message]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for message in messages:
        total[message.peer] += message.tensor.nbytes
    return dict(total)


def rehearse(
    model: nn.Module, plan: Plan, arguments: Arguments, rank: int | None = None, heard: Heard | None = None
) -> Rehearsed:
    """One rank's calls of a plan.

    Args:
        model: the denoiser, on the meta device.
        plan: one that this library draws with.
        arguments: of one call, on the meta device.
        rank: whose; None takes the busiest.
        heard: what teams said in other plans of these arguments, and will: most plans say the same.

    Raises:
        PlanError, UnsupportedModel: if the plan cannot divide the model.
    """
    heard = {} if heard is None or plan.stages > 1 else heard  # pieces have numbers of their own
    if rank is not None:
        return _rehearse(model, plan, arguments, rank, heard)
    # Of those that do as much the last one, which gives the prediction.
    found = [_rehearse(model, plan, arguments, r, heard) for r in _candidates(model, plan, arguments)]
    return max(found, key=lambda r: (r.work, r.rank))


def _rehearse(model: nn.Module, plan: Plan, arguments: Arguments, rank: int, heard: Heard) -> Rehearsed:
    """One rank's calls, when it has been heard what the others say.

    They are first taken to have as many tokens as the rank itself. Where tokens do not divide, that is wrong by one: a
    call may then fail, but not before the rank has said its own numbers, and with those it comes further.
    """
    run = partial(_calls, model, plan, arguments)
    team = RankGrid(plan, rank).layout(_sample(arguments).shape[0]).team
    known = heard.get(team, {})
    found, said, _ = run(rank, known)
    if found is not None and (not said or _alike(said, known.get(rank, {}))):
        return found
    if found is not None and not known:
        # Of a whole team the first rank has most and the last one least; stages say each their own.
        some = team if plan.stages > 1 else (team[0], team[-1])
        ends = [run(peer, {})[1] for peer in {*some} - {rank}]
        if all(torch.equal(ours, said[key]) for theirs in ends for key, ours in theirs.items() if key in said):
            heard[team] = dict.fromkeys(team, said)
            return found
    told: dict[int, Said] = {}
    for _ in range(_ROUNDS):
        told = {peer: run(peer, told)[1] for peer in team}
        found, _, error = run(rank, told)
        if found is not None:
            heard[team] = told
            return found
    assert error is not None
    raise error


def _alike(one: Said, other: Said) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in one.items())


def _candidates(model: nn.Module, plan: Plan, arguments: Arguments) -> Sequence[int]:
    """Ranks of which one is the busiest.

    Of stages and components that is known when all have run; of bands it is one of the largest, of those the one
    nearest to the middle, which has two neighbours; otherwise the first ranks have as much as any, or one more.
    """
    sample = _sample(arguments)
    anatomy = anatomy_of(model)
    layout = RankGrid(plan, 0).layout(sample.shape[0])
    if plan.stages > 1 or plan.components > 1:
        return layout.team[:: plan.ulysses]
    if plan.tp > 1 or isinstance(anatomy, TokenAnatomy):
        return (0,)
    levels = partition_levels(*sample.shape[2:], anatomy.num_levels(model), len(layout.team), plan.split)
    bands = levels[0].bands or ()
    middle = (len(layout.team) - 1) / 2
    return (max(layout.team, key=lambda r: (len(bands[r]) if bands else 0, -abs(r - middle))),)


def _sample(arguments: Arguments) -> torch.Tensor:
    sample = arguments.get("sample", arguments.get("hidden_states"))
    assert isinstance(sample, torch.Tensor)
    return sample


def _calls(
    model: nn.Module, plan: Plan, arguments: Arguments, rank: int, told: Mapping[int, Said]
) -> tuple[Rehearsed | None, Said, RuntimeError | None]:
    """What a rank does, and the numbers that it said to others; or the error of a call that was told wrong numbers."""
    transport = SilentTransport(rank, plan.num_ranks, told)
    # One call of the warm-up is like another, and nobody can say without values when they have drifted too far.
    denoiser = ParallelDenoiser(model, replace(plan, warmup=0, timed=False, resync=None), transport)
    denoiser.attach()
    try:
        fresh, cycle = _request(model, denoiser, transport, arguments)
        weights = denoiser.weight_bytes
    except RuntimeError as error:
        return None, transport.said, error
    finally:
        denoiser.detach()
    return Rehearsed(rank, weights, fresh, cycle), transport.said, None


def _request(
    model: nn.Module, denoiser: ParallelDenoiser, transport: SilentTransport, arguments: Arguments
) -> tuple[CallWork, tuple[CallWork, ...]]:
    """The first call of a request, and a cycle of those after its warm-up."""
    plan = denoiser.plan
    with torch.no_grad():
        if plan.components > 1:
            model(**arguments)  # the chain is cut before its first call; what that takes is no work of a device
        denoiser.open("rehearsal")
        fresh = _one(model, denoiser, transport, arguments)
        cycle = [fresh]
        # In the first call of a transformer ranks also tell each other how many tokens they have.
        if transport.said or not plan.exact:
            cycle = [_one(model, denoiser, transport, arguments) for _ in range(plan.stride)]
        transport.begin()  # what is still under way was not waited for by a call
        denoiser.close()
    return fresh, tuple(cycle)


def _one(model: nn.Module, denoiser: ParallelDenoiser, transport: SilentTransport, arguments: Arguments) -> CallWork:
    denoiser.slot = 0
    denoiser.exchange.bytes_sent.clear()
    transport.begin()
    with Counting() as counting:
        model(**arguments)
    sent = Counter({kind: n for kind, n in denoiser.exchange.bytes_sent.items() if n})
    return CallWork(counting.operations, sent, transport.posts, denoiser.pool.num_bytes)
