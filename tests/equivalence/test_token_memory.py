"""What a plan keeps of a transformer: predicted from shapes, measured in the pool, refused where it does not fit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from division import EXACT, errors
from peft import LoraConfig
from test_memory import answers, held

from distrifusion import Plan
from distrifusion.anatomy import anatomy_of
from distrifusion.errors import PoolTooLarge, UnsupportedModel
from distrifusion.memory import check
from distrifusion.memory.prediction import pool_bytes
from distrifusion.memory.tokens import TokenShapes, pool_bytes_of_call
from models import moved, sdxl_unet, to_dtype, unet_inputs
from transformers_tiny import FAMILIES, flux, flux_inputs, sd3, sd3_inputs, sd35, wan, wan_inputs

POLICIES = ("patch2.displaced.w0", "patch3.displaced.forecast.w1", "cfg2.patch2.delta4", "patch3.displaced.delta2.w0")


def predicted(model: Any, plan: str, inputs: dict[str, Any]) -> list[int]:
    return pool_bytes_of_call(model, Plan.parse(plan), **inputs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_holds_what_is_predicted(family: str) -> None:
    """Each family with one of the policies in turn; an odd number of pictures, tokens that do not divide."""
    plan = POLICIES[sorted(FAMILIES).index(family) % len(POLICIES)]
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(3, *FAMILIES[family].size)
    found = predicted(model, plan, inputs)
    assert held(model, plan, inputs) == found and min(found) > 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("plan", "batch", "height", "width"),
    [
        ("patch4.displaced.all.w0", 2, 5, 5),
        ("patch3.delta1", 2, 7, 3),
        ("dp2.patch2.displaced.w0", 1, 5, 5),  # one picture: all four ranks take tokens
        ("cfg2.patch2.frozen.w0", 3, 5, 3),
        ("patch3.displaced.delta4.forecast.resync30.w0", 1, 7, 3),
    ],
)
def test_every_policy_holds_what_is_predicted(plan: str, batch: int, height: int, width: int) -> None:
    """Joint attention, and attention over the picture alone, in one model."""
    model, inputs = sd35(), sd3_inputs(batch, 2 * height, 2 * width)
    found = predicted(model, plan, inputs)
    assert held(model, plan, inputs) == found and min(found) > 0


FLOWS = ("pipe2.m3.w0", "pipe2.m3.forecast.w0", "pipe2.m2.forecast.w1", "cfg2.pipe2.m4.w0", "pipe2.ulysses2.w0")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("Hunyuan")])
def test_stages_of_every_family_hold_what_is_predicted(family: str) -> None:
    """Of their own blocks alone, whole while all flows at once and in pieces after it."""
    plan = FLOWS[sorted(FAMILIES).index(family) % len(FLOWS)]
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(3, *FAMILIES[family].size)
    found = predicted(model, plan, inputs)
    assert held(model, plan, inputs) == found and min(found) > 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("plan", "height", "width"),
    [
        ("pipe4.m2.forecast.w0", 5, 5),
        ("pipe2.ulysses5.m1.w0", 7, 5),  # three heads on five ranks
        ("pipe2.ulysses2.m3.w0", 1, 1),  # a token that a group cannot share
        ("pipe2.sync", 5, 3),
    ],
)
def test_stages_and_their_groups_hold_what_is_predicted(plan: str, height: int, width: int) -> None:
    model, inputs = flux(), flux_inputs(1, height, width)
    assert held(model, plan, inputs) == predicted(model, plan, inputs)


@pytest.mark.parametrize("plan", ["patch2", "ulysses2", "ring2", "patch2.naive", "patch2.delta32"])
def test_plans_that_use_nothing_old_hold_nothing(plan: str) -> None:
    model, inputs = flux(), flux_inputs(2, 5, 3)
    assert held(model, plan, inputs) == predicted(model, plan, inputs) == [0, 0]


def test_a_call_that_is_too_short_to_be_cut_holds_nothing() -> None:
    model, inputs = flux(), flux_inputs(1, 1, 3)
    plan = "patch4.displaced.w0"
    assert held(model, plan, inputs) == predicted(model, plan, inputs) == [0] * 4


@pytest.mark.usefixtures("unchecked")
def test_half_precision_and_adapters_hold_what_is_predicted() -> None:
    model = sd3().to(torch.bfloat16)
    inputs = to_dtype(sd3_inputs(2, 10, 6), torch.bfloat16)
    plan = "patch3.displaced.delta4.forecast.w0"
    found = predicted(model, plan, inputs)
    assert held(model, plan, inputs) == found
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    model.to(torch.bfloat16)
    assert held(model, plan, inputs) == predicted(model, plan, inputs) == found


def test_a_picture_twice_as_long_holds_twice_as_much_of_itself() -> None:
    """By the formula: keys and values of words and of picture tokens at each of four layers."""
    model = flux()
    for height, width in product((3, 7), (5, 9)):
        (first, *_) = predicted(model, "patch3.displaced", flux_inputs(2, height, width))
        assert first == 4 * 2 * 2 * (7 + height * width) * 24 * 4


# The check before the first call


@pytest.mark.supports("feature", "a plan that keeps more than is free is refused before the first step")
def test_a_pool_that_does_not_fit_is_refused_by_all_ranks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, plan = flux(), flux_inputs(2, 7, 5), "patch3.displaced.forecast.w0"
    thinner = predicted(model, "patch3.displaced.w0", inputs)
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: sum(thinner))
    found = answers(model, plan, inputs)
    assert all(isinstance(error, PoolTooLarge) for error in found), found
    assert len({str(error) for error in found}) == 1
    error = found[0]
    assert (error.needed, error.free) == (sum(predicted(model, plan, inputs)), sum(thinner))
    assert error.fits == "patch3.displaced.w0" and "as wide" not in str(error)
    assert answers(model, error.fits, inputs) == thinner


@pytest.mark.parametrize(
    ("plan", "fits"),
    [("pipe2.m3.forecast.w0", "pipe2.m3.w0"), ("pipe2.m3.w0", "pipe2.sync"), ("cfg2.pipe2.w0", "cfg2.pipe2.sync")],
)
def test_stages_that_keep_too_much_are_refused_with_what_fits(
    plan: str, fits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = sd3(), sd3_inputs(2, 10, 6)
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: sum(predicted(model, plan, inputs)) - 1)
    found = answers(model, plan, inputs)
    assert all(isinstance(error, PoolTooLarge) and error.fits == fits for error in found), found
    assert all(isinstance(kept, int) for kept in answers(model, fits, inputs))


def test_a_pool_that_just_fits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, plan = wan(), wan_inputs(1, 6, 10), "patch2.delta4"
    needed = sum(predicted(model, plan, inputs))
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: needed)
    assert all(isinstance(answer, int) and answer > 0 for answer in answers(model, plan, inputs))
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: needed - 1)
    assert {error.fits for error in answers(model, plan, inputs)} == {"patch2"}


def test_later_calls_and_requests_of_the_same_shapes_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int]] = []
    run = TokenShapes.run
    monkeypatch.setattr(TokenShapes, "run", lambda self, call, *at: passes.append(at) or run(self, call, *at))
    inputs = flux_inputs(1, 7, 5)
    assert held(flux(), "patch2.displaced.w0", inputs) and len(passes) == 2 * 3
    passes.clear()
    model, plan = flux(), Plan.parse("patch2.displaced")
    anatomy = anatomy_of(model)
    shapes = TokenShapes(model, anatomy)
    for _ in range(2):
        shapes.question(anatomy.bind(model.forward, (), inputs), plan)
    assert len(passes) == 3
    shapes.question(anatomy.bind(model.forward, (), flux_inputs(1, 7, 6)), plan)
    assert len(passes) == 6


class Counting(WanTransformer3DModel):
    """A transformer that looks at its latents before it goes on."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden_states.sum().item() == hidden_states.sum().item()
        return super().forward(hidden_states, *args, **kwargs)


def test_a_model_that_needs_values_is_not_checked_and_says_so() -> None:
    model = wan()
    model.__class__ = Counting
    inputs = wan_inputs(1, 6, 10)
    with pytest.warns(UserWarning, match="Counting needs more than shapes.*OutOfMemory"):
        assert held(model, "patch2.displaced.w0", inputs) == predicted(wan(), "patch2.displaced.w0", inputs)
    with pytest.raises(UnsupportedModel, match="Counting needs more than shapes"):
        predicted(model, "patch2.displaced.w0", inputs)


def test_each_question_has_its_own_models() -> None:
    with pytest.raises(UnsupportedModel, match="pool_bytes_of_call"):
        pool_bytes(flux(), Plan.parse("patch2.displaced"), 0, (1, 4, 8, 8), torch.float32)
    with pytest.raises(UnsupportedModel, match=r"UNet2DConditionModel.*pool_bytes of"):
        predicted(sdxl_unet(), "patch2.displaced", unet_inputs(sdxl_unet(), 1, 8, 8))


def test_a_forecast_follows_the_solver_s_time_where_tokens_have_timesteps_of_their_own() -> None:
    """Of a video that goes on from a given frame: its tokens stay at 0, and are not carried on less for it."""
    x = wan_inputs(1, 6, 10, timesteps_of_tokens=True)
    start, y = x["hidden_states"], moved(x, 0.3)["hidden_states"]
    steps = []
    for i in range(5):
        times = torch.full((1, 45), 500.0 - 2e-3 * i)
        times[:, :15] = 0.0
        steps.append({**x, "hidden_states": torch.lerp(start, y, i / 4), "timestep": times})
    plain, carried = (errors(wan(), f"patch3.displaced.{word}.w1", steps)[-1] for word in ("forecast0", "forecast100"))
    assert EXACT < carried < plain / 2
