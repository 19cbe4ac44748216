"""Displaced calls: exact where nothing moved, near where the input moved a little, and not before the warm-up ends."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, predictions

from distrifusion import Plan
from distrifusion.exchange.handles import Halo
from distrifusion.exchange.verbs import Exchange
from distrifusion.plan import SiteKind
from models import band_by_band, moved, relative_error, unet_inputs

MIXTURES = [".".join(kinds) for n in (1, 2, 3) for kinds in combinations(SiteKind, n)]


@pytest.mark.parametrize("kinds", MIXTURES)
def test_an_input_given_again_is_exact_for_every_mixture_of_stale_kinds(sdxl: UNet2DConditionModel, kinds: str) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    y = moved(x)
    assert max(errors(sdxl, f"patch3.displaced.{kinds}.w1", [x, y, y])) <= EXACT


@pytest.mark.parametrize(
    ("plan", "batch", "height", "width"),
    [
        ("patch4.columns.displaced.all.w1", 1, 25, 41),
        ("cfg2.patch2.displaced.all.w1", 2, 24, 20),
        ("patch8.displaced.all.w1", 1, 24, 16),
    ],
)
def test_an_input_given_again_is_exact_for_every_family(
    unet: UNet2DConditionModel, plan: str, batch: int, height: int, width: int
) -> None:
    x = unet_inputs(unet, batch, height, width)
    y = moved(x)
    assert max(errors(unet, plan, [x, y, y])) <= EXACT


@pytest.mark.parametrize("plan", ["patch2", "patch4", "patch3.columns"])
def test_a_moved_input_is_worse_than_synchronous_and_far_better_than_no_exchange(
    unet: UNet2DConditionModel, plan: str
) -> None:
    x = unet_inputs(unet, 1, 41, 25)
    y = moved(x)
    with torch.no_grad():
        broken = relative_error(band_by_band(unet, y, Plan.parse(plan)), unet(**y).sample)
    synchronous = errors(unet, plan, [y])[0]
    displaced = errors(unet, f"{plan}.displaced.all.w0", [x, y])[1]
    assert synchronous <= EXACT
    assert 1e-3 < displaced < broken / 3


def test_the_error_shrinks_with_the_movement(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    by_movement = [errors(sdxl, "patch3.displaced.all.w0", [x, moved(x, amount)])[1] for amount in (0.3, 0.03, 0.003)]
    assert by_movement[0] > 3 * by_movement[1] > 9 * by_movement[2] > 0


def test_fresh_halos_and_norms_are_nearer_than_all_stale(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    steps = [x, moved(x)]
    assert errors(sdxl, "patch3.displaced.kv.w0", steps)[1] < errors(sdxl, "patch3.displaced.all.w0", steps)[1]


@pytest.mark.parametrize("kinds", MIXTURES)
def test_an_input_repeated_often_converges_to_the_exact_result(sdxl: UNet2DConditionModel, kinds: str) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)
    y = moved(x, 0.5)
    by_step = errors(sdxl, f"patch2.displaced.{kinds}.w0", [x] + 12 * [y])
    assert by_step[0] <= EXACT < by_step[1]
    assert by_step[-1] < by_step[1] / 50


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warm_up_is_one_exact_call_and_as_many_more_as_asked(sdxl: UNet2DConditionModel, warmup: int) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)
    steps = [moved(x, seed=seed) for seed in range(warmup + 3)]
    by_step = errors(sdxl, f"patch2.displaced.all.w{warmup}", steps)
    assert max(by_step[: warmup + 1]) <= EXACT
    assert min(by_step[warmup + 1 :]) > 1e-3


@pytest.mark.parametrize("num_calls", [1, 4])
def test_a_run_that_ends_within_the_warm_up_is_exact(sdxl: UNet2DConditionModel, num_calls: int) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)
    steps = [moved(x, seed=seed) for seed in range(num_calls)]
    assert max(errors(sdxl, "patch2.displaced.all.w3", steps)) <= EXACT


def test_one_call_without_warm_up_is_exact(sdxl: UNet2DConditionModel) -> None:
    assert max(errors(sdxl, "patch3.displaced.all.w0", [unet_inputs(sdxl, 1, 17, 9)])) <= EXACT


@pytest.mark.parametrize(
    "plan", ["patch4.displaced.all.w0", "cfg2.patch2.displaced.kv.w0", "cfg2.patch4.displaced.all.w1"]
)
def test_two_displaced_runs_and_all_ranks_have_the_same_bits(sdxl: UNet2DConditionModel, plan: str) -> None:
    x = unet_inputs(sdxl, 2, 24, 20)
    steps = [moved(x, seed=seed) for seed in range(4)]
    first, second = (predictions(sdxl, plan, steps) for _ in range(2))
    for outputs in (*first, *second):
        assert all(torch.equal(a, b) for a, b in zip(outputs, first[0], strict=True))


def test_guidance_off_within_a_cfg_plan_stays_exact_on_a_repeated_input(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 24, 20)
    y = moved(x)
    assert max(errors(sdxl, "cfg2.patch2.displaced.all.w1", [x, y, y])) <= EXACT


def test_a_picture_too_small_to_cut_is_exact_in_every_call(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 5, 7)
    assert max(errors(sdxl, "patch8.displaced.all.w0", [x, moved(x), moved(x, seed=1)])) <= EXACT


@pytest.mark.parametrize(("plan", "activated"), [("patch2.displaced.all.w1", True), ("patch2.displaced.kv.w1", False)])
def test_halos_that_may_be_old_travel_activated(
    sdxl: UNet2DConditionModel, plan: str, activated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh ones travel as the norm's input, which saves a wait; old ones would be normed with newer statistics."""
    lowest: list[float] = []
    intact = Exchange.halo

    def halo(self: Exchange, site: str, x: torch.Tensor, *args: Any) -> Halo:
        if site.endswith((".conv1", ".conv2")):
            lowest.append(x.min().item())
        return intact(self, site, x, *args)

    monkeypatch.setattr(Exchange, "halo", halo)
    x = unet_inputs(sdxl, 1, 25, 17)
    predictions(sdxl, plan, [x, moved(x), moved(x)])
    lowest_of_silu = -0.2785
    assert lowest and (min(lowest) >= lowest_of_silu) is activated
