"""Calls of a denoiser with random weights as a rank makes them: whole, in bands and in stages, and what each takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from distrifusion.denoiser import ParallelDenoiser
from distrifusion.errors import DistrifusionError
from distrifusion.memory.free import node_memory
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan
from distrifusion.planner.blueprint import Blueprint
from distrifusion.planner.calls import Arguments
from distrifusion.planner.operations import Counting, Operations
from distrifusion.planner.rehearsal import CallWork, SilentTransport, rehearse
from distrifusion.planner.turns import in_turns

_BUDGET = 1.0  # seconds for each call
# Calls are measured of which even a slow device makes one in some seconds: operations on a CPU, and on others.
_MOST_WORK = {"cpu": 5e10, "cuda": 5e12}
# Pixels, and whether both branches of guidance: the first two tell what kernels cost beside their work, the last one at
# which rates they work.
_SIZES = ((128, False), (256, False), (512, True))
_BANDS, _STAGES = Plan.parse("patch2"), Plan.parse("pipe2.m4.w0")


@dataclass(frozen=True)
class RankCall:
    """One rank's part of a call, whose messages go nowhere."""

    work: CallWork
    seconds: float


@dataclass
class MeasuredCalls:
    """Work and seconds of calls.

    Attributes:
        whole: undivided calls, the smallest first; none where one would take too long, or too much memory.
        bands: one of two ranks' part of the smallest; None where it cannot be divided so.
        stages: one of two stages' part of it in four pieces, after the warm-up; None where it has no stages.
    """

    whole: list[tuple[Operations, float]] = field(default_factory=list)
    bands: RankCall | None = None
    stages: RankCall | None = None


def measured_calls(blueprint: Blueprint, device: torch.device) -> MeasuredCalls:
    """Measure them: the small ones by turns, as what a post costs is a small difference; the large one after them."""
    found, most = MeasuredCalls(), _MOST_WORK[device.type]
    one_row = replace(blueprint, guided=False)
    calls = [(blueprint if both else one_row).arguments(pixels, pixels) for pixels, both in _SIZES]
    known = [(given, work) for given in calls if (work := _work_of(blueprint.denoiser, given)).total <= most]
    if not known or 2 * blueprint.weights > node_memory().free:
        return found
    empty = blueprint.denoiser
    made: nn.Module = type(empty).from_config(empty.config)  # type: ignore[attr-defined]
    model = made.to(device, blueprint.dtype).eval()
    small = [given for given, _ in known[:2]]
    parts = {plan: part for plan in (_BANDS, _STAGES) if (part := _smallest(empty, plan, small)) is not None}
    with ExitStack() as open_calls:
        runs = [_whole(model, given, device) for given in small]
        runs += [open_calls.enter_context(_part(model, plan, given, device)) for plan, (given, _) in parts.items()]
        times = in_turns(runs, device, len(runs) * _BUDGET)
    found.whole = [(work, seconds) for (_, work), seconds in zip(known[:2], times, strict=False)]
    divided = zip(parts.items(), times[len(small) :], strict=True)
    measured = {plan: RankCall(work, seconds) for (plan, (_, work)), seconds in divided}
    found.bands, found.stages = measured.get(_BANDS), measured.get(_STAGES)
    for given, work in known[2:]:
        found.whole.append((work, in_turns([_whole(model, given, device)], device, _BUDGET)[0]))
    return found


def _work_of(model: nn.Module, given: Arguments) -> Operations:
    with Counting() as counting:
        model(**given)
    return counting.operations


def _smallest(model: nn.Module, plan: Plan, calls: Sequence[Arguments]) -> tuple[Arguments, CallWork] | None:
    """The smallest call that a plan divides, beside which a post's cost shows best, and the first rank's part of it."""
    for given in calls:
        try:
            return given, rehearse(model, plan, given, 0).steady
        except DistrifusionError:
            continue
    return None


def _whole(model: nn.Module, given: Arguments, device: torch.device) -> Callable[[], object]:
    values = _with_values(given, device)
    return lambda: model(**values)


@contextmanager
def _part(model: nn.Module, plan: Plan, given: Arguments, device: torch.device) -> Iterator[Callable[[], object]]:
    """The first rank's calls of a request: the first of them is synchronous, as its warm-up."""
    own = copy.deepcopy(model, {id(held): held for held in (*model.parameters(), *model.buffers())})
    transport = SilentTransport(0, plan.num_ranks, {})
    denoiser = ParallelDenoiser(own, plan, transport)
    values = _with_values(given, device)

    def call() -> None:
        denoiser.slot = 0
        transport.begin()
        own(**values)

    denoiser.attach()
    try:
        denoiser.open("calibration")
        yield call
        transport.begin()  # what is still under way was not waited for by a call
        denoiser.close()
    finally:
        denoiser.detach()


def _with_values(value: Any, device: torch.device) -> Any:
    return map_tensors(value, lambda x: torch.ones(x.shape, dtype=x.dtype, device=device))
