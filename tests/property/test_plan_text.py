"""A plan and its text say the same, and a wrong word is named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrifusion import Plan, PlanError
from distrifusion.plan import ALL_KINDS, DEFAULT_STALE, DEFAULT_WARMUP, DELTA_BITS, Norms, SiteKind, Split
from distrifusion.plan.legality import CLASHES

_KNOWN = re.compile(
    r"(dp|cfg|patch|ulysses|ring|pipe|async|tp|m|stride|w|delta|forecast|fresh|resync)\d+|forecast|rows|columns|alternating|sync|displaced|frozen|naive|kv|halo|norm|all|(stale|separate|corrected)norm|timeshift|timed"
)

cuts = st.sampled_from((Split.ROWS, Split.COLUMNS))
cfgs = st.sampled_from((1, 2))
exact_plans = st.builds(Plan, dp=st.integers(1, 5), cfg=cfgs, patch=st.integers(1, 12), split=cuts)
displaced_plans = st.builds(
    Plan,
    dp=st.integers(1, 5),
    cfg=cfgs,
    patch=st.integers(2, 12),
    split=cuts,
    stale=st.frozensets(st.sampled_from(SiteKind), min_size=1),
    warmup=st.integers(0, 60),
    frozen=st.booleans(),
)
plans_with_other_norms = st.builds(replace, displaced_plans, stale=st.just(ALL_KINDS), norms=st.sampled_from(Norms))
naive_plans = st.builds(
    Plan,
    cfg=cfgs,
    patch=st.integers(2, 12),
    split=st.sampled_from(Split),
    warmup=st.integers(0, 60),
    naive=st.just(True),
)
delta_plans = st.builds(
    Plan, patch=st.integers(2, 12), split=cuts, warmup=st.integers(0, 60), delta=st.sampled_from(DELTA_BITS)
)
plans_with_knobs = st.builds(
    Plan,
    patch=st.integers(2, 12),
    stale=st.frozensets(st.sampled_from(SiteKind)).map(lambda kinds: kinds | {SiteKind.KV}),
    warmup=st.integers(0, 60),
    delta=st.none() | st.sampled_from(DELTA_BITS),
    forecast=st.integers(0, 200),
    fresh=st.integers(0, 9),
    resync=st.none() | st.integers(0, 300),
)
attention_plans = st.builds(Plan, dp=st.integers(1, 3), cfg=cfgs, ulysses=st.integers(1, 6), ring=st.integers(1, 6))
weight_plans = st.builds(Plan, dp=st.integers(1, 3), cfg=cfgs, tp=st.integers(2, 6))
async_plans = st.builds(
    Plan,
    dp=st.integers(1, 3),
    cfg=cfgs,
    components=st.integers(2, 6),
    stride=st.sampled_from((1, 2)),
    timeshift=st.booleans(),
    late=st.just(True),
    warmup=st.integers(0, 60),
    forecast=st.integers(0, 200),
)
timed_plans = st.builds(replace, async_plans, warmup=st.integers(3, 60), timed=st.just(True))
pipe_plans = st.builds(
    Plan,
    dp=st.integers(1, 3),
    cfg=cfgs,
    stages=st.integers(2, 6),
    ulysses=st.integers(1, 3),
    pieces=st.none() | st.integers(1, 20),
    late=st.just(True),
    warmup=st.integers(0, 60),
)
exact_depth_plans = st.builds(Plan, cfg=cfgs, components=st.integers(2, 6)) | st.builds(
    Plan, cfg=cfgs, stages=st.integers(2, 6), ulysses=st.integers(1, 3)
)
plans = (
    exact_plans
    | weight_plans
    | async_plans
    | timed_plans
    | pipe_plans
    | exact_depth_plans
    | attention_plans
    | displaced_plans
    | plans_with_other_norms
    | naive_plans
    | delta_plans
    | plans_with_knobs
)
words = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_ ", min_size=0, max_size=12).map(str.strip)


@given(plans)
def test_reading_a_plans_text_gives_the_plan(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@given(plans, st.randoms(use_true_random=False))
def test_the_order_and_case_of_words_do_not_matter(plan: Plan, random: object) -> None:
    shuffled = str(plan).upper().split(".")
    random.shuffle(shuffled)
    assert Plan.parse(".".join(shuffled)) == plan


@given(plans, words.filter(lambda word: not _KNOWN.fullmatch(word)))
def test_an_unknown_word_is_an_error_that_names_it(plan: Plan, word: str) -> None:
    with pytest.raises(PlanError, match=re.escape(f"'{word}'")):
        Plan.parse(f"{plan}.{word}")


@given(plans)
def test_a_degree_said_twice_is_an_error_that_names_it(plan: Plan) -> None:
    with pytest.raises(PlanError, match="patch7"):
        Plan.parse(f"patch7.patch7.{plan}")
    with pytest.raises(PlanError, match="ring7"):
        Plan.parse(f"ring7.ring7.{plan}")


@given(st.sampled_from(("kv", "halo", "norm", "all", "w3", "stalenorm", "separatenorm")))
def test_words_about_staleness_without_displaced_are_errors(word: str) -> None:
    with pytest.raises(PlanError, match="displaced"):
        Plan.parse(f"patch2.{word}")


@given(plans, st.integers(1, 40))
def test_the_nearest_plan_fits_the_devices_and_keeps_what_it_can(plan: Plan, num_ranks: int) -> None:
    nearest = plan.nearest(num_ranks)
    nearest.check_devices(num_ranks)
    assert nearest.cfg == (plan.cfg if num_ranks % plan.cfg == 0 else 1)
    assert nearest.split is plan.split or (nearest.patch == 1 and plan.split is Split.ALTERNATING)
    assert nearest.stale == (plan.stale if nearest.patch > 1 else frozenset())


@given(plans)
def test_a_plan_is_its_own_nearest(plan: Plan) -> None:
    assert plan.nearest(plan.num_ranks) == plan


@given(plans, st.integers(1, 40))
def test_a_wrong_number_of_devices_is_an_error_that_names_a_legal_plan(plan: Plan, num_devices: int) -> None:
    if num_devices == plan.num_ranks:
        plan.check_devices(num_devices)
        return
    with pytest.raises(PlanError) as caught:
        plan.check_devices(num_devices)
    offered = re.findall(r"'([^']+)'", str(caught.value))[-1]
    Plan.parse(offered).check_devices(num_devices)


def test_the_nearest_plan_of_one_band_has_no_codes_left() -> None:
    assert str(Plan.parse("cfg2.patch2.delta32").nearest(2)) == "cfg2"


@given(st.integers(1, 64))
def test_the_default_plan_is_exact_and_occupies_all_ranks(num_ranks: int) -> None:
    plan = Plan.default(num_ranks)
    assert plan.exact
    assert plan.num_ranks == num_ranks


@pytest.mark.parametrize(
    "degrees",
    [{"dp": 0}, {"cfg": 0}, {"cfg": 3}, {"patch": 0}, {"patch": -2}, {"warmup": -1}, {"stale": DEFAULT_STALE}],
    ids=str,
)
def test_a_value_out_of_range_or_without_effect_is_an_error(degrees: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        Plan(**degrees)


def test_displaced_alone_is_keys_and_values_and_all_is_the_published_form() -> None:
    default, published = Plan.parse("cfg2.patch4.displaced"), Plan.parse("cfg2.patch4.displaced.all")
    assert default == Plan(cfg=2, patch=4, stale=frozenset({SiteKind.KV}), warmup=DEFAULT_WARMUP)
    assert published == Plan(cfg=2, patch=4, stale=frozenset(SiteKind), warmup=DEFAULT_WARMUP)
    assert published.num_ranks == default.num_ranks == 8


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("patch2.delta4", Plan(patch=2, delta=4, warmup=0)),
        ("patch2.displaced.delta8", Plan(patch=2, stale=frozenset({SiteKind.KV}), delta=8)),
        ("patch2.displaced.forecast", Plan(patch=2, stale=frozenset({SiteKind.KV}), forecast=50)),
        ("patch2.displaced.fresh1", Plan(patch=2, stale=frozenset({SiteKind.KV}), fresh=1)),
        ("patch2.displaced.resync20", Plan(patch=2, stale=frozenset({SiteKind.KV}), resync=20, warmup=0)),
    ],
)
def test_knobs_have_words_and_their_own_default_of_the_warm_up(text: str, plan: Plan) -> None:
    assert Plan.parse(text) == plan


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("patch2.delta3", "delta3: a difference has 1, 2, 4, 8, 32 bits"),
        ("patch1.delta4", "delta4 needs at least two bands"),
        ("patch2.forecast", "'forecast50' carries on stale values"),
        ("patch2.displaced.halo.forecast50", "'forecast50'"),
        ("patch2.displaced.forecast201", "forecast201"),
        ("patch2.resync5", "'resync5' watches stale keys"),
        ("patch2.frozen.forecast", "'forecast50'"),
        ("patch2.fresh1", "'fresh1' keeps the last attentions from stale"),
        ("patch2.displaced.halo.fresh1", "'fresh1'"),
        ("patch2.frozen.fresh1", "'fresh1'"),
        ("patch2.delta4.fresh1", "'fresh1'"),
        ("async2.fresh1", "'fresh1'"),
        ("patch2.displaced.frsh1", "did you mean 'fresh1'"),
        ("patch2.frozen.delta4", "'delta4' codes what bands send"),
        ("patch2.naive.delta4", "'delta4' codes what bands send"),
        ("patch2.delta4.delta8", "delta"),
        ("patch2.delt4", "did you mean 'delta4'"),
        ("patch2.displaced.forcast", "did you mean 'forecast'"),
    ],
)
def test_knobs_without_effect_or_out_of_range_are_errors_that_name_them(text: str, named: str) -> None:
    with pytest.raises(PlanError, match=named):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("patch2.naive.kv", "'kv'"),
        ("patch2.alternating", "alternating"),
        ("patch2.displaced.alternating", "alternating"),
        ("patch1.naive", "naive needs at least two bands"),
        ("frozen", "frozen needs at least two bands"),
        ("patch2.displaced.kv.separatenorm", "'separatenorm'"),
        ("patch2.displaced.frozen", "'frozen'"),
        ("patch2.displaced.all.stalenorm.separatenorm", "'separatenorm'"),
        ("patch2.displaced.stalenorm", "'stalenorm'"),
    ],
)
def test_words_of_the_ablations_that_clash_are_errors_that_name_them(text: str, named: str) -> None:
    with pytest.raises(PlanError, match=named):
        Plan.parse(text)


def test_naive_bands_are_never_synchronous_unless_that_is_said() -> None:
    assert Plan.parse("patch2.naive").num_synchronous == 0
    assert Plan.parse("patch2.naive.w4").num_synchronous == 4
    assert Plan.parse("patch2.frozen").num_synchronous == DEFAULT_WARMUP + 1


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("ulysses2", Plan(ulysses=2)),
        ("ring3", Plan(ring=3)),
        ("cfg2.ulysses4.ring2", Plan(cfg=2, ulysses=4, ring=2)),
        ("ring2.ulysses2", Plan(ulysses=2, ring=2)),
        ("ulysses2.sync", Plan(ulysses=2)),
    ],
)
def test_ways_to_divide_attention_have_words_and_are_exact(text: str, plan: Plan) -> None:
    assert Plan.parse(text) == plan
    assert plan.exact
    assert plan.num_ranks == plan.cfg * plan.ulysses * plan.ring


@pytest.mark.parametrize(
    ("text", "legal"),
    [
        ("patch2.ulysses3", "patch6"),
        ("cfg2.patch2.ring2", "cfg2.patch4"),
        ("ulysses2.displaced", "patch2.displaced"),
        ("ring4.displaced.all", "patch4.displaced"),
        ("ulysses2.ring2.delta4", "patch4.delta4"),
        ("ring2.naive", "patch2.naive"),
        ("ulysses2.frozen", "patch2.frozen"),
    ],
)
def test_words_that_clash_with_them_are_errors_that_name_both_and_a_legal_plan(text: str, legal: str) -> None:
    with pytest.raises(PlanError, match=re.escape(f"'{legal}'")) as caught:
        Plan.parse(text)
    offered = re.findall(r"use '([^']+)'", str(caught.value))[0]
    Plan.parse(offered)


@pytest.mark.parametrize("text", ["ulysses2.columns", "ulysses0", "ring0.patch2", "ulyses2", "rng2"])
def test_other_words_that_do_not_fit_them_are_errors(text: str) -> None:
    with pytest.raises(PlanError, match=re.escape(re.split(r"\.", text)[0].rstrip("2"))):
        Plan.parse(text)


@pytest.mark.parametrize(("one", "other"), CLASHES)
def test_two_methods_that_clash_are_named_with_legal_plans_near(one: str, other: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(f"cfg2.{one}2.{other}3")
    named = re.findall(r"'([^']+)'", str(caught.value))
    assert {f"{one}2", f"{other}3"} == set(named[:2])
    assert [Plan.parse(text).num_ranks for text in named[2:]] == [12, 12]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stride2", "async2"),
        ("async2.stride3", "stride3"),
        ("async2.sync.stride2", "stride2"),
        ("async2.sync.timeshift", "timeshift"),
        ("pipe2.timeshift", "async2"),
        ("async2.sync.timed", "async2"),
        ("async2.timed.w2", "w3"),
        ("timed", "async2"),
        ("m4", "pipe2"),
        ("pipe2.m0", "m0"),
        ("pipe2.sync.m4", "m4"),
        ("async2.displaced", "patch2.displaced"),
        ("tp2.delta4", "patch2.delta4"),
        ("tp2.forecast", "forecast50"),
        ("pipe2.resync10", "stages begin the next one before; say with w<N>"),
        ("pipe2.sync.forecast", "without 'sync'"),
        ("pipe2.m1.forecast", "m1 has none; use m2 or more"),
        ("async2.sync.w3", "w3"),
        ("pipe2.columns", "columns"),
        ("asynk2", "async2"),
        ("tp0", "tp0"),
    ],
)
def test_words_without_effect_on_a_method_in_depth_are_errors(text: str, named: str) -> None:
    with pytest.raises(PlanError, match=re.escape(f"'{named}'") + "|" + re.escape(named)):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("text", "num_ranks"),
    [
        ("pipe2.m4.forecast100", 2),
        ("async2", 2),
        ("async3.stride2", 3),
        ("cfg2.pipe2.m8", 4),
        ("pipe2.ulysses3", 6),
        ("dp2.tp3", 6),
    ],
)
def test_methods_that_own_weights_occupy_their_ranks(text: str, num_ranks: int) -> None:
    plan = Plan.parse(text)
    assert plan.num_ranks == num_ranks
    assert plan.owns_weights
    assert plan.exact == (plan.tp > 1)
