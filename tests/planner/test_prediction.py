"""Predictions: what makes a plan faster or slower in the model, and their zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blueprints import COSTS, FAST, SLOW, SPEED, costs, flux, unet

from distrifusion.errors import ConfigError, PlanError, UnsupportedModel
from distrifusion.memory.weights import weights_of
from distrifusion.plan import Plan
from distrifusion.planner.blueprint import of_config
from distrifusion.planner.calls import arguments
from distrifusion.planner.costs import Costs
from distrifusion.planner.links import Link
from distrifusion.planner.operations import LayerKind
from distrifusion.planner.prediction import predict
from distrifusion.strategies.tensor import Share
from transformers_tiny import FAMILIES

STEPS = 10
TEXTS = ("patch1", "cfg2", "patch2", "cfg2.patch2", "patch2.displaced.w1", "patch2.displaced.all.w1", "patch2.delta4",
         "async2.w1", "tp2")  # fmt: skip


def _flux_costs() -> Costs:
    # The calls of the family are wider than the tiny ones of other tests.
    tiny = flux()
    return Costs(tiny, tiny.arguments(96, 96))


def seconds(text: str, speed=SPEED, links=FAST) -> float:
    return predict(COSTS, Plan.parse(text), speed, links, STEPS).per_picture


def test_one_device_takes_its_operations_by_their_rates() -> None:
    alone = predict(COSTS, Plan(), SPEED, SLOW, STEPS)
    work = COSTS.of(Plan()).steady.operations
    expected = work.total / 1e9 + work.moved / 1e9 + work.kernels * 1e-6
    assert alone.per_step == pytest.approx(expected)
    assert alone.per_picture == pytest.approx(STEPS * expected)
    assert sum(alone.parts.values()) == pytest.approx(alone.per_picture)


@pytest.mark.parametrize("text", TEXTS)
def test_a_faster_device_and_a_better_link_never_take_longer(text: str) -> None:
    faster = replace(SPEED, rates=dict.fromkeys(LayerKind, 2e9), bandwidth=2e9)
    less = replace(SPEED, layer=0.0, launch=0.0)
    links = [replace(SLOW, within=Link(1e-3, 2e6)), replace(SLOW, within=Link(1e-4, 1e6)), replace(SLOW, overlap=1.0)]
    for better in (faster, less):
        assert seconds(text, better) < seconds(text)
    for better in links:
        assert seconds(text, links=better) <= seconds(text, links=SLOW)


@pytest.mark.parametrize("text", TEXTS)
def test_parts_of_a_picture_add_up(text: str) -> None:
    prediction = predict(COSTS, Plan.parse(text), SPEED, SLOW, STEPS, outside=0.5)
    assert sum(prediction.parts.values()) == pytest.approx(prediction.per_picture)
    assert prediction.parts["outside"] == 0.5
    assert prediction.as_dict()["predicted"] is True


def test_more_devices_compute_less_each() -> None:
    times = [
        predict(COSTS, Plan.parse(text), SPEED, FAST, STEPS).steady.computing for text in ("patch1", "patch2", "patch4")
    ]
    assert times[0] > times[1] > times[2] > times[0] / 4


def test_a_larger_picture_takes_longer_and_keeps_more() -> None:
    plan = Plan.parse("patch2.displaced")
    small, large = (predict(costs(size), plan, SPEED, SLOW, STEPS) for size in (160, 240))
    assert large.per_step > small.per_step
    assert large.memory.kept > small.memory.kept and large.memory.activations > small.memory.activations


def test_old_values_hide_only_where_the_link_lets_them() -> None:
    hidden, seen = (
        predict(COSTS, Plan.parse("patch2.displaced"), SPEED, replace(SLOW, overlap=x), STEPS) for x in (1, 0)
    )
    assert hidden.steady.exposed < seen.steady.exposed
    assert hidden.steady.waiting == seen.steady.waiting  # halos and statistics are fresh


def test_a_plan_whose_warm_up_covers_the_run_takes_synchronous_calls_alone() -> None:
    covered = predict(COSTS, Plan.parse(f"patch2.displaced.w{STEPS}"), SPEED, SLOW, STEPS)
    assert covered.per_picture == pytest.approx(STEPS * covered.fresh.total)


def test_weights_that_are_divided_weigh_less() -> None:
    costs_with_others = Costs(unet(others=1000), unet().arguments(160, 160))
    whole, divided = (
        predict(costs_with_others, Plan.parse(t), SPEED, FAST, 1).memory.weights for t in ("patch1", "tp2")
    )
    assert 1000 + weights_of(unet().denoiser, Share(0, 2)).own == divided < whole


def test_more_ranks_than_places_take_turns() -> None:
    crowded = replace(SPEED, places=2)
    two, four = (predict(COSTS, Plan.parse(text), crowded, FAST, STEPS) for text in ("patch2", "patch4"))
    free = predict(COSTS, Plan.parse("patch4"), SPEED, FAST, STEPS)
    assert two.per_step == predict(COSTS, Plan.parse("patch2"), SPEED, FAST, STEPS).per_step
    assert four.per_step == pytest.approx(2 * free.per_step)


def test_own_work_at_every_post_is_paid_for() -> None:
    plain, busy = (predict(COSTS, Plan.parse("patch2"), replace(SPEED, post=p), FAST, STEPS) for p in (0.0, 1e-3))
    posts = len(COSTS.of(Plan.parse("patch2")).steady.posts)
    assert busy.per_step - plain.per_step == pytest.approx(1e-3 * posts)


def test_a_post_of_stages_has_a_cost_of_its_own() -> None:
    own = _flux_costs()
    for text, name in (("patch2", "post"), ("pipe2.m4.w0", "hand")):
        plan = Plan.parse(text)
        plain, busy, other = (
            predict(own, plan, replace(SPEED, **costs), FAST, STEPS)
            for costs in ({}, {name: 1e-3}, {{"post": "hand", "hand": "post"}[name]: 1e-3})
        )
        assert busy.per_step - plain.per_step == pytest.approx(1e-3 * len(own.of(plan).steady.posts))
        assert other.per_step == plain.per_step


def test_latency_passes_where_nobody_waits() -> None:
    late = replace(FAST, within=Link(1e-2, 1e15), overlap=0.0)
    stale, fresh = (predict(COSTS, Plan.parse(text), SPEED, late, STEPS) for text in ("patch2.displaced.all", "patch2"))
    assert stale.steady.exposed == pytest.approx(0.0, abs=1e-9)
    assert fresh.steady.waiting >= 1e-2


def test_a_step_of_stages_takes_as_long_as_a_piece_needs_to_come_through_all() -> None:
    own = _flux_costs()
    alone = predict(own, Plan(), SPEED, FAST, STEPS).steady
    one, two, many = (predict(own, Plan.parse(f"pipe2.m{num}.w0"), SPEED, FAST, STEPS).steady for num in (1, 2, 4))
    # One piece in two stages: one of them is idle. With pieces for all, the busiest stage is what a step takes.
    assert one.total == pytest.approx(alone.total, rel=0.05)
    assert two.computing < one.total and many.waiting == 0.0
    slow = replace(SLOW, within=Link(1.0, 1e15))
    assert predict(own, Plan.parse("pipe2.m2.w0"), SPEED, slow, STEPS).steady.waiting > 1.0
    assert predict(own, Plan.parse("pipe2.m2.w0"), SPEED, slow, STEPS).steady.waiting > (
        predict(own, Plan.parse("pipe2.m16.w0"), SPEED, slow, STEPS).steady.waiting
    )


def test_a_host_that_starts_kernels_slowly_is_what_a_step_takes() -> None:
    kernels = COSTS.of(Plan.parse("patch2")).steady.operations.kernels
    slow, none = (predict(COSTS, Plan.parse("patch2"), replace(SPEED, host=h), FAST, STEPS) for h in (1.0, 1e-12))
    assert slow.steady.computing + slow.steady.launching == pytest.approx(1.0 * kernels)
    assert none == predict(COSTS, Plan.parse("patch2"), SPEED, FAST, STEPS)


def test_fewer_rows_for_convolutions_cost_networks_that_have_them() -> None:
    slower = replace(SPEED, convolved=1.5)
    flux_costs = _flux_costs()
    for own, text, factor in (
        (COSTS, "patch2", 1.5), (COSTS, "cfg2", 1.5), (COSTS, "async2", 1.0), (COSTS, "patch1", 1.0),
        (COSTS, "cfg2.async2", 1.5),
        (flux_costs, "patch2", 1.0), (flux_costs, "pipe2.m4.w0", 1.0),
    ):  # fmt: skip
        plain, more = (predict(own, Plan.parse(text), speed, FAST, STEPS).steady for speed in (SPEED, slower))
        assert more.computing == pytest.approx(factor * plain.computing)


def test_components_of_a_stride_take_the_mean_of_their_cycle() -> None:
    every, second = (predict(COSTS, Plan.parse(text), SPEED, FAST, STEPS) for text in ("async2", "async2.stride2"))
    cycle = COSTS.of(Plan.parse("async2.stride2")).cycle
    assert len(cycle) == 2 and cycle[1].operations.total <= cycle[0].operations.total
    assert second.per_step < every.per_step


@pytest.mark.parametrize("text", ["async2", "async3"])
def test_components_one_after_the_other_take_as_long_as_one_device(text: str) -> None:
    chain = predict(COSTS, Plan.parse(f"{text}.sync"), SPEED, FAST, STEPS)
    alone = predict(COSTS, Plan(), SPEED, FAST, STEPS)
    assert chain.per_step == pytest.approx(alone.per_step)
    assert predict(COSTS, Plan.parse(f"{text}.w{STEPS}"), SPEED, FAST, STEPS).per_picture == pytest.approx(
        chain.per_picture
    )


def test_an_undivided_call_is_made_to_take_what_it_took() -> None:
    work = COSTS.of(Plan()).steady.operations
    assert SPEED.made_to_take(3.0, work).seconds(work) == pytest.approx(3.0)
    with pytest.raises(ConfigError, match="less than the start"):
        SPEED.made_to_take(1e-9, work)


def test_stages_are_for_transformers_and_components_need_blocks() -> None:
    with pytest.raises(PlanError, match="pipe2"):
        COSTS.of(Plan.parse("pipe2"))
    with pytest.raises(PlanError, match="cannot be cut into 40"):
        COSTS.of(Plan.parse("async40"))


def test_a_pipeline_of_stages_divides_a_transformer() -> None:
    own = _flux_costs()
    alone, staged = (predict(own, Plan.parse(text), SPEED, FAST, STEPS) for text in ("patch1", "pipe2.m2.w0"))
    assert alone.steady.computing / 2 <= staged.steady.computing < alone.steady.computing
    assert staged.bubble == 0.5


@pytest.mark.parametrize(
    ("size", "said"), [((100, 96), "width 100.*nearest is 96"), ((96, 0), "height 0"), ((-8, 96), "width -8")]
)
def test_an_impossible_size_is_refused(size: tuple[int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        unet().arguments(*size)


def test_a_model_whose_calls_are_not_known_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"LTXVideo.*name a plan.*FluxTransformer2DModel"):
        arguments(FAMILIES["LTX-Video"].make(), 1, 8, 8, torch.float32)


@pytest.mark.parametrize(
    ("family", "num_rows", "num_calls"),
    [
        ("FLUX.1 dev", 1, 1),
        ("FLUX.2", 1, 1),
        ("SD3", 2, 1),
        ("PixArt-alpha", 2, 1),
        ("Hunyuan-DiT", 2, 1),
        ("Qwen-Image", 1, 2),
        ("Wan 2.1", 1, 2),
        ("CogVideoX 5B", 2, 1),
        ("CogVideoX 2B", 2, 1),
    ],
)
def test_calls_of_a_family_are_known_and_its_plans_are_priced(family: str, num_rows: int, num_calls: int) -> None:
    model = FAMILIES[family].make()
    blueprint = of_config(family, type(model), dict(model.config), torch.float32)
    own = Costs.of_size(blueprint, 80, 48)
    assert own.num_rows == num_rows and blueprint.calls_per_step == num_calls
    alone, divided = (predict(own, Plan.parse(text), SPEED, FAST, STEPS) for text in ("patch1", "patch2"))
    assert divided.per_step < alone.per_step
    work = own.of(Plan()).steady.operations
    assert alone.per_step == pytest.approx(num_calls * SPEED.seconds(work))
