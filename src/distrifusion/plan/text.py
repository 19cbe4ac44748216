"""A plan as text: words joined by dots, such as "cfg2.patch4.displaced.w4"."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from distrifusion.errors import PlanError
from distrifusion.plan.kinds import ALL_KINDS, DEFAULT_FORECAST, DEFAULT_STALE, Norms, SiteKind, Split

if TYPE_CHECKING:
    from distrifusion.plan.plan import Plan

# Word that begins with it -> field, in the order in which they are written; axes outer to inner.
AXES = {"dp": "dp", "cfg": "cfg", "pipe": "stages", "async": "components", "tp": "tp", "ulysses": "ulysses",
        "ring": "ring", "patch": "patch"}  # fmt: skip
_NUMBERS = {"m": "pieces", "stride": "stride", "delta": "delta", "forecast": "forecast", "fresh": "fresh",
            "resync": "resync", "w": "warmup"}  # fmt: skip
_NUMBER = re.compile(rf"({'|'.join((*AXES, *_NUMBERS))})(\d+)")
_POLICY_WORDS = ("sync", "displaced", "frozen", "naive")
_UNITS = {"delta": "bits", "forecast": "percent", "resync": "percent", "m": "M"}
# Words that are fields of the same name.
_SWITCHES = ("timeshift", "timed")
_PLAIN = (*Split, *_POLICY_WORDS, *SiteKind, "all", *Norms, *_SWITCHES)
# What is offered for a word that is nearly right.
_EXAMPLES = {"dp": "dp2", "cfg": "cfg2", "pipe": "pipe2", "async": "async2", "tp": "tp2", "ring": "ring2",
             "ulysses": "ulysses2", "patch": "patch2", "m": "m4", "stride": "stride2", "delta": "delta4",
             "forecast": "forecast", "fresh": "fresh1", "resync": "resync20", "w": "w4"}  # fmt: skip


def write(plan: Plan) -> str:
    """The text form of a plan; what is taken anyway where nothing is said is left out."""
    words = degrees(plan) or ["patch1"]
    if plan.stride > 1:
        words.append(f"stride{plan.stride}")
    words += [word for word in _SWITCHES if getattr(plan, word)]
    if plan.pieces is not None:
        words.append(f"m{plan.pieces}")
    if plan.split is not Split.ROWS:
        words.append(str(plan.split))
    if plan.stale or plan.naive or ((plan.components > 1 or plan.stages > 1) and not plan.late):
        words.append(policy(plan))
    if plan.stale == ALL_KINDS:
        words.append("all")
    elif plan.stale != DEFAULT_STALE:
        words += [str(kind) for kind in SiteKind if kind in plan.stale]
    if plan.norms is not Norms.CORRECTED:
        words.append(str(plan.norms))
    if plan.delta is not None:
        words.append(f"delta{plan.delta}")
    if plan.forecast:
        words.append("forecast" if plan.forecast == DEFAULT_FORECAST else f"forecast{plan.forecast}")
    if plan.fresh:
        words.append(f"fresh{plan.fresh}")
    if plan.resync is not None:
        words.append(f"resync{plan.resync}")
    if not plan.exact or plan.delta is not None:
        words.append(f"w{plan.warmup}")
    return ".".join(words)


def degrees(plan: Plan, *axes: str) -> list[str]:
    """The words for a plan's degrees above one, of some axes or of all."""
    found = {word: getattr(plan, field) for word, field in AXES.items() if not axes or word in axes}
    return [f"{word}{degree}" for word, degree in found.items() if degree > 1]


def policy(plan: Plan) -> str:
    """The word for what a plan's bands do with each other's values."""
    return "naive" if plan.naive else "frozen" if plan.frozen else "displaced" if plan.stale else "sync"


def read(text: str) -> dict[str, Any]:
    """The fields of a plan that its text says; raises PlanError naming a word that is unknown, repeated or idle."""
    found: dict[str, Any] = {}
    kinds: set[SiteKind] = set()

    def put(key: str, value: object, word: str) -> None:
        if key in found:
            raise PlanError(f"plan '{text}': '{word}' says {key} a second time; keep one")
        found[key] = value

    for word in text.strip().lower().split("."):
        if match := _NUMBER.fullmatch(word):
            put({**AXES, **_NUMBERS}[match[1]], int(match[2]), word)
        elif word == "forecast":
            put("forecast", DEFAULT_FORECAST, word)
        elif word in tuple(Split):
            put("split", Split(word), word)
        elif word in _SWITCHES:
            put(word, True, word)
        elif word in _POLICY_WORDS:
            put("policy", word, word)
        elif word == "all":
            kinds |= ALL_KINDS
        elif word in tuple(SiteKind):
            kinds.add(SiteKind(word))
        elif word in tuple(Norms):
            put("norms", Norms(word), word)
        else:
            raise PlanError(_unknown_word(text, word))
    return _with_policy(text, found, kinds)


def _with_policy(text: str, found: dict[str, Any], kinds: set[SiteKind]) -> dict[str, Any]:
    in_depth = found.get("components", 1) > 1 or found.get("stages", 1) > 1
    late = in_depth and "policy" not in found
    policy = found.pop("policy", "sync")
    ages = policy in ("displaced", "frozen")
    for word in (*sorted(kinds), *([str(found["norms"])] if "norms" in found else [])) if not ages else ():
        raise PlanError(f"plan '{text}': '{word}' says what may be stale, which needs the word 'displaced'")
    if "warmup" in found and policy == "sync" and "delta" not in found and not late:
        raise PlanError(
            f"plan '{text}': 'w{found['warmup']}' has an effect only with 'displaced', 'delta<bits>', or 'async<N>' or "
            "'pipe<N>' without 'sync'"
        )
    if policy == "naive" or "resync" in found or (policy == "sync" and "delta" in found):
        found.setdefault("warmup", 0)
    stale = frozenset(kinds or DEFAULT_STALE) if ages else frozenset()
    return {**found, "stale": stale, "late": late, "frozen": policy == "frozen", "naive": policy == "naive"}


def _unknown_word(text: str, word: str) -> str:
    known = {**_EXAMPLES, **{str(plain): str(plain) for plain in _PLAIN}}
    near = difflib.get_close_matches(re.sub(r"\d+$", "", word), known, n=1)
    hint = f"did you mean '{known[near[0]]}'? " if near else ""
    words = (*(f"{name}<{_UNITS.get(name, 'N')}>" for name in (*AXES, *_NUMBERS)), *_PLAIN)
    return f"plan '{text}': unknown word '{word}'; {hint}the words are {', '.join(words)}"
