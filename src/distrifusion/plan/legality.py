"""What is legal in a plan: ranges, words that clash, words without effect, and what a kind of model can take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from distrifusion.errors import PlanError
from distrifusion.plan import text
from distrifusion.plan.kinds import (
    ALL_KINDS,
    DEFAULT_STALE,
    DELTA_BITS,
    MOST_FORECAST,
    Norms,
    SiteKind,
    Split,
)

if TYPE_CHECKING:
    from distrifusion.plan.plan import Plan

_SAME_TOKENS = "are two ways to divide the same tokens"
_SAME_LAYERS = "both say which weights a rank works with"
_OF_ONE_WHOLE = "cannot be had at once: a component that runs on old inputs needs the whole picture"
# Pairs of methods that clash, and why. Every other pair composes.
CLASHES = {
    ("patch", "ulysses"): _SAME_TOKENS,
    ("patch", "ring"): _SAME_TOKENS,
    ("patch", "pipe"): _SAME_TOKENS,
    ("ring", "pipe"): "both pass keys and values of parts of the picture, in different orders",
    ("patch", "async"): _OF_ONE_WHOLE,
    ("ulysses", "async"): _OF_ONE_WHOLE,
    ("ring", "async"): _OF_ONE_WHOLE,
    ("pipe", "async"): "are two ways to divide the network in depth",
    ("patch", "tp"): "are two ways to divide the same layers",
    ("ulysses", "tp"): "are two ways to divide the same heads",
    ("ring", "tp"): "are two ways to divide the same attention",
    ("pipe", "tp"): _SAME_LAYERS,
    ("async", "tp"): _SAME_LAYERS,
}


def check(plan: Plan) -> None:
    """Raise PlanError on a value out of range, on words that clash, and on a word without effect."""
    _check_ranges(plan)
    _check_clashes(plan)
    _check_depth(plan)
    _check_bands(plan)
    _check_knobs(plan)


def _check_ranges(plan: Plan) -> None:
    if plan.dp < 1:
        raise PlanError(f"dp{plan.dp}: the number of groups that share the pictures is at least 1")
    if plan.cfg not in (1, 2):
        raise PlanError(f"cfg{plan.cfg}: guidance has two branches, so the degree is cfg1 or cfg2")
    for word, field in text.AXES.items():
        if getattr(plan, field) < 1:
            raise PlanError(f"{word}{getattr(plan, field)}: a degree is at least 1; leave it out for no split")
    if plan.stride not in (1, 2):
        raise PlanError(f"stride{plan.stride}: a run of a component serves 1 call or 2")
    if plan.pieces is not None and plan.pieces < 1:
        raise PlanError(f"m{plan.pieces}: at least 1 piece flows through the stages")
    if plan.warmup < 0:
        raise PlanError(f"w{plan.warmup}: the number of warm-up calls is at least 0")


def _check_clashes(plan: Plan) -> None:
    """Check that what divides the picture is one thing, or things that compose."""
    for (one, other), why in CLASHES.items():
        words = text.degrees(plan, one), text.degrees(plan, other)
        if all(words):
            batch = text.degrees(plan, "dp", "cfg")
            near = (".".join([*batch, f"{word}{plan.team}"]) for word in (one, other))
            raise PlanError(f"'{words[0][0]}' and '{words[1][0]}' {why}; use '{next(near)}' or '{next(near)}'")


def _check_depth(plan: Plan) -> None:
    """Check words about what is divided in depth."""
    if plan.stride > 1 and plan.components == 1:
        raise PlanError(f"stride{plan.stride} says how often components run; it needs 'async2' or more of them")
    if plan.stride > 1 and not plan.late:
        raise PlanError(f"stride{plan.stride} lets components serve two calls, and 'sync' none but the own; drop one")
    if plan.timeshift and (plan.components == 1 or not plan.late):
        raise PlanError(
            "timeshift gives a component the timestep of its old input; it needs 'async2' or more without 'sync'"
        )
    if plan.timed and (plan.components == 1 or not plan.late):
        raise PlanError("timed says by what components are balanced; it needs 'async2' or more without 'sync'")
    if plan.timed and plan.num_whole < 2:
        raise PlanError(f"timed takes the time of layers in the warm-up, for which 'w{plan.warmup}' is short; use 'w3'")
    if plan.pieces is not None and plan.stages == 1:
        raise PlanError(f"m{plan.pieces} says how many pieces flow through stages; it needs 'pipe2' or more of them")
    if plan.pieces is not None and not plan.late:
        raise PlanError(f"m{plan.pieces} cuts what flows through stages, and with 'sync' the whole flows; drop one")
    if plan.late and plan.components == plan.stages == 1:
        raise PlanError("late is about components or stages, and the plan has none; drop it")


def _check_bands(plan: Plan) -> None:
    """Check words about what bands do with each other's values."""
    kept = text.policy(plan) if plan.stale or plan.naive else None if plan.delta is None else f"delta{plan.delta}"
    methods = text.degrees(plan, "pipe", "async", "tp", "ring", "ulysses")
    if methods and kept is not None:
        team = ".".join([*text.degrees(plan, "dp", "cfg"), f"patch{plan.team}"])
        raise PlanError(
            f"'{kept}' is about keys and values that bands keep, and '{'.'.join(methods)}' has no bands; use "
            f"'{team}.{kept}' or drop it"
        )
    if methods and plan.split is not Split.ROWS:
        raise PlanError(
            f"'{plan.split}' is a direction of bands, and '{'.'.join(methods)}' has none; drop it or use patch<N>"
        )
    if plan.patch == 1 and kept is not None:
        raise PlanError(f"{kept} needs at least two bands to have an effect; add patch2 or drop it")
    if plan.naive and (plan.stale or plan.frozen):
        raise PlanError("naive bands exchange nothing, so nothing can be stale or frozen; drop one of the two")
    if plan.frozen and not plan.stale:
        raise PlanError("frozen needs kinds that are not renewed; name some in stale")
    if plan.norms is not Norms.CORRECTED and SiteKind.NORM not in plan.stale:
        raise PlanError(f"'{plan.norms}' says what norms do with stale statistics; use 'displaced.all', or drop it")
    if plan.split is Split.ALTERNATING and not plan.naive:
        raise PlanError("alternating bands have no values to use again; add naive, or choose rows or columns")


def _check_knobs(plan: Plan) -> None:
    """Check what says how values travel and are used again; a knob without effect is an error."""
    if plan.delta is not None and plan.delta not in DELTA_BITS:
        raise PlanError(f"delta{plan.delta}: a difference has {', '.join(map(str, DELTA_BITS))} bits")
    if not 0 <= plan.forecast <= MOST_FORECAST:
        raise PlanError(f"forecast{plan.forecast}: the percent of the last change is 0 to {MOST_FORECAST}")
    if plan.fresh < 0:
        raise PlanError(f"fresh{plan.fresh}: the number of attentions with fresh keys and values is at least 0")
    if plan.resync is not None and plan.resync < 0:
        raise PlanError(f"resync{plan.resync}: the percent of drift is at least 0")
    if plan.delta is not None and (plan.naive or plan.frozen):
        raise PlanError(f"'delta{plan.delta}' codes what bands send, and '{text.policy(plan)}' sends nothing; drop one")
    ages = SiteKind.KV in plan.stale and not plan.frozen
    if plan.forecast and not ages and not plan.late:
        raise PlanError(
            f"'forecast{plan.forecast}' carries on stale values; it needs 'displaced' with 'kv', 'async<N>' or "
            "'pipe<N>', without 'sync'"
        )
    if plan.fresh and not ages:
        raise PlanError(
            f"'fresh{plan.fresh}' keeps the last attentions from stale keys and values; it needs 'displaced' with 'kv'"
        )
    if plan.forecast and plan.pieces == 1:
        raise PlanError(f"'forecast{plan.forecast}' carries on keys of other pieces, and m1 has none; use m2 or more")
    if plan.resync is not None and plan.stages > 1:
        raise PlanError(
            f"'resync{plan.resync}' has all ranks agree after a call, and stages begin the next one before; say with "
            "w<N> how many calls are whole"
        )
    if plan.resync is not None and not ages:
        raise PlanError(f"'resync{plan.resync}' watches stale keys and values; it needs 'displaced' with 'kv'")


def check_bands(plan: Plan, model: str) -> None:
    """Check that a plan can divide a model with convolutions; see `Plan.check_bands`."""
    words = text.degrees(plan, "ring", "ulysses", "pipe")
    if words:
        why = (
            "lets pieces of tokens flow through stages" if plan.stages > 1 else "divides the attention of transformers"
        )
        bands = ".".join([*text.degrees(plan, "dp", "cfg"), f"patch{plan.team}"])
        raise PlanError(f"plan '{plan}': '{'.'.join(words)}' {why}, and {model} has convolutions too; use '{bands}'")


def check_tokens(plan: Plan, model: str) -> None:
    """Check that a plan can divide a transformer; see `Plan.check_tokens`."""
    plain = replace(plan, split=Split.ROWS, norms=Norms.CORRECTED)
    if plan.stale not in (frozenset(), ALL_KINDS):
        stale = SiteKind.KV in plan.stale
        plain = replace(plain, stale=DEFAULT_STALE) if stale else type(plan)(plan.dp, plan.cfg, plan.patch)
    if plain != plan:
        raise PlanError(
            f"plan '{plan}': {model} is cut by tokens, so it has no columns, borders or group norms; use '{plain}'"
        )
