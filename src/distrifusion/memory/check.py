"""Whether what a plan keeps fits into what is free: agreed by all ranks before the first step."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from distrifusion.errors import PoolTooLarge
from distrifusion.exchange.meeting import running_system
from distrifusion.exchange.verbs import Exchange
from distrifusion.memory.free import free_bytes, size_in_words
from distrifusion.plan import DEFAULT_STALE, Norms, Plan

# Parts of the height and width in which a smaller picture is looked for.
_PARTS = 16


class Question(Protocol):
    """A denoiser call whose values are to be kept."""

    def by_rank(self, plan: Plan) -> list[int]:
        """Bytes that every rank of a plan would keep."""

    def smaller(self, part: float) -> Question | None:
        """The same for a picture of a part of the height and of the width; None where the model alone knows that."""


@dataclass(frozen=True)
class Places:
    """Where the ranks are: ranks of one place (a machine's CPU, a GPU) share what is free there.

    Attributes:
        of: the place of every rank.
        free: bytes by place.
    """

    of: tuple[int, ...]
    free: Mapping[int, int]

    def short(self, needed: Sequence[int]) -> tuple[int, int] | None:
        """The place where most is missing for the needs of ranks 0, 1, …, and the bytes needed there; None if none."""
        totals = dict.fromkeys(self.of, 0)
        for place, num_bytes in zip(self.of, needed, strict=False):
            totals[place] += num_bytes
        missing = {place: total - self.free[place] for place, total in totals.items()}
        worst = max(missing, key=lambda place: (missing[place], -place))
        return (worst, totals[worst]) if missing[worst] > 0 else None


def check_fits(question: Question, plan: Plan, exchange: Exchange, device: torch.device) -> None:
    """Refuse a call whose kept values do not fit beside what is in memory already. Every rank calls it.

    All ranks hear what is free everywhere, so that all come to the same verdict. What the call computes beside them
    is not predicted.

    Raises:
        PoolTooLarge: naming what is needed, what is free, and what fits.
    """
    needed = question.by_rank(plan)
    places = _agree(exchange, device, sum(needed))
    short = places.short(needed)
    if short is None:
        return
    place, total = short
    sharing = sum(other == place for other in places.of)
    who = f"{sharing} ranks that share a memory" if sharing > 1 else f"rank {places.of.index(place)}"
    fitting = next(_that_fit(question, plan, places))
    raise PoolTooLarge(
        f"plan '{plan}' would keep {size_in_words(total)} between denoiser calls on {who}, "
        f"and {size_in_words(places.free[place])} are free there; '{fitting}' fits"
        f"{_smaller_picture(question, plan, places)}",
        needed=total,
        free=places.free[place],
        fits=str(fitting),
    )


def _agree(exchange: Exchange, device: torch.device, wanted: int) -> Places:
    """Every rank's place and the least that a rank of a place found free there."""
    name = running_system() if device.type == "cpu" else f"{running_system()} {device}"
    own = torch.tensor([zlib.crc32(name.encode()), free_bytes(device, wanted)], device=device)
    shapes = {rank: own.shape for rank in range(exchange.transport.world_size) if rank != exchange.transport.rank}
    answers = {exchange.transport.rank: own, **exchange.collect("free memory", own, shapes).wait()}
    found = [tuple(answer.tolist()) for _, answer in sorted(answers.items())]
    free = {place: min(n for other, n in found if other == place) for place, _ in found}
    return Places(tuple(place for place, _ in found), free)


def _that_fit(question: Question, plan: Plan, places: Places) -> Iterator[Plan]:
    """Plans that fit, the nearest first; the last keeps nothing."""
    for candidate in _near(plan):
        if places.short(question.by_rank(candidate)) is None:
            yield candidate


def _near(plan: Plan) -> Iterator[Plan]:
    """Plans that keep less: without a forecast, without codes, with keys and values alone, then those with the branches
    of the guidance apart, then on fewer ranks, at last the exact plan of these ranks."""
    thinner = [*_thinner(plan)]
    yield from thinner
    for own in (plan, *thinner):
        if own.cfg == 1 and own.patch % 2 == 0 and own.patch > 2:
            yield replace(own, cfg=2, patch=own.patch // 2)
    fewer = (own.nearest(n) for n in range(plan.num_ranks - 1, 1, -1) for own in (plan, *thinner))
    yield from (own for own in fewer if not own.exact and own.stages <= plan.stages)
    if plan.stages > 1:
        yield replace(plan, late=False, pieces=None, forecast=0)
    else:
        yield Plan(dp=plan.dp, cfg=plan.cfg, patch=plan.patch, split=plan.split)


def _thinner(plan: Plan) -> Iterator[Plan]:
    """The plan with one thing less to keep, with two, and so on; at last stale keys and values as they arrived."""
    if plan.forecast:
        yield (plan := replace(plan, forecast=0))
    if plan.stale and plan.delta is not None:
        yield (plan := replace(plan, delta=None))
    if plan.stale > DEFAULT_STALE:
        yield replace(plan, stale=DEFAULT_STALE, norms=Norms.CORRECTED)


def _smaller_picture(question: Question, plan: Plan, places: Places) -> str:
    """The largest picture that fits, in words."""
    for part in range(_PARTS - 1, 0, -1):
        smaller = question.smaller(part / _PARTS)
        if smaller is not None and places.short(smaller.by_rank(plan)) is None:
            return f", and so does this plan with a picture {part / _PARTS:.0%} as high and as wide"
    return ""
