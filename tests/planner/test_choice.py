"""Which plans are weighed, and which one is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blueprints import COSTS, FAST, SLOW, SPEED, flux, unet

from distrifusion.errors import ConfigError
from distrifusion.plan import Plan
from distrifusion.planner.auto import counts_of, fidelity, model_size
from distrifusion.planner.candidates import Fidelity, allowed, fidelity_of, plans
from distrifusion.planner.choice import rank


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("make", [unet, flux])
def test_plans_occupy_the_devices_once_each_and_keep_the_wish(num_devices: int, make) -> None:
    model, rows = make().denoiser, 2
    weighed = {wish: plans(model, num_devices, rows, wish) for wish in Fidelity}
    for wish, found in weighed.items():
        assert len(set(found)) == len(found) > 0
        assert all(plan.num_ranks == num_devices and allowed(plan, wish) for plan in found)
    assert set(weighed[Fidelity.EXACT]) <= set(weighed[Fidelity.CLOSE]) <= set(weighed[Fidelity.ANY])
    assert all(plan.exact for plan in weighed[Fidelity.EXACT])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cfg2.patch2", "exact"),
        ("patch2.delta32", "exact"),
        ("patch2.displaced", "close"),
        ("patch2.delta4", "close"),
        ("patch2.delta2", "any"),
        ("patch2.displaced.all", "any"),
        ("patch2.naive", "any"),
        ("async2", "any"),
        ("async2.sync", "exact"),
    ],
)
def test_the_class_of_a_plan(text: str, expected: str) -> None:
    assert fidelity_of(Plan.parse(text)) == expected


def test_without_a_cost_for_links_the_most_devices_win() -> None:
    ranking = rank(COSTS, [1, 2, 4], Fidelity.EXACT, SPEED, FAST, 10)
    assert ranking.chosen.plan.num_ranks == 4 and ranking.chosen.plan.exact
    times = [p.per_picture for p in ranking.predictions]
    assert times == sorted(times)
    assert str(ranking.chosen.plan) in ranking.reason


def test_on_a_link_too_slow_one_device_is_taken_and_said() -> None:
    crawling = replace(SLOW, within=replace(SLOW.within, latency=10.0))
    ranking = rank(COSTS, [1, 2], Fidelity.ANY, SPEED, crawling, 10)
    assert ranking.chosen.plan == Plan()
    assert "one device is fastest" in ranking.reason and "limited by link" in ranking.reason


@pytest.mark.parametrize("links", [FAST, SLOW])
@pytest.mark.parametrize("wish", Fidelity)
def test_what_is_taken_is_never_slower_than_one_device(links, wish: Fidelity) -> None:
    ranking = rank(COSTS, [1, 2], wish, SPEED, links, 10)
    assert ranking.chosen.per_picture <= ranking.alone.per_picture
    assert allowed(ranking.chosen.plan, wish)


def test_a_plan_that_does_not_fit_is_refused_with_its_bytes() -> None:
    need = COSTS.blueprint.weights + COSTS.of(Plan()).steady.operations.peak
    small = replace(SPEED, memory=need)
    ranking = rank(COSTS, [1, 2], Fidelity.EXACT, small, SLOW, 10)
    assert all(p.memory.total <= need for p in ranking.predictions)
    with pytest.raises(ConfigError, match=r"no plan fits.*smaller picture"):
        rank(COSTS, [1], Fidelity.EXACT, replace(SPEED, memory=1), SLOW, 10)


def test_words_and_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'near'.*exact, close, any"):
        fidelity("near")
    with pytest.raises(ConfigError, match="0 devices"):
        plans(COSTS.blueprint.denoiser, 0, 2, Fidelity.EXACT)
    with pytest.raises(ConfigError, match="0 steps"):
        rank(COSTS, [1], Fidelity.EXACT, SPEED, FAST, 0)
    assert counts_of(6) == [1, 2, 3, 4, 6] and counts_of(8) == [1, 2, 4, 8] and counts_of(1) == [1]
    assert model_size(unet()) == (256, 256)
