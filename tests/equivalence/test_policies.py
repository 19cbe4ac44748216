"""What a displaced or coded plan adds: forecasts, resynchronisation, coded differences; each has an exact zero."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks, predictions

from distrifusion.denoiser import ParallelDenoiser
from models import moved, relative_error, run_request, unet_inputs

Inputs = dict[str, object]


def walk(unet: UNet2DConditionModel, num_steps: int, height: int = 25, width: int = 17) -> list[Inputs]:
    """Inputs along a straight line: what a run's latents nearly do from one step to the next.

    Timesteps are close to each other, because the random weights of a small model do not vary smoothly with them.
    """
    first = unet_inputs(unet, 1, height, width)
    last = moved(first, 0.3)
    start, stop = first["sample"], last["sample"]
    return [
        {**first, "sample": torch.lerp(start, stop, i / (num_steps - 1)), "timestep": torch.tensor(900 - 0.01 * i)}
        for i in range(num_steps)
    ]


def plans(unet: UNet2DConditionModel, plan: str, other: str, steps: list[Inputs]) -> list[float]:
    """How far the predictions of two plans are from each other, by step."""
    first, second = predictions(unet, plan, steps)[0], predictions(unet, other, steps)[0]
    return [relative_error(a, b) for a, b in zip(first, second, strict=True)]


# Forecasts


def test_a_forecast_of_nothing_is_the_plain_stale_value(sdxl: UNet2DConditionModel) -> None:
    steps = walk(sdxl, 4)
    zero = predictions(sdxl, "patch3.displaced.forecast0.w0", steps)[0]
    plain = predictions(sdxl, "patch3.displaced.w0", steps)[0]
    assert all(torch.equal(a, b) for a, b in zip(zero, plain, strict=True))


@pytest.mark.supports("plan", "patch<N>.displaced.forecast")
@pytest.mark.parametrize("plan", ["patch3.displaced.forecast", "cfg2.patch2.displaced.all.forecast100"])
def test_values_that_stand_still_are_exact_under_a_forecast(sdxl: UNet2DConditionModel, plan: str) -> None:
    x = unet_inputs(sdxl, 2, 26, 24)
    y = moved(x)
    assert max(errors(sdxl, f"{plan}.w2", [x, y, y, y, y])) <= EXACT


def test_a_forecast_is_nearer_where_values_move_on_a_line(sdxl: UNet2DConditionModel) -> None:
    steps = walk(sdxl, 6)
    plain, half, full = (
        errors(sdxl, f"patch3.displaced.{word}.w1", steps)[-1] for word in ("forecast0", "forecast50", "forecast100")
    )
    assert full < half < plain
    assert full < plain / 3


def test_a_forecast_follows_the_solvers_time(sdxl: UNet2DConditionModel) -> None:
    """A step twice as long carries values on twice as far; where no time passes, they stay."""
    even = walk(sdxl, 9)
    uneven = [even[i] for i in (0, 1, 2, 4, 8)]
    stale, carried = (errors(sdxl, f"patch3.displaced.{word}.w1", uneven)[-1] for word in ("forecast0", "forecast100"))
    assert carried < stale / 2
    blind = [{**step, "timestep": even[0]["timestep"]} for step in uneven]
    still = errors(sdxl, "patch3.displaced.forecast0.w1", blind)[-1]
    assert errors(sdxl, "patch3.displaced.forecast100.w1", blind)[-1] == pytest.approx(still, rel=1e-4)


# Resynchronisation


@pytest.mark.supports("plan", "patch<N>.displaced.resync<percent>")
def test_a_bound_of_zero_makes_every_call_synchronous(sdxl: UNet2DConditionModel) -> None:
    assert max(errors(sdxl, "patch3.displaced.resync0", walk(sdxl, 4))) <= EXACT


def test_a_bound_that_is_never_passed_is_the_plain_plan_with_one_more_warm_up_call(sdxl: UNet2DConditionModel) -> None:
    steps = walk(sdxl, 4)
    assert plans(sdxl, "patch3.displaced.resync1000", "patch3.displaced.w1", steps) == [0.0] * 4


def synchronous_calls(unet: UNet2DConditionModel, plan: str, steps: list[Inputs]) -> list[list[bool]]:
    """Which calls of a request were synchronous, by rank."""

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[bool]:
        seen: list[bool] = []
        intact = denoiser.exchange.begin

        def begin(policy: object) -> None:
            seen.append(not policy.stale)  # type: ignore[attr-defined]
            intact(policy)  # type: ignore[arg-type]

        denoiser.exchange.begin = begin  # type: ignore[method-assign]
        run_request(model, denoiser, steps)
        assert denoiser.exchange.num_synchronous == sum(seen)
        return seen

    return on_ranks(unet, plan, work)


@pytest.mark.parametrize("plan", ["patch3.displaced.resync50", "cfg2.patch2.displaced.resync50"])
def test_a_jump_makes_the_next_call_synchronous_on_all_ranks(sdxl: UNet2DConditionModel, plan: str) -> None:
    x = unet_inputs(sdxl, 2, 26, 24)
    jump = moved(x, 3.0)
    by_rank = synchronous_calls(sdxl, plan, [x, x, x, jump, jump, jump])
    assert all(calls == [True, True, False, False, True, False] for calls in by_rank)


# Coded differences

BITS = (8, 4, 2, 1)


@pytest.mark.parametrize("plan", ["patch3.delta32", "cfg2.patch2.columns.delta32"])
def test_full_precision_is_exact(sdxl: UNet2DConditionModel, plan: str) -> None:
    x = unet_inputs(sdxl, 2, 26, 24)
    assert max(errors(sdxl, plan, [x, moved(x), moved(x, seed=1)])) <= EXACT


@pytest.mark.supports("plan", "patch<N>.displaced.delta<bits>")
@pytest.mark.parametrize("words", ["forecast", "all", "halo"])
def test_full_precision_codes_of_a_displaced_plan_change_nothing(sdxl: UNet2DConditionModel, words: str) -> None:
    steps = walk(sdxl, 5)
    assert max(plans(sdxl, f"patch3.displaced.{words}.delta32.w1", f"patch3.displaced.{words}.w1", steps)) <= EXACT


@pytest.mark.supports("plan", "patch<N>.delta<bits>")
@pytest.mark.parametrize("plan", ["patch3", "patch2.columns", "cfg2.patch3"])
@pytest.mark.parametrize("bits", BITS)
def test_the_first_call_is_exact_and_more_bits_are_nearer(sdxl: UNet2DConditionModel, plan: str, bits: int) -> None:
    x = unet_inputs(sdxl, 2, 26, 24)
    steps = [x, moved(x)]
    first, second = errors(sdxl, f"{plan}.delta{bits}", steps)
    assert first <= EXACT < second
    finer = 2 * bits if bits < 8 else 32
    assert errors(sdxl, f"{plan}.delta{finer}", steps)[1] < second


@pytest.mark.parametrize("bits", BITS)
def test_errors_are_fed_back_so_a_value_that_stands_still_becomes_exact(sdxl: UNet2DConditionModel, bits: int) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    by_step = errors(sdxl, f"patch3.delta{bits}", [x] + 9 * [moved(x)])
    assert by_step[-1] < by_step[1] / 3


def test_all_ranks_of_a_coded_plan_have_the_same_bits_and_so_has_a_second_run(sdxl: UNet2DConditionModel) -> None:
    steps = walk(sdxl, 4)
    first, second = (predictions(sdxl, "patch3.delta4", steps) for _ in range(2))
    for outputs in (*first, *second):
        assert all(torch.equal(a, b) for a, b in zip(outputs, first[0], strict=True))


@pytest.mark.parametrize("mode", ["", "displaced."])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.29), (4, 0.17), (2, 0.11), (1, 0.08)])
def test_codes_are_as_small_on_the_wire_as_their_bits_say(
    sdxl: UNet2DConditionModel, mode: str, bits: int, most: float
) -> None:
    x = unet_inputs(sdxl, 1, 64, 64)

    def sent(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[int]:
        counts = [0]
        for num_calls in (1, 2, 3):
            run_request(model, denoiser, num_calls * [x])
            counts.append(denoiser.exchange.bytes_sent["kv"])
        return [after - before for before, after in pairwise(counts)]

    for one_call, two_calls, three_calls in on_ranks(sdxl, f"patch2.{mode}delta{bits}.w0", sent):
        assert three_calls - two_calls == two_calls - one_call
        assert bits / 32 < (two_calls - one_call) / one_call <= most
