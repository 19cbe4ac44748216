"""Time shift: a component that takes old values is told the timestep of the call that gave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from division import EXACT, Inputs, errors, on_ranks

from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.verbs import Exchange
from models import moved, run_request, unet_inputs
from transformers_tiny import FAMILIES

TIMES = (900, 800, 650, 600, 500, 470)
# None is old in the two calls of `w1`; then the call before, or the last whose values have had the time of two calls.
LATE = {
    "async2.timeshift.w1": (900, 800, 800, 650, 600, 500),
    "async2.stride2.timeshift.w1": (900, 800, 800, 800, 650, 650),
}


def told(model: Any, plan: str, steps: list[Inputs]) -> list[tuple[float, ...]]:
    """The timesteps that reach the embedding of time, by rank."""

    def work(own: Any, denoiser: ParallelDenoiser) -> tuple[float, ...]:
        seen: list[float] = []
        own.get_submodule("time_proj" if hasattr(own, "time_proj") else "time_text_embed").register_forward_pre_hook(
            lambda _, args: seen.append(float(args[0].flatten()[0]))
        )
        run_request(own, denoiser, steps)
        return tuple(seen)

    return on_ranks(model, plan, work)


def at(inputs: Inputs, timestep: Any) -> Inputs:
    return {**inputs, "timestep": timestep}


@pytest.mark.parametrize("plan", LATE)
def test_a_component_of_a_unet_is_told_when_its_input_was_given(sdxl: UNet2DConditionModel, plan: str) -> None:
    steps = [at(unet_inputs(sdxl, 1, 17, 9), torch.tensor(time)) for time in TIMES]
    assert told(sdxl, plan, steps) == [TIMES, LATE[plan]]
    assert told(sdxl, plan.replace(".timeshift", ""), steps) == [TIMES, TIMES]


def test_every_component_but_the_first_of_a_transformer_is_told() -> None:
    x, plan = FAMILIES["SD3"].inputs(2, *FAMILIES["SD3"].size), "async2.timeshift.w1"
    steps = [at(x, torch.full((2,), float(time))) for time in TIMES]
    first, *others = told(FAMILIES["SD3"].make(), f"cfg2.{plan.replace('2', '3', 1)}", steps)[:3]
    assert first == TIMES
    assert others == [LATE[plan], LATE[plan]]


def test_a_model_that_runs_whole_is_told_its_own_time(sdxl: UNet2DConditionModel) -> None:
    """A ControlNet takes nothing of others."""
    control, x = ControlNetModel.from_unet(sdxl), unet_inputs(sdxl, 1, 16, 8)
    steps = [{**at(x, torch.tensor(time)), "controlnet_cond": torch.ones(1, 3, 128, 64)} for time in TIMES]

    def work(own: Any, denoiser: ParallelDenoiser) -> list[float]:
        seen: list[float] = []
        own.time_proj.register_forward_pre_hook(lambda _, args: seen.append(float(args[0])))
        denoiser.open("request")
        for inputs in steps:
            denoiser.slot = 0
            own(**inputs)
        denoiser.close()
        return seen

    assert on_ranks(control, "async2.timeshift.w1", work) == 2 * [list(TIMES)]


@pytest.mark.supports("plan", "async<N>.timeshift")
@pytest.mark.parametrize(
    "plan", ["async2.timeshift", "async3.timeshift", "async2.stride2.timeshift", "async2.timeshift.forecast"]
)
def test_the_shift_has_the_zeros_of_components(sdxl: UNet2DConditionModel, plan: str) -> None:
    """The warm-up, and an input that is given again at the same time."""
    x = unet_inputs(sdxl, 1, 25, 17)
    y = moved(x)
    by_call = errors(
        sdxl,
        f"{plan}.w1",
        [at(x, torch.tensor(600)), at(y, torch.tensor(500)), at(x, torch.tensor(450)), *5 * [at(y, torch.tensor(400))]],
    )
    assert max(by_call[:2]) <= EXACT
    assert by_call[2] > 1e-4
    assert by_call[-1] <= EXACT


def test_the_gates_see_a_shift_that_is_not_made(sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "given_at", None)
    steps = [at(unet_inputs(sdxl, 1, 17, 9), torch.tensor(time)) for time in TIMES]
    assert told(sdxl, "async2.timeshift.w1", steps)[1] != LATE["async2.timeshift.w1"]
