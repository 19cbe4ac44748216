"""Samplers on a loaded pipeline: one device and workers draw the same, and are watched and cancelled as ever."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionXLPipeline

from distrifusion import Cancelled, load
from distrifusion.errors import ConfigError
from distrifusion.runtime import call_checks
from distrifusion.runtime.pipeline import LoadedPipeline
from distrifusion.runtime.source import PipelineFacts
from models import relative_error

STEPS = 8


@pytest.fixture(params=["one device", "two workers"])
def pipe(sdxl_folder: Path, request: pytest.FixtureRequest) -> Iterator[LoadedPipeline]:
    if request.param == "two workers":
        yield request.getfixturevalue("two")
        return
    with load(sdxl_folder, devices=1) as pipe:
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(7), "output_type": "latent"}
    return pipe("a lake", **{**given, **arguments}).images


def test_it_draws_what_one_device_draws_step_by_step(pipe: LoadedPipeline, one: Any) -> None:
    expected = draw(one, eta=0.5)
    assert relative_error(draw(pipe, eta=0.5, sampler="taa", tolerance=1e-6), expected) <= 1e-5
    assert pipe.last_run is not None and len(pipe.last_run.steps) <= STEPS
    assert relative_error(draw(pipe, eta=0.5, sampler="picard", window=3), expected) <= 1e-3
    assert relative_error(draw(pipe, eta=0.5), expected) <= 1e-5, "nothing is left behind"


def test_a_callback_hears_of_every_call_and_may_look_around(pipe: LoadedPipeline, one: Any) -> None:
    seen: list[tuple[int, float]] = []
    expected = draw(one)

    def look(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert len(pipe.scheduler.timesteps) == STEPS
        seen.append((step, relative_error(tensors["latents"], expected)))
        return tensors

    draw(pipe, sampler="picard", tolerance=1e-4, callback_on_step_end=look)
    assert [step for step, _ in seen] == list(range(len(seen)))
    assert len(seen) <= STEPS
    assert seen[-1][1] < 1e-2 and seen[-1][1] < seen[0][1]


def test_it_is_cancelled_between_two_calls(pipe: LoadedPipeline, one: Any) -> None:
    def cancel(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.cancel()
        return tensors

    with pytest.raises(Cancelled) as error:
        draw(pipe, sampler="picard", window=2, callback_on_step_end=cancel)
    assert error.value.step in (1, 2)
    assert relative_error(draw(pipe, sampler="taa", tolerance=1e-6), draw(one)) <= 1e-5


def test_a_kept_run_is_a_start_for_the_next(pipe: LoadedPipeline) -> None:
    first = draw(pipe, sampler="taa", tolerance=1e-6, keep_trajectory=True)
    again = draw(pipe, sampler="taa", tolerance=1e-5, variation_steps=STEPS)
    assert relative_error(again, first) <= 1e-5
    assert pipe.last_run is not None and len(pipe.last_run.steps) == 1


def test_a_scheduler_that_cannot_serve_a_sampler_is_refused_by_name(pipe: LoadedPipeline) -> None:
    before = pipe.scheduler
    clipping = type(before).from_config(before.config, clip_sample=True)
    for scheduler, says in (
        (HeunDiscreteScheduler.from_config(before.config), "HeunDiscreteScheduler is not known as a map"),
        (clipping, "clip_sample=True cannot be solved in parallel"),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(ConfigError, match=says):
            draw(pipe, sampler="picard")
    pipe.scheduler = before


def test_few_steps_are_warned_of() -> None:
    facts = PipelineFacts(StableDiffusionXLPipeline, 8)
    with pytest.warns(UserWarning, match="few of 8 denoiser calls"):
        call_checks.check(facts, {"num_inference_steps": 8, "sampler": "picard"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_checks.check(facts, {"num_inference_steps": 50, "sampler": "picard"})
        call_checks.check(facts, {"num_inference_steps": 8, "sampler": "sequential"})
        call_checks.check(facts, {"num_inference_steps": 8})


def test_bad_choices_are_errors_before_a_rank_begins(pipe: LoadedPipeline) -> None:
    for arguments, says in (
        ({"sampler": "ta"}, "did you mean 'taa'"),
        ({"samplr": "taa"}, "did you mean sampler="),
        ({"window": 3}, "window= is a choice of sampler="),
        ({"sampler": "taa", "window": STEPS + 1}, f"use at most {STEPS}"),
        ({"sampler": "taa", "tolerance": 0.0, "denoising_end": 0.5}, "denoising_end= is not served"),
    ):
        with pytest.raises(ConfigError, match=says):
            draw(pipe, **arguments)
