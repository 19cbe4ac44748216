"""Seconds and bytes of a plan on some devices and links: from what a rank computes, sends and waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from typing import Any

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.plan import Plan
from distrifusion.planner.costs import Costs
from distrifusion.planner.links import Links
from distrifusion.planner.operations import Operations
from distrifusion.planner.rehearsal import CallWork, Rehearsed
from distrifusion.planner.speeds import Speed


@dataclass(frozen=True)
class CallTime:
    """Seconds of a step of the busiest rank: of its denoiser call, or of two where branches of guidance come apart.

    Attributes:
        computing: the work.
        launching: starting kernels.
        waiting: for messages of this call.
        exposed: traffic that did not hide behind computing.
    """

    computing: float
    launching: float
    waiting: float
    exposed: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.computing + self.launching + self.waiting + self.exposed


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        weights: of all components.
        kept: between denoiser calls.
        activations: the most that a denoiser call, or the decoding when what was kept has gone, holds at once beside;
            estimated from the lives of tensors.
    """

    weights: int
    kept: int
    activations: int

    @property
    def grown(self) -> int:
        """What drawing takes beside the weights."""
        return self.kept + self.activations

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.grown


@dataclass(frozen=True)
class Prediction:
    """What a plan is predicted to take.

    Attributes:
        plan: the plan.
        steps: denoiser calls of a picture.
        fresh, steady: a synchronous call, and one after the warm-up.
        num_fresh: synchronous calls.
        bubble: steady calls that pass until all stages are busy.
        outside: seconds of a picture outside the denoiser.
        memory: of the busiest rank.
        sent: bytes that a rank sends in a steady call.
    """

    plan: Plan
    steps: int
    fresh: CallTime
    steady: CallTime
    num_fresh: int
    bubble: float
    outside: float
    memory: Memory
    sent: int

    @property
    def per_step(self) -> float:
        """Seconds of a step after the warm-up."""
        return self.steady.total

    @property
    def per_picture(self) -> float:
        """Seconds of a whole picture."""
        num_fresh = min(self.num_fresh, self.steps)
        steady = (self.steps - num_fresh + self.bubble) * self.steady.total
        return num_fresh * self.fresh.total + steady + self.outside

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a picture by what they are spent on; `warm-up` is what synchronous calls take more."""
        steps = self.steps
        return {
            "compute": steps * self.steady.computing,
            "launch": steps * self.steady.launching,
            "link": steps * (self.steady.waiting + self.steady.exposed),
            "warm-up": min(self.num_fresh, steps) * (self.fresh.total - self.steady.total)
            + self.bubble * self.steady.total,
            "outside": self.outside,
        }

    @property
    def limit(self) -> str:
        """What takes most beside computing, or `compute` where all else is less than a tenth of the picture."""
        others = {name: seconds for name, seconds in self.parts.items() if name != "compute"}
        name = max(others, key=lambda n: others[n])
        return name if others[name] > self.per_picture / 10 else "compute"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "plan": str(self.plan),
            "devices": self.plan.num_ranks,
            "predicted": True,
            "seconds_per_step": self.per_step,
            "seconds_per_picture": self.per_picture,
            "parts": self.parts,
            "limit": self.limit,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "sent_per_step": self.sent,
            "exact": self.plan.exact,
        }


def predict(
    costs: Costs, plan: Plan, speed: Speed, links: Links, steps: int, outside: float | None = None
) -> Prediction:
    """What a plan takes; raises PlanError where it cannot divide the model.

    Args:
        costs: of the model and size.
        plan: what is predicted.
        speed, links: of the devices.
        steps: of a picture.
        outside: seconds of a picture outside the denoiser; None: those of encoding and decoding, as far as known.
    """
    work = costs.of(plan)
    slower = _slower(costs, plan, speed)
    clock = partial(_time, rank=work.rank, plan=plan, speed=speed, links=links, slower=slower)
    chain = _one_after_the_other(costs, plan, work)
    fresh = clock(chain or work.fresh)
    if chain is not None and plan.exact:
        steady = fresh
    else:
        steady = _mean([clock(_flowing(call, plan)) for call in work.cycle])
        if plan.stages > 1:
            # Hosts start kernels before a piece is there, each for its own stage.
            ahead = partial(clock, speed=replace(speed, host=0.0))
            steady = _as_long_as_a_piece_takes(steady, costs.whole(plan), work, plan, ahead)
    num_pieces, num_calls = plan.pieces or plan.stages, costs.blueprint.calls_per_step
    sent = sum(sum(post.sent.values()) for call in work.cycle for post in call.posts)
    return Prediction(
        plan=plan,
        steps=steps,
        fresh=_several(fresh, num_calls),
        steady=_several(steady, num_calls),
        num_fresh=0 if plan.exact else plan.num_synchronous,
        bubble=(plan.stages - 1) / num_pieces if plan.stages > 1 and plan.late else 0.0,
        outside=_outside(costs, plan, speed, links) if outside is None else outside,
        memory=_memory(costs, plan, work),
        sent=round(sent * num_calls / len(work.cycle)),
    )


def _one_after_the_other(costs: Costs, plan: Plan, work: Rehearsed) -> CallWork | None:
    """A synchronous call of stages or components, which run one after the other: their work and borders in a row."""
    num_parts = max(plan.stages, plan.components)
    if num_parts == 1:
        return None
    call = work.fresh if plan.stages > 1 else work.steady
    posts = [replace(post, waited=True) for post in call.posts if post.num_bytes > 1]
    # What a part receives crosses every border once; what it sends is what the next one receives, or the prediction.
    coming = [post for post in posts if post.received]
    return CallWork(costs.whole(plan).operations, posts=(num_parts - 1) * coming + [p for p in posts if not p.received])


def _flowing(call: CallWork, plan: Plan) -> CallWork:
    """A call of a stage: while a piece arrives others are computed, so nobody waits for one."""
    return replace(call, posts=[replace(p, waited=False) for p in call.posts]) if plan.stages > 1 else call


def _as_long_as_a_piece_takes(
    steady: CallTime, whole: CallWork, work: Rehearsed, plan: Plan, clock: Callable[[CallWork], CallTime]
) -> CallTime:
    """A step of stages when the next one cannot begin with a piece before that piece has come through all of them.

    With twice as many pieces as stages or more nobody waits for that; with as many, for what a piece needs between.
    """
    num_pieces = plan.pieces or plan.stages
    piece = clock(replace(whole, operations=whole.operations.share(num_pieces)))
    coming = [replace(post, sent={}, waited=True) for post in work.steady.posts if post.num_bytes > 1 and post.received]
    between = clock(CallWork(Operations(), posts=coming)).waiting / num_pieces
    way = piece.total + plan.stages * between
    return replace(steady, waiting=steady.waiting + max(0.0, way - steady.total))


def _mean(times: Sequence[CallTime]) -> CallTime:
    return CallTime(*(sum(parts) / len(times) for parts in zip(*map(astuple, times), strict=True)))


def _several(time: CallTime, num_calls: int) -> CallTime:
    return CallTime(*(num_calls * part for part in astuple(time)))


def _slower(costs: Costs, plan: Plan, speed: Speed) -> float:
    """By how much longer a rank computes than its part says; kernels of components alone are as large as one's."""
    if plan.num_ranks == 1:
        return 1.0
    convolved = plan.components < plan.num_ranks and not isinstance(anatomy_of(costs.blueprint.denoiser), TokenAnatomy)
    return speed.divided * (speed.convolved if convolved else 1.0)


def _time(call: CallWork, rank: int, plan: Plan, speed: Speed, links: Links, slower: float) -> CallTime:
    turns = speed.turns(plan.num_ranks)
    computing = speed.computing(call.operations) * turns * slower
    launching = turns * (speed.launching(call.operations) + len(call.posts) * speed.a_post(plan))
    launching = max(launching, turns * speed.starting(call.operations) - computing)
    waiting = sum(links.seconds(post, rank) for post in call.posts if post.waited)
    under_way = sum(links.seconds_under_way(post, rank) for post in call.posts if not post.waited)
    hidden = links.overlap * min(under_way, computing + launching)
    return CallTime(computing, launching, waiting, under_way - hidden)


def _outside(costs: Costs, plan: Plan, speed: Speed, links: Links) -> float:
    """Seconds of the prompt, which one rank encodes, and of the pictures, which all decode."""
    decoding = costs.decoding(plan)
    slower = speed.divided * speed.convolved if plan.num_ranks > 1 else 1.0
    decoded = 0.0 if decoding is None else _time(decoding, 0, plan, speed, links, slower).total
    return decoded + sum(speed.seconds(work) for work in costs.encoding())


def _memory(costs: Costs, plan: Plan, work: Rehearsed) -> Memory:
    kept = work.steady.kept * costs.blueprint.calls_per_step  # each of them has its own
    # The first call makes what is kept, so it is among what that call holds.
    peak = max(call.operations.peak for call in work.cycle)
    activations = max(work.fresh.operations.peak - work.fresh.kept, peak)
    if (decoding := costs.decoding(plan)) is not None:
        activations = max(activations, decoding.operations.peak - kept)
    return Memory(work.weights + costs.blueprint.others, kept, activations)
