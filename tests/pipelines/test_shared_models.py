"""Pipelines that share models: from_pipe, base and refiner, one within the other's callback."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from families import PIPELINES, SDXL_BLOCKS, base, build, control
from ranks import EXACT, Ranks, own_copy

from distrifusion import ConfigError, UnsupportedModel, parallelize, unparallelize
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.in_place import denoiser_of
from models import relative_error, sdxl_unet

TEXT = PIPELINES["StableDiffusionXLPipeline"]
IMAGE = PIPELINES["StableDiffusionXLImg2ImgPipeline"]
PAINT = PIPELINES["StableDiffusionXLInpaintPipeline"]
CONTROL = PIPELINES["StableDiffusionXLControlNetPipeline"]


def with_control(pipe: Any) -> DiffusionPipeline:
    return StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=control("sdxl"))


MADE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "AutoPipelineForImage2Image.from_pipe": (AutoPipelineForImage2Image.from_pipe, IMAGE),
    "AutoPipelineForInpainting.from_pipe": (AutoPipelineForInpainting.from_pipe, PAINT),
    "DiffusionPipeline.from_pipe": (StableDiffusionXLInpaintPipeline.from_pipe, PAINT),
    "from_pipe with a ControlNet": (with_control, CONTROL),
}


@pytest.fixture(scope="module")
def plain() -> DiffusionPipeline:
    return TEXT.make()


def divided(pipe: Any) -> bool:
    return any("forward" in vars(module) for module in pipe.unet.modules())


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.supports("feature", name)) for name in MADE])
def test_a_pipeline_made_of_a_parallelized_one_is_parallelized_too(plain: DiffusionPipeline, name: str) -> None:
    make, case = MADE[name]
    reference, text = case(make(own_copy(plain))), TEXT(own_copy(plain))
    ranks = Ranks(plain, "patch3")
    made = ranks.derive(make)
    assert all(one.unet is other.unet for one, other in zip(made, ranks.pipes, strict=True))
    assert ranks.error(case, reference, made) <= EXACT
    assert ranks.error(TEXT, text) <= EXACT


@pytest.mark.supports("feature", "AutoPipelineForText2Image.from_pipe")
def test_the_way_back_to_text(plain: DiffusionPipeline) -> None:
    ranks = Ranks(IMAGE.make(), "patch2")
    made = ranks.derive(AutoPipelineForText2Image.from_pipe)
    assert ranks.error(TEXT, TEXT(own_copy(plain)), made) <= EXACT


def test_a_displaced_plan_goes_on_in_a_made_pipeline(plain: DiffusionPipeline) -> None:
    """The requests are those of the pipeline that is called: its state begins anew and ends with its run."""
    ranks = Ranks(plain, "patch2.displaced.w0")
    made = ranks.derive(AutoPipelineForImage2Image.from_pipe)
    error = ranks.error(IMAGE, IMAGE(AutoPipelineForImage2Image.from_pipe(own_copy(plain))), made)
    assert EXACT < error < 0.1
    assert all(denoiser_of(pipe).pool.num_requests == 0 for pipe in made)


def test_a_made_pipeline_that_nobody_parallelized_is_refused_with_the_remedy(plain: DiffusionPipeline) -> None:
    ranks = Ranks(plain, "patch2")
    made = ranks.each(AutoPipelineForImage2Image.from_pipe)
    with pytest.raises(ConfigError, match=r"parallelize\(pipe, plan\) on the pipeline that calls it"):
        ranks.draw(IMAGE, made)


def test_another_plan_for_a_shared_model_is_refused(plain: DiffusionPipeline) -> None:
    ranks = Ranks(plain, "patch2")
    ranks.plan = type(ranks.plan).parse("cfg2")
    with pytest.raises(ConfigError, match="divided by plan 'patch2' for another pipeline"):
        ranks.derive(AutoPipelineForImage2Image.from_pipe)
    ranks.each(unparallelize)
    assert not divided(ranks.pipes[0])


def test_the_last_pipeline_that_is_restored_restores_the_shared_model(plain: DiffusionPipeline) -> None:
    ranks = Ranks(plain, "patch2")
    made = ranks.derive(AutoPipelineForImage2Image.from_pipe)
    ranks.each(unparallelize)
    reference = IMAGE(AutoPipelineForImage2Image.from_pipe(own_copy(plain)))
    assert ranks.error(IMAGE, reference, made) <= EXACT
    for pipe in made:
        unparallelize(pipe)
    assert not any(divided(pipe) for pipe in made)


def test_a_made_pipeline_that_is_gone_holds_nothing(plain: DiffusionPipeline) -> None:
    ranks = Ranks(plain, "patch2")
    ranks.derive(AutoPipelineForImage2Image.from_pipe)
    gc.collect()
    ranks.each(unparallelize)
    assert not any(divided(pipe) for pipe in ranks.pipes)


def test_the_plan_of_a_pipeline_that_is_gone_does_not_bind(plain: DiffusionPipeline) -> None:
    ranks = Ranks(plain, "patch2")
    made = ranks.each(AutoPipelineForImage2Image.from_pipe)
    ranks.pipes.clear()
    gc.collect()
    pairs = zip(made, ranks.transports, strict=True)
    again = [parallelize(pipe, "cfg2", transport) for pipe, transport in pairs]
    reference = IMAGE(AutoPipelineForImage2Image.from_pipe(own_copy(plain)))
    assert ranks.error(IMAGE, reference, again) <= EXACT
    assert str(denoiser_of(again[0]).plan) == "cfg2"


def test_a_failed_division_of_the_controlnet_restores_the_unet() -> None:
    pipe = CONTROL.make()
    pipe.controlnet.mid_block.resnets[0].conv1.padding_mode = "circular"
    broken = own_copy(pipe)
    with pytest.raises(UnsupportedModel, match=r"mid_block\.resnets\.0\.conv1"):
        parallelize(broken, "patch2", VirtualTransport(VirtualWorld(2), 0))
    assert not divided(broken)


def refiner() -> StableDiffusionXLImg2ImgPipeline:
    """A refiner: the second text encoder alone, an aesthetic score in the place of the target size."""
    unet = sdxl_unet(**SDXL_BLOCKS, cross_attention_dim=16, projection_class_embeddings_input_dim=16 + 5 * 8)
    shared = {name: base("sdxl")[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")}
    changes = {"unet": unet, "text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True, **shared}
    return build(StableDiffusionXLImg2ImgPipeline, "sdxl", **changes)


@pytest.mark.supports("pipeline", "SDXL base and refiner")
@pytest.mark.parametrize("plan", ["patch3", "cfg2", "patch2.displaced.w0"])
def test_base_and_refiner_split_the_steps(plain: DiffusionPipeline, plan: str) -> None:
    first = partial(TEXT, num_inference_steps=5, denoising_end=0.6)
    last = {"num_inference_steps": 5, "denoising_start": 0.6, "strength": 0.3}
    second = refiner()
    middle = first(own_copy(plain))
    reference = IMAGE(own_copy(second), image=middle, **last)
    assert relative_error(reference, middle) > 1e-2
    bases, refiners = Ranks(plain, plan), Ranks(second, plan)

    by_rank = bases.draw(first)
    assert all(torch.equal(latents, by_rank[0]) for latents in by_rank)
    error = refiners.error(lambda pipe: IMAGE(pipe, image=by_rank[0], **last), reference)
    assert error <= EXACT if refiners.plan.exact else 0 < error < 0.1


def test_a_callback_runs_another_pipeline_on_the_shared_model(plain: DiffusionPipeline) -> None:
    """Its request lies within the first one's, whose kept values are not touched."""

    def call(pipe: Any, other: Any) -> torch.Tensor:
        def preview(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1 and other is not None:
                IMAGE(other, num_inference_steps=2)
            return tensors

        return TEXT(pipe, num_inference_steps=4, callback_on_step_end=preview)

    alone = Ranks(plain, "patch2.displaced.w0")
    without = alone.draw(lambda pipe: call(pipe, None))
    ranks = Ranks(plain, "patch2.displaced.w0")
    made = ranks.derive(AutoPipelineForImage2Image.from_pipe)
    for pipe in made:
        pipe.scheduler = copy.deepcopy(pipe.scheduler)  # in diffusers too, one scheduler cannot serve two runs at once
        pipe.set_progress_bar_config(disable=True)
    within = ranks.world.run(lambda transport: call(ranks.pipes[transport.rank], made[transport.rank]))
    assert all(torch.equal(one, other) for one, other in zip(within, without, strict=True))
