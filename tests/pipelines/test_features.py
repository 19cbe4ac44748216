"""What can be switched on a pipeline or given to its call: divided, it equals one device that has it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families import PIPELINES, noise, picture
from peft import LoraConfig
from ranks import EXACT, Ranks, own_copy

from distrifusion import ConfigError
from distrifusion.in_place import denoisers_of
from gloo.small_pipelines import SCHEDULERS
from models import relative_error


def nothing(pipe: Any) -> None:
    """No change."""


def free_u(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.6, s2=0.3, b1=1.3, b2=1.5)


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def sliced_attention(pipe: Any) -> None:
    pipe.enable_attention_slicing(1)


def sliced_decoder(pipe: Any) -> None:
    pipe.vae.enable_slicing()


def tiled_decoder(pipe: Any) -> None:
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 16, 128
    pipe.vae.enable_tiling()


def euler(pipe: Any) -> None:
    pipe.scheduler = SCHEDULERS["euler"]()


def double_latents(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * (1.5 if step == 1 else 1.0)}


def dimmed_in_place(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"].mul_(0.9)
    return tensors


@dataclass(frozen=True)
class Feature:
    """A change of the pipeline and the arguments of a call, and whether latents show it."""

    prepare: Callable[[Any], None] = nothing
    arguments: dict[str, Any] = field(default_factory=dict)
    changes: bool = True


FEATURES = {
    "FreeU": Feature(free_u),
    "guidance_rescale": Feature(arguments={"guidance_rescale": 0.7}),
    "clip_skip": Feature(arguments={"clip_skip": 1}),
    "custom timesteps": Feature(euler, {"timesteps": [900, 500, 80]}),
    "custom sigmas": Feature(euler, {"sigmas": [10.0, 3.0, 0.5]}),
    "size and crop conditions": Feature(
        arguments={"original_size": (512, 400), "crops_coords_top_left": (8, 16), "target_size": (300, 300)}
    ),
    "callback that returns other latents": Feature(arguments={"callback_on_step_end": double_latents}),
    "callback that changes latents in place": Feature(arguments={"callback_on_step_end": dimmed_in_place}),
    "attention slicing": Feature(sliced_attention, changes=False),
    "channels_last": Feature(channels_last, changes=False),
    "VAE slicing": Feature(
        sliced_decoder, {"output_type": "pt", "num_images_per_prompt": 2, "num_inference_steps": 1}, changes=False
    ),
    "VAE tiling": Feature(tiled_decoder, {"output_type": "pt", "num_inference_steps": 1}, changes=False),
}
SDXL, SD = "StableDiffusionXLPipeline", "StableDiffusionPipeline"
# With the tested transformers, clip_skip of SD 1.x fails in diffusers itself.
SDXL_ONLY = {"size and crop conditions", "clip_skip"}
BOTH = [
    pytest.param(family, name, marks=pytest.mark.supports("feature", name))
    for name in FEATURES
    for family in ([SDXL] if name in SDXL_ONLY else [SDXL, SD])
]


@cache
def plain(name: str) -> tuple[DiffusionPipeline, torch.Tensor]:
    """The pipeline of a case, which nobody changes, and what it gives on one device without a feature."""
    pipe = PIPELINES[name].make()
    return pipe, PIPELINES[name](own_copy(pipe))


@cache
def with_feature(family: str, name: str) -> torch.Tensor:
    """What one device gives that has a feature."""
    one = own_copy(plain(family)[0])
    FEATURES[name].prepare(one)
    return PIPELINES[family](one, **FEATURES[name].arguments)


@pytest.mark.parametrize("plan", ["patch3", "cfg2.patch2.columns"])
@pytest.mark.parametrize(("family", "name"), BOTH)
def test_a_feature_equals_one_device(family: str, name: str, plan: str) -> None:
    feature, reference = FEATURES[name], with_feature(family, name)
    pipe, without = plain(family)
    assert not feature.changes or relative_error(reference, without) > 1e-3
    ranks = Ranks(pipe, plan)
    ranks.each(feature.prepare)
    assert ranks.error(lambda own: PIPELINES[family](own, **feature.arguments), reference) <= EXACT


@pytest.mark.parametrize("plan", ["patch2", "patch4.columns", "patch2.displaced.w0"])
def test_freeu_is_switched_on_and_off_between_calls(plan: str) -> None:
    case = PIPELINES[SDXL]
    pipe, without = plain(SDXL)
    filtered = with_feature(SDXL, "FreeU")
    ranks = Ranks(pipe, plan)
    bound = EXACT if ranks.plan.exact else 0.3
    assert relative_error(filtered, without) > bound
    for change, reference in ((nothing, without), (free_u, filtered), (lambda p: p.disable_freeu(), without)):
        ranks.each(change)
        assert ranks.error(case, reference) <= bound


def test_freeu_across_a_picture_one_latent_wide() -> None:
    """There is no wave across it; the filter of one device scales the constant alone."""
    case = PIPELINES["StableDiffusionPipeline"]
    pipe = case.make()
    one = own_copy(pipe)
    free_u(one)
    narrow = {"width": 8, "height": 264}
    ranks = Ranks(pipe, "patch3")
    ranks.each(free_u)
    assert ranks.error(lambda p: case(p, **narrow), case(one, **narrow)) <= EXACT


@pytest.mark.supports("feature", "prompt_embeds")
@pytest.mark.parametrize("plan", ["patch3", "cfg2"])
def test_prompts_as_tensors(plan: str) -> None:
    case = PIPELINES["StableDiffusionXLPipeline"]
    embeds = {
        "prompt": None,
        "prompt_embeds": noise(2, 16, 24, seed=1),
        "negative_prompt_embeds": noise(2, 16, 24, seed=2),
        "pooled_prompt_embeds": noise(2, 16, seed=3),
        "negative_pooled_prompt_embeds": noise(2, 16, seed=4),
    }
    pipe = case.make()
    reference = case(own_copy(pipe), **embeds)
    assert reference.shape[0] == 2
    assert Ranks(pipe, plan).error(lambda p: case(p, **embeds), reference) <= EXACT


WITH_CONTROL = "StableDiffusionXLControlNetPipeline"
CONTROL = PIPELINES[WITH_CONTROL]
CHANGES: dict[str, dict[str, Any]] = {
    ", ".join(change): change
    for change in (
        {"controlnet_conditioning_scale": 0.0},
        {"image": picture(seed=3)},
        {"control_guidance_start": 0.5},
        {"control_guidance_end": 0.5},
        {"guess_mode": True, "guidance_scale": 1.0},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"prompt": ["a lake", "a hill"], "image": [picture(seed=3)[0], picture(seed=4)[0]]},
    )
}


@cache
def controlled(name: str) -> torch.Tensor:
    """What one device gives with a change of what is said to its ControlNet."""
    return CONTROL(own_copy(plain(WITH_CONTROL)[0]), **CHANGES[name])


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("plan", ["patch3.columns", "cfg2.patch2"])
def test_what_is_said_to_a_controlnet_reaches_it(plan: str, name: str) -> None:
    change, reference = CHANGES[name], controlled(name)
    pipe, without = plain(WITH_CONTROL)
    if not change.keys() & {"num_images_per_prompt", "prompt"}:
        assert relative_error(reference, without) > 1e-3
    assert Ranks(pipe, plan).error(lambda p: CONTROL(p, **change), reference) <= EXACT


def test_a_controlnets_own_adapter_reaches_its_image_too() -> None:
    pipe = CONTROL.make()
    plain = CONTROL(own_copy(pipe))
    torch.manual_seed(0)
    layers = ["controlnet_cond_embedding.conv_in", "blocks.1", "blocks.4", "conv1", "to_q"]
    pipe.controlnet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    reference = CONTROL(own_copy(pipe))
    assert relative_error(reference, plain) > 1e-3
    assert Ranks(pipe, "patch3").error(CONTROL, reference) <= EXACT


def test_a_controlnets_residuals_are_not_joined_where_the_unet_is_divided_alike() -> None:
    """Only its layers' own exchanges are sent; in guess mode its residuals are."""
    ranks = Ranks(CONTROL.make(), "patch2")
    ranks.draw(CONTROL)
    unet, net = denoisers_of(ranks.pipes[0])
    assert unet.exchange.bytes_sent["exit"] > 0
    assert net.exchange.bytes_sent["kv"] > 0 and net.exchange.bytes_sent["exit"] == 0
    ranks.draw(lambda pipe: CONTROL(pipe, guess_mode=True))
    assert net.exchange.bytes_sent["exit"] > 0


def test_residuals_that_could_be_of_two_resolutions_are_refused() -> None:
    """One latent across, half of the finest resolution has the size of the whole of the next."""
    narrow = {"image": picture(32, 8), "height": 32, "width": 8}
    with pytest.raises(ConfigError, match="one latent across need a plan without bands"):
        Ranks(CONTROL.make(), "patch2").draw(lambda pipe: CONTROL(pipe, **narrow))


def test_a_control_image_of_another_size_is_named() -> None:
    case = PIPELINES["StableDiffusionControlNetPipeline"]
    ranks = Ranks(case.make(), "patch2")

    def call(pipe: Any) -> None:
        denoisers_of(pipe)[1].open("request")
        pipe.controlnet(noise(1, 4, 25, 17), 5, noise(1, 7, 24), controlnet_cond=noise(1, 3, 96, 136))

    with pytest.raises(ConfigError, match="control image of 96 pixels gives 12 latents"):
        ranks.draw(call)
