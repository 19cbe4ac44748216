"""Seconds and bytes of a plan on some devices and links: from what a rank computes, sends and waits for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from distrifusion.mesh import RankGrid
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan
from distrifusion.planner.blueprint import Blueprint
from distrifusion.planner.calls import Arguments
from distrifusion.planner.depth import Undivided, by_formula, undivided
from distrifusion.planner.links import Links
from distrifusion.planner.rehearsal import CallWork, Rehearsed, rehearse
from distrifusion.planner.speeds import Speed


@dataclass(frozen=True)
class CallTime:
    """Seconds of one denoiser call of the busiest rank.

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
        activations: the most that a denoiser call holds at once; estimated from the lives of its tensors.
    """

    weights: int
    kept: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; the VAE's activations come when those of the denoiser have gone."""
        return self.weights + self.kept + self.activations


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
        formula: whether the costs come from a formula, not from the code that draws.
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
    formula: bool

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
            "warm-up": self.per_picture - self.outside - steps * self.steady.total,
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
            "by_formula": self.formula,
        }


class Costs:
    """What plans cost for one model, size and number of pictures; each is rehearsed once.

    Args:
        blueprint: the pipeline.
        arguments: of one denoiser call.
    """

    def __init__(self, blueprint: Blueprint, arguments: Arguments) -> None:
        self.blueprint = blueprint
        self.arguments = arguments
        self._known: dict[Plan, Rehearsed] = {}
        self._wholes: dict[int, Undivided] = {}

    def put(self, plan: Plan, rehearsed: Rehearsed) -> None:
        """Take what was rehearsed before."""
        self._known[_key(plan)] = rehearsed

    @property
    def num_rows(self) -> int:
        """Rows of the batch of a call."""
        sample = self.arguments.get("sample", self.arguments.get("hidden_states"))
        assert sample is not None
        return sample.shape[0]

    def of(self, plan: Plan) -> Rehearsed:
        """The calls of a plan's busiest rank; raises PlanError where it cannot divide the model."""
        key = _key(plan)
        if key not in self._known:
            self._known[key] = (
                by_formula(self.blueprint.denoiser, plan, self.whole(plan))
                if plan.owns_weights
                else rehearse(self.blueprint.denoiser, key, self.arguments)
            )
        return self._known[key]

    def whole(self, plan: Plan | None = None) -> Undivided:
        """An undivided call of a plan's part of the batch."""
        rows = len(RankGrid(plan, 0).layout(self.num_rows).rows) if plan else self.num_rows
        if rows not in self._wholes:
            self._wholes[rows] = undivided(self.blueprint.denoiser, _first_rows(self.arguments, rows, self.num_rows))
        return self._wholes[rows]


def _key(plan: Plan) -> Plan:
    """Plans that differ in this alone have the same calls."""
    return replace(plan, warmup=0, timed=False, resync=None)


def _first_rows(arguments: Arguments, rows: int, num_rows: int) -> Arguments:
    def cut(x: Any) -> Any:
        return x[:rows] if x.dim() and x.shape[0] == num_rows else x

    return map_tensors(arguments, cut)


def predict(costs: Costs, plan: Plan, speed: Speed, links: Links, steps: int, outside: float = 0.0) -> Prediction:
    """What a plan takes; raises PlanError where it cannot divide the model."""
    work = costs.of(plan)
    fresh, steady = (_time(call, work.rank, plan, speed, links) for call in (work.fresh, work.steady))
    num_pieces = plan.pieces or plan.stages
    return Prediction(
        plan=plan,
        steps=steps,
        fresh=fresh,
        steady=steady,
        num_fresh=0 if plan.exact else plan.num_synchronous,
        bubble=(plan.stages - 1) / num_pieces if plan.stages > 1 else 0.0,
        outside=outside,
        memory=_memory(costs, plan, work),
        sent=sum(sum(post.sent.values()) for post in work.steady.posts),
        formula=plan.owns_weights,
    )


def _time(call: CallWork, rank: int, plan: Plan, speed: Speed, links: Links) -> CallTime:
    slower = speed.divided if plan.num_ranks > 1 else 1.0
    computing, launching = speed.computing(call.operations) * slower, speed.launching(call.operations)
    waiting = sum(links.seconds(post, rank) for post in call.posts if post.waited)
    under_way = sum(links.seconds(post, rank) for post in call.posts if not post.waited)
    hidden = links.overlap * min(under_way, computing + launching)
    return CallTime(computing, launching, waiting, under_way - hidden)


def _memory(costs: Costs, plan: Plan, work: Rehearsed) -> Memory:
    own = plan.tp * plan.stages
    weights = costs.blueprint.weights // own + costs.blueprint.others
    # The first call makes what is kept, so it is among what that call holds.
    activations = max(work.fresh.operations.peak - work.fresh.kept, work.steady.operations.peak)
    return Memory(weights, work.steady.kept, activations)
