"""The plan: degrees by which a denoiser call is divided, and which activations may be old."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distrifusion.errors import PlanError
from distrifusion.plan import legality, text
from distrifusion.plan.kinds import CODED_BITS, DEFAULT_WARMUP, Norms, SiteKind, Split


@dataclass(frozen=True)
class Plan:
    """How one denoiser call is divided over ranks, and which activations may be one call old.

    The text form joins words with dots: `cfg2.patch4.displaced.w4`. Words: `dp<N>`, `cfg<N>` and one of the methods
    that divide a picture:

    - `patch<N>`, for all models (DistriFusion, arXiv 2402.19481): `rows` or `columns` (direction of the bands), `sync`
      or `displaced`, after `displaced` the kinds that may be stale (`kv`, `halo`, `norm`; `kv` if none is named; `all`
      is the published form). `delta<bits>` sends keys and values as coded differences (CompactFusion, arXiv
      2507.17511), fresh ones or, after `displaced`, stale ones.
    - `ulysses<N>` (DeepSpeed Ulysses, arXiv 2309.14509), `ring<N>` (ring attention, arXiv 2310.01889) or both, for
      transformers.
    - `pipe<N>`, for transformers, with `m<M>` (PipeFusion, arXiv 2405.14430); also with `ulysses<N>` in every stage.
    - `async<N>`, for all models, with `stride2`, `timeshift` and `timed` or without (AsyncDiff, arXiv 2406.06911).
    - `tp<N>`, for all models (Megatron-LM, arXiv 1909.08053).

    `w<N>` is the number of calls after the first that stay synchronous. `forecast` or `forecast<percent>` extrapolates
    stale values, and `resync<percent>` makes a call synchronous when they have drifted by more than that since the one
    before. `fresh<N>` lets the last N attentions of a call wait for this call's keys and values. `async` and `pipe` use
    values of the last call unless `sync` is said.
    For research: `frozen` in place of `displaced` (the others' values stay those of the last synchronous call), `naive`
    (bands exchange nothing but the prediction; rows, columns or `alternating`), and after `displaced.all` or
    `frozen.all` `stalenorm` or `separatenorm` (what norms do with old statistics).

    Attributes:
        dp: groups of ranks over which the pictures of one call are spread; at least 1.
        cfg: ranks over which the branches of classifier-free guidance are spread; 1 or 2.
        patch: bands into which the picture is cut, one per rank; at least 1. Bands of a transformer are tokens.
        ulysses: ranks that divide the heads of attention among them, and all else by tokens; at least 1.
        ring: ranks that pass keys and values around, and divide all else by tokens; at least 1.
        tp: ranks that divide the weights of every layer; at least 1.
        components: parts of the network in depth that run at once, each on the last call's output of the one before;
            at least 1.
        stride: denoiser calls that one run of a component serves, 1 or 2; the last component runs in every call.
        timeshift: components that take old values are told the timestep of the call that gave them.
        timed: components are balanced by the time that layers take in calls of the warm-up, not by their operations.
        stages: parts of the network in depth through which pieces of the picture flow; at least 1.
        pieces: pieces of tokens that flow through the stages; at least 1. None: as many as stages.
        split: direction of the cut.
        stale: kinds of site that use the last call's remote values; empty means synchronous and exact.
        late: what crosses between components, or between the pieces in a stage, is one call old; False is exact.
        warmup: denoiser calls after the first that stay synchronous; the first has nothing stale to use, so `w4`
            means five synchronous calls, as in the paper. Naive bands need no first call: there `w4` means four.
            Without effect on an exact plan.
        frozen: remote values of kinds in `stale` are never renewed after the warm-up.
        naive: bands are pictures of their own after the warm-up.
        norms: what norms do with stale statistics.
        delta: bits of a value's coded difference, one of 1, 2, 4, 8; 32 sends values as they are; None codes nothing.
        forecast: percent of their last change by which stale values are carried on, 0 to 200.
        fresh: attentions, the last ones of a call, that use this call's keys and values although others' are stale;
            at least 0, which leaves all stale.
        resync: percent of drift beyond which the next call is synchronous; 0 makes all calls so, None none.

    Raises:
        PlanError: on a value out of range or without effect, or on two that clash.
    """

    dp: int = 1
    cfg: int = 1
    patch: int = 1
    ulysses: int = 1
    ring: int = 1
    tp: int = 1
    components: int = 1
    stride: int = 1
    timeshift: bool = False
    timed: bool = False
    stages: int = 1
    pieces: int | None = None
    split: Split = Split.ROWS
    stale: frozenset[SiteKind] = frozenset()
    late: bool = False
    warmup: int = DEFAULT_WARMUP
    frozen: bool = False
    naive: bool = False
    norms: Norms = Norms.CORRECTED
    delta: int | None = None
    forecast: int = 0
    fresh: int = 0
    resync: int | None = None

    def __post_init__(self) -> None:
        legality.check(self)

    @property
    def num_ranks(self) -> int:
        """Number of ranks the plan occupies."""
        return self.batch * self.team

    @property
    def batch(self) -> int:
        """Number of parts into which the rows of the batch, pictures and guidance branches, are cut."""
        return self.dp * self.cfg

    @property
    def team(self) -> int:
        """Number of ranks that share the pictures of one part of the batch."""
        return self.patch * self.ulysses * self.ring * self.tp * self.stages * self.components

    @property
    def num_whole(self) -> int:
        """Calls of a request that run whole before components are cut; two more are exact, which a forecast needs."""
        return self.num_synchronous - 2 if self.timed else 1

    @property
    def owns_weights(self) -> bool:
        """True when a rank's place in its team says which weights it works with, so that teams cannot grow."""
        return self.components > 1 or self.stages > 1 or self.tp > 1

    @property
    def divides_heads(self) -> bool:
        """True for plans that divide attention by heads or by passing keys around: those of transformers alone."""
        return self.ulysses > 1 or self.ring > 1

    @property
    def exact(self) -> bool:
        """True when the result equals one device to rounding."""
        return not self.stale and not self.naive and not self.late and self.delta not in CODED_BITS

    @property
    def kept(self) -> frozenset[SiteKind]:
        """Kinds whose values are kept from one denoiser call to the next; separate statistics use nothing of others."""
        coded = frozenset((SiteKind.KV,)) if self.delta in CODED_BITS else frozenset()
        return (self.stale - {SiteKind.NORM} if self.norms is Norms.SEPARATE else self.stale) | coded

    @property
    def num_synchronous(self) -> int:
        """Denoiser calls of a request that are exact before others follow; of a plan that is not exact."""
        return self.warmup if self.naive else self.warmup + 1

    def renews(self, call: int) -> bool:
        """Whether all components run in a request's denoiser call, counted from 0, or the last one alone."""
        return call < self.num_synchronous or (call - self.num_synchronous) % self.stride == 0

    def split_of(self, call: int) -> Split:
        """Direction of the cut in a request's denoiser call, counted from 0."""
        if self.split is Split.ALTERNATING:
            return Split.COLUMNS if call % 2 else Split.ROWS
        return self.split

    def __str__(self) -> str:
        return text.write(self)

    @classmethod
    def parse(cls, plan: str | Plan) -> Plan:
        """Read a plan from its text form; a Plan is returned as it is.

        Raises:
            PlanError: on an unknown, repeated or clashing word; the word and the remedy are named.
        """
        if isinstance(plan, Plan):
            return plan
        if not isinstance(plan, str):
            raise PlanError(f"a plan is text such as 'cfg2.patch2' or a Plan, not {type(plan).__name__}")
        return cls(**text.read(plan))

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
        team = num_ranks // (dp * cfg)
        if self.owns_weights:
            return self._nearest_of_weights(dp, cfg, team)
        if self.divides_heads:
            ring = self.ring if team % self.ring == 0 else 1
            ring, ulysses = (team, 1) if self.ulysses == 1 else (ring, team // ring)
            return replace(self, dp=dp, cfg=cfg, ulysses=ulysses, ring=ring)
        if team > 1 or (self.exact and self.delta is None):
            return replace(self, dp=dp, cfg=cfg, patch=team)
        return Plan(dp=dp, cfg=cfg, patch=team, split=Split.ROWS if self.split is Split.ALTERNATING else self.split)

    def _nearest_of_weights(self, dp: int, cfg: int, team: int) -> Plan:
        if team == 1:
            return Plan(dp=dp, cfg=cfg)
        if self.tp > 1:
            return replace(self, dp=dp, cfg=cfg, tp=team)
        if self.components > 1:
            return replace(self, dp=dp, cfg=cfg, components=team)
        ulysses = self.ulysses if team % self.ulysses == 0 and team > self.ulysses else 1
        return replace(self, dp=dp, cfg=cfg, stages=team // ulysses, ulysses=ulysses)

    def check_bands(self, model: str) -> None:
        """Check that the plan can divide a model with convolutions, which `model` names.

        Raises:
            PlanError: if it can divide transformers alone; a plan that can is named.
        """
        legality.check_bands(self, model)

    def check_tokens(self, model: str) -> None:
        """Check that the plan can divide a transformer, which `model` names.

        Raises:
            PlanError: if a word of it says nothing to one; a plan without the word is named.
        """
        legality.check_tokens(self, model)

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
