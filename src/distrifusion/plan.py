"""What to do on which devices: the plan, its text form, and the one table of what is legal."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from enum import StrEnum

from distrifusion.errors import PlanError


class SiteKind(StrEnum):
    """What an exchange inside a layer carries; the policy fresh or stale is chosen for each kind."""

    KV = "kv"
    HALO = "halo"
    NORM = "norm"


class Split(StrEnum):
    """The direction in which the picture is cut into bands."""

    ROWS = "rows"
    COLUMNS = "columns"
    ALTERNATING = "alternating"  # rows and columns by turns; only for bands that exchange nothing


class Norms(StrEnum):
    """What a group norm takes for statistics while those of the other bands are old (DistriFusion, section 4.3)."""

    CORRECTED = "correctednorm"  # the old whole plus the own change
    STALE = "stalenorm"  # the others' old ones and the own fresh ones
    SEPARATE = "separatenorm"  # the own ones alone


ALL_KINDS = frozenset(SiteKind)
DEFAULT_WARMUP = 4

_DEGREE = re.compile(r"(dp|cfg|patch|ulysses|ring)(\d+)")
DEFAULT_STALE = frozenset({SiteKind.KV})
DEFAULT_FORECAST = 50
MOST_FORECAST = 200
CODED_BITS = (1, 2, 4, 8)
DELTA_BITS = (*CODED_BITS, 32)

_NUMBERS = {"w": "warmup", "delta": "delta", "forecast": "forecast", "resync": "resync"}
_NUMBER = re.compile(rf"({'|'.join(_NUMBERS)})(\d+)")
_POLICY_WORDS = ("sync", "displaced", "frozen", "naive")
_WORDS = (
    "dp<N>", "cfg<N>", "patch<N>", "ulysses<N>", "ring<N>", *Split, *_POLICY_WORDS, *SiteKind, "all", *Norms,
    "delta<bits>", "forecast<percent>", "resync<percent>", "w<N>",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How one denoiser call is divided over ranks, and which activations may be one call old.

    The text form joins words with dots: `cfg2.patch4.displaced.w4`. Words: `dp<N>`, `cfg<N>` and `patch<N>` (degrees),
    and for transformers, in place of `patch<N>`, `ulysses<N>` (DeepSpeed Ulysses, arXiv 2309.14509), `ring<N>` (ring
    attention, arXiv 2310.01889) or both; `rows` or `columns` (direction of the bands), `sync` or `displaced`
    (DistriFusion, arXiv 2402.19481), after `displaced` the kinds that may be stale (`kv`, `halo`, `norm`; `kv` if none
    is named; `all` is the published form), and `w<N>`. `delta<bits>` sends keys and values as coded differences
    (CompactFusion, arXiv 2507.17511), fresh ones or, after `displaced`, stale ones. After `displaced`, `forecast` or
    `forecast<percent>` extrapolates stale keys and values, and `resync<percent>` makes a call synchronous when they
    have drifted by more than that since the one before.
    For research: `frozen` in place of `displaced` (the others' values stay those of the last synchronous call), `naive`
    (bands exchange nothing but the prediction; rows, columns or `alternating`), and after `displaced.all` or
    `frozen.all` `stalenorm` or `separatenorm` (what norms do with old statistics).

    Attributes:
        dp: groups of ranks over which the pictures of one call are spread; at least 1.
        cfg: ranks over which the branches of classifier-free guidance are spread; 1 or 2.
        patch: bands into which the picture is cut, one per rank; at least 1. Bands of a transformer are tokens.
        ulysses: ranks that divide the heads of attention among them, and all else by tokens; at least 1.
        ring: ranks that pass keys and values around, and divide all else by tokens; at least 1.
        split: direction of the cut.
        stale: kinds of site that use the last call's remote values; empty means synchronous and exact.
        warmup: denoiser calls after the first that stay synchronous; the first has nothing stale to use, so `w4`
            means five synchronous calls, as in the paper. Naive bands need no first call: there `w4` means four.
            Without effect on an exact plan.
        frozen: remote values of kinds in `stale` are never renewed after the warm-up.
        naive: bands are pictures of their own after the warm-up.
        norms: what norms do with stale statistics.
        delta: bits of a value's coded difference, one of 1, 2, 4, 8; 32 sends values as they are; None codes nothing.
        forecast: percent of their last change by which stale keys and values are carried on, 0 to 200.
        resync: percent of drift beyond which the next call is synchronous; 0 makes all calls so, None none.

    Raises:
        PlanError: on a value out of range or without effect.
    """

    dp: int = 1
    cfg: int = 1
    patch: int = 1
    ulysses: int = 1
    ring: int = 1
    split: Split = Split.ROWS
    stale: frozenset[SiteKind] = frozenset()
    warmup: int = DEFAULT_WARMUP
    frozen: bool = False
    naive: bool = False
    norms: Norms = Norms.CORRECTED
    delta: int | None = None
    forecast: int = 0
    resync: int | None = None

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise PlanError(f"dp{self.dp}: the number of groups that share the pictures is at least 1")
        if self.cfg not in (1, 2):
            raise PlanError(f"cfg{self.cfg}: guidance has two branches, so the degree is cfg1 or cfg2")
        if self.patch < 1:
            raise PlanError(f"patch{self.patch}: the number of bands is at least 1; use patch1 for no split")
        if self.warmup < 0:
            raise PlanError(f"w{self.warmup}: the number of warm-up calls is at least 0")
        self._check_axes()
        if self.patch == 1 and (self.delta is not None or not self.exact):
            word = self._policy if self.delta is None else f"delta{self.delta}"
            raise PlanError(f"{word} needs at least two bands to have an effect; add patch2 or drop it")
        if self.naive and (self.stale or self.frozen):
            raise PlanError("naive bands exchange nothing, so nothing can be stale or frozen; drop one of the two")
        if self.frozen and not self.stale:
            raise PlanError("frozen needs kinds that are not renewed; name some in stale")
        if self.norms is not Norms.CORRECTED and SiteKind.NORM not in self.stale:
            raise PlanError(f"'{self.norms}' says what norms do with stale statistics; use 'displaced.all', or drop it")
        if self.split is Split.ALTERNATING and not self.naive:
            raise PlanError("alternating bands have no values to use again; add naive, or choose rows or columns")
        self._check_knobs()

    def _check_axes(self) -> None:
        """Check that what divides the picture is one thing, and that no word is about another one."""
        if self.ulysses < 1 or self.ring < 1:
            raise PlanError(
                f"ulysses{self.ulysses}, ring{self.ring}: a degree is at least 1; leave it out for no split"
            )
        if not self.divides_heads:
            return
        words = ".".join(self._attention_words)
        if self.patch > 1:
            both = self.patch * self.ulysses * self.ring
            raise PlanError(
                f"'patch{self.patch}' and '{words}' are two ways to divide the same tokens; use 'patch{both}' or "
                f"'{replace(self, patch=1, ulysses=self.ulysses * self.patch)}'"
            )
        kept = self._policy if self.stale or self.naive else None if self.delta is None else f"delta{self.delta}"
        if kept is not None:
            raise PlanError(
                f"'{kept}' is about keys and values that are kept, and '{words}' keeps none; use "
                f"'patch{self.ulysses * self.ring}.{kept}' or drop it"
            )
        if self.split is not Split.ROWS:
            raise PlanError(f"'{self.split}' is a direction of bands, and '{words}' has none; drop it or use patch<N>")

    def _check_knobs(self) -> None:
        """Check what says how values travel and are used again; a knob without effect is an error."""
        if self.delta is not None and self.delta not in DELTA_BITS:
            raise PlanError(f"delta{self.delta}: a difference has {', '.join(map(str, DELTA_BITS))} bits")
        if not 0 <= self.forecast <= MOST_FORECAST:
            raise PlanError(f"forecast{self.forecast}: the percent of the last change is 0 to {MOST_FORECAST}")
        if self.resync is not None and self.resync < 0:
            raise PlanError(f"resync{self.resync}: the percent of drift is at least 0")
        if self.delta is not None and (self.naive or self.frozen):
            raise PlanError(f"'delta{self.delta}' codes what bands send, and '{self._policy}' sends nothing; drop one")
        ages = SiteKind.KV in self.stale and not self.frozen
        if self.forecast and not ages:
            raise PlanError(
                f"'forecast{self.forecast}' carries on stale keys and values; it needs 'displaced' with 'kv'"
            )
        if self.resync is not None and not ages:
            raise PlanError(f"'resync{self.resync}' watches stale keys and values; it needs 'displaced' with 'kv'")

    @property
    def num_ranks(self) -> int:
        """Number of ranks the plan occupies."""
        return self.batch * self.patch * self.ulysses * self.ring

    @property
    def batch(self) -> int:
        """Number of parts into which the rows of the batch, pictures and guidance branches, are cut."""
        return self.dp * self.cfg

    @property
    def divides_heads(self) -> bool:
        """True for plans that divide attention by heads or by passing keys around: those of transformers alone."""
        return self.ulysses > 1 or self.ring > 1

    @property
    def _attention_words(self) -> list[str]:
        degrees = {"ulysses": self.ulysses, "ring": self.ring}
        return [f"{word}{degree}" for word, degree in degrees.items() if degree > 1]

    @property
    def exact(self) -> bool:
        """True when the result equals one device to rounding."""
        return not self.stale and not self.naive and self.delta not in CODED_BITS

    @property
    def kept(self) -> frozenset[SiteKind]:
        """Kinds whose values are kept from one denoiser call to the next; separate statistics use nothing of others."""
        coded = frozenset((SiteKind.KV,)) if self.delta in CODED_BITS else frozenset()
        return (self.stale - {SiteKind.NORM} if self.norms is Norms.SEPARATE else self.stale) | coded

    @property
    def num_synchronous(self) -> int:
        """Denoiser calls of a request that are exact before others follow; of a plan that is not exact."""
        return self.warmup if self.naive else self.warmup + 1

    def split_of(self, call: int) -> Split:
        """Direction of the cut in a request's denoiser call, counted from 0."""
        if self.split is Split.ALTERNATING:
            return Split.COLUMNS if call % 2 else Split.ROWS
        return self.split

    @property
    def _policy(self) -> str:
        return "naive" if self.naive else "frozen" if self.frozen else "displaced" if self.stale else "sync"

    def __str__(self) -> str:
        words = [f"{axis}{degree}" for axis, degree in (("dp", self.dp), ("cfg", self.cfg)) if degree > 1]
        words += self._attention_words
        if self.patch > 1 or not words:
            words.append(f"patch{self.patch}")
        if self.split is not Split.ROWS:
            words.append(str(self.split))
        if self.stale or self.naive:
            words.append(self._policy)
        if self.stale == ALL_KINDS:
            words.append("all")
        elif self.stale != DEFAULT_STALE:
            words += [str(kind) for kind in SiteKind if kind in self.stale]
        if self.norms is not Norms.CORRECTED:
            words.append(str(self.norms))
        if self.delta is not None:
            words.append(f"delta{self.delta}")
        if self.forecast:
            words.append("forecast" if self.forecast == DEFAULT_FORECAST else f"forecast{self.forecast}")
        if self.resync is not None:
            words.append(f"resync{self.resync}")
        if not self.exact or self.delta is not None:
            words.append(f"w{self.warmup}")
        return ".".join(words)

    @classmethod
    def parse(cls, text: str | Plan) -> Plan:
        """Read a plan from its text form; a Plan is returned as it is.

        Raises:
            PlanError: on an unknown, repeated or clashing word; the word and the remedy are named.
        """
        if isinstance(text, Plan):
            return text
        if not isinstance(text, str):
            raise PlanError(f"a plan is text such as 'cfg2.patch2' or a Plan, not {type(text).__name__}")
        return _parse(text)

    @classmethod
    def default(cls, num_ranks: int) -> Plan:
        """The exact plan for a number of ranks: guidance branches first, then bands."""
        if num_ranks < 1:
            raise PlanError(f"{num_ranks} ranks: at least one device is needed")
        return cls(cfg=2, patch=num_ranks // 2) if num_ranks % 2 == 0 else cls(patch=num_ranks)

    def nearest(self, num_ranks: int) -> Plan:
        """The legal plan for exactly `num_ranks` ranks that keeps most of this one's words."""
        cfg = self.cfg if num_ranks % self.cfg == 0 else 1
        dp = self.dp if num_ranks % (self.dp * cfg) == 0 else 1
        patch = num_ranks // (dp * cfg)
        if self.divides_heads:
            ring = self.ring if patch % self.ring == 0 else 1
            ring, ulysses = (patch, 1) if self.ulysses == 1 else (ring, patch // ring)
            return replace(self, dp=dp, cfg=cfg, ulysses=ulysses, ring=ring)
        if patch > 1 or (self.exact and self.delta is None):
            return replace(self, dp=dp, cfg=cfg, patch=patch)
        return Plan(dp=dp, cfg=cfg, patch=patch, split=Split.ROWS if self.split is Split.ALTERNATING else self.split)

    def check_bands(self, model: str) -> None:
        """Check that the plan can divide a model with convolutions, which `model` names.

        Raises:
            PlanError: if it divides attention alone.
        """
        if self.divides_heads:
            words = ".".join(self._attention_words)
            raise PlanError(
                f"plan '{self}': '{words}' divides the attention of transformers, and {model} has convolutions too; "
                f"use '{replace(self, patch=self.ulysses * self.ring, ulysses=1, ring=1)}'"
            )

    def check_tokens(self, model: str) -> None:
        """Check that the plan can divide a transformer, which `model` names.

        Raises:
            PlanError: if a word of it says nothing to one; a plan without the word is named.
        """
        plain = replace(self, split=Split.ROWS, norms=Norms.CORRECTED)
        if self.stale not in (frozenset(), ALL_KINDS):
            plain = (
                replace(plain, stale=DEFAULT_STALE)
                if SiteKind.KV in self.stale
                else Plan(self.dp, self.cfg, self.patch)
            )
        if plain != self:
            raise PlanError(
                f"plan '{self}': {model} is cut by tokens, so it has no columns, borders or group norms; use '{plain}'"
            )

    def check_devices(self, num_devices: int) -> None:
        """Check that the plan occupies exactly the devices given.

        Raises:
            PlanError: if it does not; the nearest legal plan is named.
        """
        if num_devices < 1:
            raise PlanError(f"{num_devices} devices: at least one is needed")
        if self.num_ranks != num_devices:
            raise PlanError(
                f"plan '{self}' needs {self.num_ranks} devices and {num_devices} are given; "
                f"the nearest plan for {num_devices} is '{self.nearest(num_devices)}'"
            )


def _parse(text: str) -> Plan:
    found: dict[str, object] = {}
    kinds: set[SiteKind] = set()

    def put(key: str, value: object, word: str) -> None:
        if key in found:
            raise PlanError(f"plan '{text}': '{word}' says {key} a second time; keep one")
        found[key] = value

    for word in text.strip().lower().split("."):
        if match := _DEGREE.fullmatch(word):
            put(match[1], int(match[2]), word)
        elif match := _NUMBER.fullmatch(word):
            put(_NUMBERS[match[1]], int(match[2]), word)
        elif word == "forecast":
            put("forecast", DEFAULT_FORECAST, word)
        elif word in tuple(Split):
            put("split", Split(word), word)
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
    policy = found.pop("policy", "sync")
    ages = policy in ("displaced", "frozen")
    for word in (*sorted(kinds), *([str(found["norms"])] if "norms" in found else [])) if not ages else ():
        raise PlanError(f"plan '{text}': '{word}' says what may be stale, which needs the word 'displaced'")
    if "warmup" in found and policy == "sync" and "delta" not in found:
        raise PlanError(f"plan '{text}': 'w{found['warmup']}' has an effect only with 'displaced' or 'delta<bits>'")
    if policy == "naive" or "resync" in found or (policy == "sync" and "delta" in found):
        found.setdefault("warmup", 0)
    stale = frozenset(kinds or DEFAULT_STALE) if ages else frozenset()
    return Plan(stale=stale, frozen=policy == "frozen", naive=policy == "naive", **found)  # type: ignore[arg-type]


def _unknown_word(text: str, word: str) -> str:
    stem = re.sub(r"\d+$", "", word)
    known = {
        "dp": "dp2",
        "cfg": "cfg2",
        "patch": "patch2",
        "ulysses": "ulysses2",
        "ring": "ring2",
        "w": "w4",
        "delta": "delta4",
        "resync": "resync20",
        "forecast": "forecast",
    }
    known |= {w: w for w in _WORDS if "<" not in w}
    near = difflib.get_close_matches(stem, known, n=1)
    hint = f"did you mean '{known[near[0]]}'? " if near else ""
    return f"plan '{text}': unknown word '{word}'; {hint}the words are {', '.join(_WORDS)}"
