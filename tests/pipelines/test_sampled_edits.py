"""Samplers in pipelines that draw from a picture, paint into one, or follow a control image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from families import HEIGHT, WIDTH
from families import PIPELINES as UNETS
from one_device import OneDevice
from ranks import EXACT, Ranks, own_copy
from transformer_families import PIPELINES as TRANSFORMERS

from distrifusion.engine.pipelines import FACTS
from distrifusion.errors import ConfigError
from distrifusion.nested import map_tensors
from gloo.small_pipelines import SCHEDULERS
from models import relative_error

CASES = {**UNETS, **TRANSFORMERS}
# How a loop begins at a later step, puts back what is known, has more channels or a second network.
UNUSUAL = (
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "FluxImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionInpaintPipeline",
    "FluxInpaintPipeline",
    "StableDiffusionXLInpaintPipeline, 9 channels",
    "StableDiffusionInpaintPipeline, 9 channels",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetPipeline, guess mode",
    "StableDiffusionXLControlNetPipeline, two nets",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetPipeline, global pooling",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionControlNetInpaintPipeline",
)
# A control that begins or ends within the run is refused: there a step depends on its number in the loop.
ALL_STEPS = {"control_guidance_start": 0.0, "control_guidance_end": [1.0, 1.0]}
STEPS = 5
SMALL = {HEIGHT: 72, WIDTH: 56}


def draw(name: str, pipe: Any, **changes: Any) -> torch.Tensor:
    """The latents of a case, those of U-Nets at a smaller size; strength below 1 leaves out the first steps."""
    case = CASES[name]
    arguments = {key: map_tensors(value, cut_out) for key, value in case.arguments.items()}
    if name in UNETS:
        arguments |= {key: SMALL[arguments[key]] for key in ("height", "width") if key in arguments}
    controls = ALL_STEPS if "two nets" in name else {}
    return replace(case, arguments=arguments)(pipe, **{"num_inference_steps": STEPS, **controls, **changes})


def cut_out(value: torch.Tensor) -> torch.Tensor:
    """The corner of a picture; what is no picture stays."""
    whole = tuple(value.shape[-2:]) == (HEIGHT, WIDTH)
    return value[..., -SMALL[HEIGHT] - 40 : -40, -SMALL[WIDTH] :] if whole else value


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.supports("sampler", name)) for name in UNUSUAL])
def test_the_latents_are_those_of_the_pipelines_own_loop(name: str) -> None:
    pipe = CASES[name].make()
    pipe.set_progress_bar_config(disable=True)
    expected = draw(name, pipe)
    assert relative_error(draw(name, OneDevice(pipe), sampler="sequential"), expected) <= 1e-6
    for knobs in ({"sampler": "picard"}, {"sampler": "taa", "window": 3}):
        assert relative_error(draw(name, OneDevice(pipe), tolerance=0.0, **knobs), expected) <= EXACT, knobs
    assert torch.equal(draw(name, pipe), expected), "nothing is left behind"


def test_every_pipeline_that_is_known_is_drawn_with() -> None:
    text = {"StableDiffusionXLPipeline", "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"}
    text |= {"PixArtAlphaPipeline", "PixArtSigmaPipeline"}  # test_sampled_runs.py
    assert {name.split(",")[0] for name in UNUSUAL} | text == FACTS.keys()


@pytest.mark.parametrize("scheduler", ["euler", "euler_ancestral", "dpmpp_2m", "heun", "unipc"])
@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_a_run_begins_at_a_later_step_of_every_scheduler(name: str, scheduler: str) -> None:
    pipe = own_copy(CASES[name].make())
    pipe.scheduler = SCHEDULERS[scheduler]()
    call = partial(draw, name, strength=0.6)
    expected = call(pipe)
    assert relative_error(call(OneDevice(pipe), sampler="sequential"), expected) <= 1e-6
    if scheduler not in ("heun", "unipc"):
        assert relative_error(call(OneDevice(pipe), sampler="picard", tolerance=0.0), expected) <= EXACT


@pytest.mark.parametrize("name", ["StableDiffusionXLInpaintPipeline", "FluxInpaintPipeline"])
def test_what_is_not_painted_is_known_from_the_first_call(name: str) -> None:
    pipe = CASES[name].make()
    pipe.set_progress_bar_config(disable=True)
    drawn = draw(name, pipe)
    seen: list[torch.Tensor] = []

    def look(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return tensors

    picture = draw(name, OneDevice(pipe), sampler="picard", window=3, callback_on_step_end=look)
    away = [(estimate - drawn).abs() > 1e-6 for estimate in seen]
    assert away[0].any() and not away[0].all()
    assert not any((later & ~away[0]).any() for later in away), "known places stay"
    assert relative_error(picture, drawn) <= 1e-3


def test_surroundings_that_are_not_put_back_are_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "StableDiffusionXLInpaintPipeline"
    pipe = CASES[name].make()
    expected = draw(name, pipe)
    monkeypatch.setattr("distrifusion.samplers.window._Window._with_known", lambda self, rows, states: states)
    assert relative_error(draw(name, OneDevice(pipe), sampler="picard", tolerance=0.0), expected) > 1e-2


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("StableDiffusionXLControlNetPipeline", "cfg2.patch2"),
        ("StableDiffusionXLControlNetPipeline, guess mode", "dp2"),
        ("StableDiffusionControlNetInpaintPipeline", "patch3"),
        ("StableDiffusionXLInpaintPipeline, 9 channels", "dp3"),
    ],
)
def test_rows_of_a_window_are_spread_over_the_ranks_of_a_plan(name: str, plan: str) -> None:
    pipe = CASES[name].make()
    call = partial(draw, name, sampler="picard", window=3, tolerance=1e-5)
    assert Ranks(pipe, plan).error(call, draw(name, own_copy(pipe), sampler=None)) <= 1e-4


@pytest.mark.parametrize("name", ["StableDiffusionXLInpaintPipeline", "StableDiffusionXLControlNetPipeline"])
def test_old_values_vanish_inside_a_window(name: str) -> None:
    pipe = CASES[name].make()
    # As many calls as steps at most, and random weights are a rough network.
    call = partial(draw, name, num_inference_steps=12)
    expected = call(own_copy(pipe))
    ranks = Ranks(pipe, "patch2.displaced.w0")
    stepping = ranks.error(call, expected)
    settled = ranks.error(partial(call, sampler="picard", tolerance=1e-6), expected)
    assert settled <= 1e-3 and settled < stepping / 3


BAD = {
    "the window": ({"window": 5, "strength": 0.5}, "window=5 is more than the 3 steps"),
    "part of a run": ({"denoising_start": 0.5}, "denoising_start= is not served"),
    "a control that ends": ({"control_guidance_end": 0.5}, "control_guidance_end= is not served"),
    "a control that begins": ({"control_guidance_start": [0.0, 0.2]}, "control_guidance_start= is not served"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_choices_are_errors_that_say_what_to_use(case: str) -> None:
    arguments, says = BAD[case]
    name = "StableDiffusionXLControlNetPipeline" if "control" in case else "StableDiffusionXLImg2ImgPipeline"
    with pytest.raises(ConfigError, match=says):
        draw(name, OneDevice(CASES[name].make()), sampler="taa", **arguments)


def test_a_variation_keeps_the_first_steps_that_are_left() -> None:
    name = "StableDiffusionXLImg2ImgPipeline"
    pipe = own_copy(CASES[name].make())
    first = draw(name, OneDevice(pipe), sampler="taa", tolerance=0.0, keep_trajectory=True)
    assert len(pipe._kept_trajectory) == 1 + 4, "strength 0.9 of 5 steps"
    again = draw(name, OneDevice(pipe), sampler="taa", tolerance=1e-5, variation_steps=4)
    assert relative_error(again, first) <= EXACT
    with pytest.raises(ConfigError, match="more than the 4 steps"):
        draw(name, OneDevice(pipe), sampler="taa", variation_steps=5)
