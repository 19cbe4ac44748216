"""Samplers inside the true pipelines: the plain one equals diffusers' own loop, windows end at the same picture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from one_device import OneDevice
from ranks import EXACT, Ranks, own_copy
from transformer_families import PIPELINES

from distrifusion.errors import ConfigError, PlanError, PoolTooLarge
from distrifusion.memory import check as memory_check
from distrifusion.memory.prediction import pool_bytes
from gloo.small_pipelines import SCHEDULERS, Call, sd_pipeline, sdxl_pipeline
from models import relative_error

LOOPS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc")
WINDOWED = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
NO_MAPS = ("heun", "pndm", "lcm", "unipc")
TRANSFORMERS = (
    "StableDiffusion3Pipeline",
    "FluxPipeline, dev",
    "FluxPipeline, true guidance",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
)
SMALL = {"height": 72, "width": 56, "num_inference_steps": 6, "prompt": ["a calm lake", "a wild sea"]}
Draw = Callable[..., torch.Tensor]


class Bar(AbstractContextManager["Bar"]):
    """A progress bar that only counts."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.count = 0

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        self.count += 1


@cache
def unet_pipeline(name: str, scheduler: str) -> DiffusionPipeline:
    return (sdxl_pipeline if name == "sdxl" else sd_pipeline)(scheduler)


def drawing(pipe: Any, **arguments: Any) -> torch.Tensor:
    """Latents of two pictures."""
    return Call({**SMALL, **arguments}, generator=4)(pipe)


@pytest.mark.parametrize("name", ["sdxl", "sd"])
@pytest.mark.parametrize("scheduler", LOOPS)
def test_the_plain_sampler_is_the_pipelines_own_loop(name: str, scheduler: str) -> None:
    pipe = unet_pipeline(name, scheduler)
    before = pipe.scheduler
    expected = drawing(pipe)
    assert relative_error(drawing(OneDevice(pipe), sampler="sequential"), expected) <= 1e-6
    assert pipe.scheduler is before
    assert not {"prepare_latents", "forward"} & {*vars(pipe), *vars(pipe.unet)}
    assert torch.equal(drawing(pipe), expected), "nothing is left behind"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sdxl", marks=pytest.mark.supports("sampler", "StableDiffusionXLPipeline")),
        pytest.param("sd", marks=pytest.mark.supports("sampler", "StableDiffusionPipeline")),
    ],
)
@pytest.mark.parametrize("scheduler", WINDOWED)
def test_windows_of_steps_give_the_same_latents(name: str, scheduler: str) -> None:
    pipe = unet_pipeline(name, scheduler)
    more = {"eta": 0.8} if scheduler == "ddim" else {}
    expected = drawing(pipe, **more)
    for knobs in ({"sampler": "taa"}, {"sampler": "picard", "window": 4, "split": "delta"}):
        # Random weights are a rough network: the tolerance is what it takes, six calls at most.
        assert relative_error(drawing(OneDevice(pipe), tolerance=1e-6, **knobs, **more), expected) <= EXACT


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.supports("sampler", name)) for name in TRANSFORMERS]
)
def test_transformers_give_the_same_latents(name: str) -> None:
    case = PIPELINES[name]
    pipe = case.make()
    pipe.set_progress_bar_config(disable=True)
    expected = case(pipe, num_inference_steps=5)
    ways = ({"sampler": "sequential"}, {"sampler": "taa", "tolerance": 0.0}, {"sampler": "picard", "window": 2})
    for knobs in ways:
        assert relative_error(case(OneDevice(pipe), num_inference_steps=5, **knobs), expected) <= EXACT, knobs


@pytest.mark.parametrize("plan", ["dp2", "cfg2.dp2", "patch3", "cfg2.patch2", "dp3", "tp2", "async2.sync"])
def test_rows_of_a_window_are_spread_over_the_ranks_of_a_plan(plan: str) -> None:
    pipe = unet_pipeline("sdxl", "ddim")
    draw = partial(drawing, prompt="a calm lake", sampler="taa", window=5, tolerance=1e-5)
    assert Ranks(pipe, plan).error(draw, draw(OneDevice(own_copy(pipe)))) <= EXACT


@pytest.mark.parametrize("plan", ["ulysses2", "dp2.patch2", "pipe2.sync"])
def test_rows_of_a_window_are_spread_over_the_ranks_of_a_transformers_plan(plan: str) -> None:
    case = PIPELINES["FluxPipeline, dev"]
    pipe = case.make()
    draw = partial(case, num_inference_steps=5, sampler="picard", tolerance=1e-5)
    assert Ranks(pipe, plan).error(draw, draw(OneDevice(own_copy(pipe)))) <= EXACT


def test_random_numbers_after_a_run_are_those_after_diffusers_own() -> None:
    pipe = unet_pipeline("sdxl", "euler_ancestral")
    states = []
    for knobs in ({}, {"sampler": "taa"}, {"sampler": "sequential"}):
        generator = torch.Generator().manual_seed(1)
        drawing(OneDevice(pipe), generator=generator, **knobs)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_the_bar_counts_calls_and_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = own_copy(unet_pipeline("sdxl", "ddim"))
    bars: list[Bar] = []

    def bar(total: int) -> Bar:
        bars.append(Bar(total))
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", bar)
    for knobs, counted in (({"max_calls": 4}, 4), ({"window": 1}, 6)):
        drawing(OneDevice(pipe), sampler="picard", **knobs)
        assert (bars[-1].total, bars[-1].count) == (6, counted)


def test_callbacks_see_estimates_and_may_stop_a_run() -> None:
    pipe = unet_pipeline("sdxl", "ddim")
    expected = drawing(pipe)
    away: list[float] = []

    def look(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        away.append(relative_error(tensors["latents"], expected))
        pipe._interrupt = step == 3
        return tensors

    stopped = drawing(OneDevice(pipe), sampler="picard", callback_on_step_end=look)
    assert len(away) == 4
    assert relative_error(stopped, expected) == away[-1]
    early = drawing(OneDevice(pipe), sampler="picard", max_calls=4)
    assert torch.equal(early, stopped)


def test_a_callback_that_changes_latents_is_refused() -> None:
    pipe = unet_pipeline("sdxl", "ddim")

    def in_place(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["latents"] += 1
        return tensors

    def others(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] + 1}

    for change in (in_place, others):
        with pytest.raises(ConfigError, match="a callback changed the latents"):
            drawing(OneDevice(pipe), sampler="taa", callback_on_step_end=change)


def test_a_kept_run_is_a_start_for_the_next() -> None:
    pipe = own_copy(unet_pipeline("sdxl", "ddim"))
    first = drawing(OneDevice(pipe), sampler="taa", tolerance=1e-6, keep_trajectory=True)
    kept = pipe._kept_trajectory
    assert torch.equal(kept[-1], first)
    calls: list[int] = []

    def count(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(step)
        return tensors

    again = drawing(OneDevice(pipe), sampler="taa", variation_steps=6, tolerance=1e-5, callback_on_step_end=count)
    assert calls == [0] and relative_error(again, first) <= EXACT
    varied = drawing(OneDevice(pipe), sampler="taa", variation_steps=2, prompt=["a hill", "fog"], keep_trajectory=True)
    assert torch.equal(pipe._kept_trajectory[:5], kept[:5])
    assert relative_error(varied, first) > 1e-4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "sampler": ({"sampler": "piccard"}, "did you mean 'picard'"),
    "alone": ({"window": 4}, "window= is a choice of sampler="),
    "window": ({"sampler": "taa", "window": 7}, "window=7 is more than the 6 steps"),
    "tolerance": ({"sampler": "taa", "tolerance": -1.0}, "tolerance=-1.0 must be"),
    "memory": ({"sampler": "picard", "memory": 2}, "is of sampler='taa'"),
    "sequential": ({"sampler": "sequential", "window": 2}, "one step after the other"),
    "end": ({"sampler": "taa", "denoising_end": 0.5}, "denoising_end= is not served"),
    "variation": ({"sampler": "taa", "variation_steps": 7}, "more than the 6 steps"),
    "kept": ({"sampler": "taa", "variation_steps": 2}, "keep_trajectory=True first"),
    "keep": ({"sampler": "taa", "keep_trajectory": 1}, "must be True or False"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_choices_are_errors_that_say_what_to_use(name: str) -> None:
    arguments, says = BAD[name]
    with pytest.raises(ConfigError, match=says):
        drawing(OneDevice(own_copy(unet_pipeline("sdxl", "ddim"))), **arguments)


def test_what_cannot_be_solved_together_is_refused_by_name_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = own_copy(unet_pipeline("sdxl", "ddim"))
    monkeypatch.setattr(pipe, "encode_prompt", lambda **arguments: pytest.fail("work before the refusal"))
    unsuitable = {f"{type(SCHEDULERS[name]()).__name__} is not known as a map": SCHEDULERS[name] for name in NO_MAPS}
    unsuitable["clip_sample=True cannot be solved"] = diffusers.DDIMScheduler
    for says, make in unsuitable.items():
        pipe.scheduler = make()
        with pytest.raises(ConfigError, match=says):
            drawing(OneDevice(pipe), sampler="picard")
    perturbed = diffusers.AutoPipelineForText2Image.from_pipe(unet_pipeline("sdxl", "ddim"), enable_pag=True)
    with pytest.raises(ConfigError, match="StableDiffusionXLPAGPipeline has no known loop"):
        OneDevice(perturbed)(prompt="a lake", sampler="taa")


@pytest.mark.parametrize("plan", ["cfg2.patch2.displaced.w0", "patch3.delta2", "async2.w0"])
def test_old_values_vanish_inside_a_window(plan: str) -> None:
    pipe = unet_pipeline("sdxl", "ddim")
    draw = partial(drawing, prompt="a calm lake", num_inference_steps=12)
    expected = draw(own_copy(pipe))
    ranks = Ranks(pipe, plan)
    stepping = ranks.error(draw, expected)
    settled = ranks.error(partial(draw, sampler="picard", tolerance=1e-6), expected)
    assert settled <= 1e-4 and settled < stepping / 10


def test_what_a_window_keeps_is_limited_before_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(unet_pipeline("sdxl", "ddim"), "patch2.displaced.w0")
    draw = partial(drawing, prompt="a calm lake", sampler="picard")
    free = sum(
        sum(pool_bytes(pipe.unet, ranks.plan, rank, (2, 4, 9, 7), torch.float32).values())
        for rank, pipe in enumerate(ranks.pipes)
    )
    monkeypatch.setattr(memory_check, "free_bytes", lambda device, wanted: free)
    ranks.draw(partial(draw, window=1))
    with pytest.raises(PoolTooLarge) as error:
        ranks.draw(partial(draw, window=6))
    assert error.value.needed == 6 * free


def test_a_plan_that_never_exchanges_is_refused() -> None:
    ranks = Ranks(unet_pipeline("sdxl", "ddim"), "cfg2.patch2.naive")
    with pytest.raises(PlanError, match=r"use 'cfg2\.patch2', or sampler='sequential'"):
        ranks.pipes[0](sampler="taa", **SMALL)
