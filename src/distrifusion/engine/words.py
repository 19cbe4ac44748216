"""What a call of a pipeline says of samplers."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distrifusion.engine import pipelines
from distrifusion.errors import ConfigError, PlanError
from distrifusion.plan import Plan
from distrifusion.samplers.knobs import Knobs, Method, knobs_of
from distrifusion.samplers.schedules import check_scheduler

SEQUENTIAL = "sequential"
_KNOBS = ("window", "order", "memory", "split", "tolerance", "noise_tolerance", "regularisation", "max_calls")
_TRAJECTORY = ("keep_trajectory", "variation_steps")
_FEW_STEPS = 15
WORDS = ("sampler", *_KNOBS, *_TRAJECTORY)


@dataclass(frozen=True)
class SamplerWish:
    """What a call wants of samplers.

    Attributes:
        method: how steps are solved together; None: one after the other.
        knobs: of the method.
        keep_trajectory: the states are kept for a later call.
        variation_steps: the run starts from the kept states, and only so many last steps are solved anew.
    """

    method: Method | None
    knobs: Knobs
    keep_trajectory: bool
    variation_steps: int | None


def take(arguments: Mapping[str, Any]) -> tuple[SamplerWish | None, dict[str, Any]]:
    """The wish of a call, None if it has none, and its other arguments.

    Raises:
        ConfigError: on an unknown sampler, a knob without one or out of range.
    """
    given = {name: arguments[name] for name in WORDS if arguments.get(name) is not None}
    rest = {name: value for name, value in arguments.items() if name not in WORDS}
    if not given:
        return None, rest
    return _wish(given), rest


def check(cls: type, plan: Plan | None, scheduler: Any, arguments: Mapping[str, Any]) -> None:
    """Check what can be checked of a call's wish before it begins.

    Args:
        cls: the pipeline's class.
        plan: by which it is divided; None where that is not known yet.
        scheduler: its own; None where that is not known yet.
        arguments: of the call, by name.

    Raises:
        ConfigError: if the pipeline, its scheduler or an argument cannot go with it.
        PlanError: if the plan leaves values out for good.
    """
    wish, rest = take(arguments)
    if wish is None:
        return
    pipelines.facts_of(cls)
    pipelines.check_arguments(rest)
    if wish.method is None:
        return
    if scheduler is not None:
        check_scheduler(scheduler)
    if plan is not None and (plan.naive or plan.frozen):
        raise PlanError(
            f"plan '{plan}' never exchanges what a window of steps would settle on; use "
            f"'{Plan(plan.dp, plan.cfg, plan.patch)}', or sampler='{SEQUENTIAL}'"
        )
    steps = pipelines.most_steps(cls, rest)
    if steps is not None:
        wish.knobs.for_steps(steps)
        if wish.variation_steps is not None and wish.variation_steps > steps:
            raise ConfigError(f"variation_steps={wish.variation_steps} is more than the {steps} steps; use at most all")


def warn_of_few_steps(cls: type, arguments: Mapping[str, Any]) -> None:
    """Warn of a wish that solves few steps together: nearly as many calls would be left, each of many rows.

    Args:
        cls: the pipeline's class.
        arguments: of its call, by name.
    """
    wish, rest = take(arguments)
    steps = pipelines.most_steps(cls, rest)
    if wish is not None and wish.method is not None and steps is not None and steps < _FEW_STEPS:
        warnings.warn(
            f"sampler='{wish.method}' saves few of {steps} denoiser calls, if any, and each has many rows; it is for "
            "many steps (50 and more), so leave it out here",
            stacklevel=2,
        )


def for_plan(wish: SamplerWish, plan: Plan | None) -> SamplerWish:
    """The wish on a plan: values that are one call old are to be of the same step, and are not trusted at once."""
    if plan is None or plan.exact:
        return wish
    return replace(wish, knobs=replace(wish.knobs, hits=2, fixed=True))


def _wish(given: dict[str, Any]) -> SamplerWish:
    if "sampler" not in given:
        name = next(iter(given))
        raise ConfigError(f"{name}= is a choice of sampler='picard' or 'taa'; add one, or leave {name}= out")
    name = given["sampler"]
    methods = (SEQUENTIAL, *Method)
    if name not in methods:
        near = difflib.get_close_matches(str(name), methods, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"sampler={name!r} is unknown; {hint}it is one of {', '.join(methods)}")
    keep, variation = given.get("keep_trajectory", False), given.get("variation_steps")
    if type(keep) is not bool:
        raise ConfigError(f"keep_trajectory={keep!r} must be True or False")
    if variation is not None and (type(variation) is not int or variation < 1):
        raise ConfigError(f"variation_steps={variation!r} must be a whole number of at least 1")
    if name == SEQUENTIAL:
        if more := sorted(given.keys() - {"sampler"}):
            raise ConfigError(f"{', '.join(more)}: sampler='{SEQUENTIAL}' takes one step after the other; use 'picard'")
        return SamplerWish(None, Knobs(), False, None)
    method = Method(name)
    return SamplerWish(method, knobs_of(method, **{k: given[k] for k in _KNOBS if k in given}), keep, variation)
