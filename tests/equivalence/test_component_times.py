"""Components balanced by the time that layers take: alike on all ranks, and exact where components are."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks

from distrifusion.denoiser import ParallelDenoiser
from distrifusion.layout.depth import Depth, divide
from distrifusion.strategies.cutting import Cut, Cuts
from distrifusion.strategies.watching import Stopwatch
from models import moved, run_request, unet_inputs, with_residuals
from transformers_tiny import FAMILIES

here = threading.local()


def fake_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer takes most of all, on the first rank another than on the others; each takes more in later calls."""
    intact = Stopwatch.run

    def run(self: Stopwatch, *args: Any) -> Any:
        output = intact(self, *args)
        self.nanoseconds[-1] = time_of(len(self.nanoseconds) - 1, here.rank) * here.call
        return output

    monkeypatch.setattr(Stopwatch, "run", run)


def time_of(place: int, rank: int) -> int:
    return 1000 if place == (20 if rank else 4) else 1 + place


def cuts(model: Any, plan: str) -> list[Cut]:
    """Where each rank has cut the chain after the warm-up."""
    x = unet_inputs(model, 1, 17, 9)

    def work(own: Any, denoiser: ParallelDenoiser) -> Cut:
        here.rank, here.call = denoiser.exchange.transport.rank, 0
        denoiser.open("request")
        for call in range(denoiser.plan.num_whole):
            assert not denoiser._rule._components._cuts._cuts
            assert denoiser.weight_bytes == sum(p.nbytes for p in own.parameters())
            denoiser.slot, here.call = 0, call
            own(**x)
        denoiser.close()
        assert denoiser.weight_bytes < sum(p.nbytes for p in own.parameters())
        (cut,) = denoiser._rule._components._cuts._cuts.values()
        return cut

    return on_ranks(model, plan, work)


def by_times_of(rank: int, cut: Cut, num_components: int) -> Depth:
    layers = [replace(use.layer, cost=time_of(place, rank)) for place, use in enumerate(cut.seen.values())]
    return divide(layers, num_components)


@pytest.mark.parametrize("plan", ["async2.timed.w4", "cfg2.async3.timed.w3"])
def test_all_ranks_cut_by_the_least_times_of_the_first(
    sdxl: UNet2DConditionModel, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_times(monkeypatch)
    found = cuts(sdxl, plan)
    num_components = len(found[0].depth.runs)
    assert [cut.depth for cut in found] == len(found) * [by_times_of(0, found[0], num_components)]
    assert by_times_of(0, found[0], num_components) != by_times_of(1, found[0], num_components)
    # Broken on purpose: everybody's own times, and none.
    monkeypatch.setattr(Cuts, "_of_first_rank", lambda self, took, *_: took)
    assert {cut.depth for cut in cuts(sdxl, plan)} == {by_times_of(rank, found[0], num_components) for rank in (0, 1)}
    counted = cuts(sdxl, plan.replace(".timed", ""))[0].depth
    assert counted != found[0].depth


@pytest.mark.supports("plan", "async<N>.timed")
@pytest.mark.parametrize(
    "plan", ["async3.timed.w3", "cfg2.async2.timed.forecast.w4", "async2.stride2.timed.timeshift.w3"]
)
def test_timed_components_of_a_unet_have_their_zeros(sdxl: UNet2DConditionModel, plan: str) -> None:
    x = unet_inputs(sdxl, 2, 17, 9)
    check_zeros(sdxl, plan, x)


def test_timed_components_of_a_transformer_have_their_zeros() -> None:
    check_zeros(FAMILIES["SD3"].make(), "async3.timed.w3", FAMILIES["SD3"].inputs(1, *FAMILIES["SD3"].size))


def check_zeros(model: Any, plan: str, x: dict[str, Any]) -> None:
    """The warm-up, whether its calls are whole or not; and an input that is given again."""
    num_exact = int(plan[-1]) + 1
    y = moved(x)
    steps = [moved(x, seed=seed) for seed in range(num_exact + 1)] + 5 * [y]
    by_call = errors(model, plan, steps)
    assert max(by_call[:num_exact]) <= EXACT
    assert 1e-4 < by_call[num_exact] < 0.5
    assert by_call[-1] <= EXACT


def test_a_run_after_the_first_has_the_bits_of_one_more(sdxl: UNet2DConditionModel) -> None:
    """Once it is cut a chain stays cut, so that a seed gives one picture."""
    steps = [unet_inputs(sdxl, 1, 17, 9, seed=seed) for seed in range(6)]

    def work(own: Any, denoiser: ParallelDenoiser) -> list[list[torch.Tensor]]:
        return [run_request(own, denoiser, steps, request)[4:] for request in range(3)]

    for _, second, third in on_ranks(sdxl, "async2.timed.w3", work):
        assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))


def test_calls_of_another_kind_within_a_run_are_cut_alike(sdxl: UNet2DConditionModel) -> None:
    """The residuals of a ControlNet that begin when components are cut, or before, and end."""
    x = unet_inputs(sdxl, 1, 17, 9)
    controlled = with_residuals(x)
    for steps in (
        [*4 * [x], *4 * [controlled]],
        [x, *6 * [controlled], *4 * [x]],
        [x, controlled, x, *5 * [controlled]],
    ):
        assert errors(sdxl, "async3.timed.w3", steps)[-1] <= EXACT
