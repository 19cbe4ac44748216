"""Predictions: what makes a plan faster or slower in the model, and their zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blueprints import COSTS, FAST, SLOW, SPEED, costs, flux, unet

from distrifusion.errors import ConfigError, PlanError, UnsupportedModel
from distrifusion.plan import Plan
from distrifusion.planner.links import Link
from distrifusion.planner.operations import LayerKind
from distrifusion.planner.prediction import Costs, predict

STEPS = 10
TEXTS = ("patch1", "cfg2", "patch2", "cfg2.patch2", "patch2.displaced.w1", "patch2.displaced.all.w1", "patch2.delta4",
         "async2.w1", "tp2")  # fmt: skip


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
    assert divided - 1000 == (whole - 1000) // 2


def test_an_undivided_call_is_made_to_take_what_it_took() -> None:
    work = COSTS.of(Plan()).steady.operations
    assert SPEED.made_to_take(3.0, work).seconds(work) == pytest.approx(3.0)
    with pytest.raises(ConfigError, match="less than the start"):
        SPEED.made_to_take(1e-9, work)


def test_stages_are_for_transformers_and_components_need_blocks() -> None:
    with pytest.raises(PlanError, match="for transformers"):
        COSTS.of(Plan.parse("pipe2"))
    with pytest.raises(PlanError, match="fewer than its 40"):
        COSTS.of(Plan.parse("async40"))


def test_a_pipeline_of_stages_divides_a_transformer() -> None:
    # The calls of the family are wider than the tiny ones of other tests.
    tiny = flux()
    own = Costs(tiny, tiny.arguments(96, 96))
    alone, staged = (predict(own, Plan.parse(text), SPEED, FAST, STEPS) for text in ("patch1", "pipe2.m2.w0"))
    assert alone.steady.computing / 2 <= staged.steady.computing < alone.steady.computing
    assert staged.formula and not alone.formula and staged.bubble == 0.5


@pytest.mark.parametrize(
    ("size", "said"), [((100, 96), "width 100.*nearest is 96"), ((96, 0), "height 0"), ((-8, 96), "width -8")]
)
def test_an_impossible_size_is_refused(size: tuple[int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        unet().arguments(*size)


def test_a_model_whose_calls_are_not_known_is_named() -> None:
    from distrifusion.planner.calls import arguments
    from transformers_tiny import FAMILIES

    with pytest.raises(UnsupportedModel, match=r"CogVideoX.*name a plan"):
        arguments(FAMILIES["CogVideoX 2B"].make(), 1, 8, 8, unet().dtype)
