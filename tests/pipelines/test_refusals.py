"""What cannot be divided exactly is refused by name with the remedy; other tools' hooks and ours keep apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import UNetControlNetXSModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from families import IMAGE_PROMPTS, PIPELINES, SD_BLOCKS, build, mask
from ranks import EXACT, Ranks, own_copy

from distrifusion import ConfigError, PlanError, UnsupportedModel, parallelize, unparallelize
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from models import sd_unet

TEXT = PIPELINES["StableDiffusionPipeline"]
CONTROL = PIPELINES["StableDiffusionControlNetPipeline"]


@pytest.fixture
def pipe() -> DiffusionPipeline:
    return own_copy(TEXT.make())  # plain pipelines share modules


def divide(pipe: Any, plan: str = "patch2") -> Any:
    """Parallelize as the first of two ranks; nothing is sent until a call."""
    return parallelize(pipe, plan, VirtualTransport(VirtualWorld(2), 0))


def untouched(pipe: Any) -> bool:
    return not any("forward" in vars(module) for module in pipe.unet.modules())


def fused(pipe: Any) -> None:
    pipe.fuse_qkv_projections(vae=False)


def compiled_in_place(pipe: Any) -> None:
    pipe.unet.compile()


def compiled_blocks(pipe: Any) -> None:
    pipe.unet.compile_repeated_blocks()


def moved_layer_by_layer(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def moved_in_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "fuse_qkv_projections": (fused, r"unfuse_qkv_projections\(\) first"),
    "unet.compile()": (compiled_in_place, "parallelize without torch.compile"),
    "unet.compile_repeated_blocks()": (compiled_blocks, "parallelize without torch.compile"),
    "sequential CPU offload": (moved_layer_by_layer, "sequential CPU offload moves its weights|CPU offload hook"),
    "group offload": (moved_in_groups, "remove them"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_before_is_refused_and_nothing_is_replaced(pipe: DiffusionPipeline, name: str) -> None:
    change, remedy = CHANGES[name]
    change(pipe)
    before = {n: vars(m).get("forward") for n, m in pipe.unet.named_modules()}
    with pytest.raises((UnsupportedModel, ConfigError), match=remedy):
        divide(pipe)
    assert {n: vars(m).get("forward") for n, m in pipe.unet.named_modules()} == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_is_refused_by_the_next_call(pipe: DiffusionPipeline, name: str) -> None:
    change, remedy = CHANGES[name]
    divide(pipe)
    change(pipe)
    with pytest.raises((UnsupportedModel, ConfigError), match=remedy):
        TEXT(pipe)


def test_a_compiled_unet_is_refused_before_and_after(pipe: DiffusionPipeline) -> None:
    plain = pipe.unet
    pipe.unet = torch.compile(plain)
    with pytest.raises(UnsupportedModel, match=r"parallelize without torch\.compile"):
        divide(pipe)
    pipe.unet = plain
    divide(pipe)
    pipe.unet = torch.compile(plain)
    with pytest.raises(ConfigError, match="was replaced after parallelize"):
        TEXT(pipe)
    pipe.unet = plain
    assert untouched(unparallelize(pipe))


def test_a_replaced_controlnet_is_named_and_a_new_division_takes_it() -> None:
    pipe = divide(own_copy(CONTROL.make()))
    pipe.controlnet = own_copy(CONTROL.make()).controlnet
    with pytest.raises(ConfigError, match="controlnet or vae of this pipeline was replaced"):
        CONTROL(pipe)
    divide(unparallelize(pipe))
    assert "forward" in vars(pipe.controlnet)


@pytest.mark.supports("feature", "CPU offload of whole models, enabled after")
def test_offload_of_whole_models_lies_around_the_division() -> None:
    """What enable_model_cpu_offload does to every model, on the only device here."""
    pipe = CONTROL.make()
    reference = CONTROL(own_copy(pipe))
    ranks = Ranks(pipe, "patch3")

    def offload(own: Any) -> None:
        for model in (own.unet, own.controlnet):
            _, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
            own._all_hooks = [*getattr(own, "_all_hooks", ()), hook]

    ranks.each(offload)
    for own in ranks.pipes:
        own.maybe_free_model_hooks = lambda: None  # would ask for an accelerator to go on with
    assert ranks.error(CONTROL, reference) <= EXACT
    with pytest.raises(ConfigError, match=r"remove_all_hooks\(\) first"):
        unparallelize(ranks.pipes[0])
    for own in ranks.pipes:
        for model in (own.unet, own.controlnet):
            accelerate.hooks.remove_hook_from_module(model)
        assert untouched(unparallelize(own))


def test_offload_of_whole_models_before_is_refused_with_the_order_that_works(pipe: DiffusionPipeline) -> None:
    accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    with pytest.raises(ConfigError, match="then parallelize, and enable the offload afterwards"):
        divide(pipe)


def test_a_forward_of_another_tool_in_place_of_ours_is_named(pipe: DiffusionPipeline) -> None:
    divide(pipe)
    pipe.unet.forward = lambda *args, **kwargs: None
    with pytest.raises(ConfigError, match="is no longer the divided one"):
        TEXT(pipe)


def test_masks_of_image_prompts_are_refused_by_name() -> None:
    case = IMAGE_PROMPTS["IP-Adapter on SDXL"]
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [mask()[0]]}}
    with pytest.raises(ConfigError, match="ip_adapter_masks have no rule for bands"):
        Ranks(case.make(), "patch2").draw(lambda own: case(own, **masked))


def test_perturbed_attention_under_a_batch_that_is_cut_names_the_plan_that_works() -> None:
    pipe = own_copy(PIPELINES["StableDiffusionXLPAGPipeline"].make())
    with pytest.raises(PlanError, match="use 'patch2'"):
        divide(pipe, "cfg2")
    assert untouched(pipe)


def test_an_attention_processor_that_the_run_itself_puts_on_is_refused() -> None:
    """Self-attention guidance reads a whole map of attention, and says so only within its run."""
    pipe = divide(own_copy(build(diffusers.StableDiffusionSAGPipeline, "sd", safety_checker=None)))
    with pytest.raises(UnsupportedModel, match="CrossAttnStoreProcessor"):
        TEXT(pipe, sag_scale=0.7)


def blur(stack: Any) -> None:
    stack.blocks[2] = torch.nn.AvgPool2d(3, stride=1, padding=1)


def circular(stack: Any) -> None:
    stack.blocks[2].padding_mode = "circular"


def compiled(stack: Any) -> None:
    stack.blocks[2].compile()


@pytest.mark.parametrize("change", [blur, circular, compiled])
def test_a_layer_that_reads_a_control_image_by_its_own_rule_is_named(change: Callable[[Any], None]) -> None:
    pipe = own_copy(CONTROL.make())
    change(pipe.controlnet.controlnet_cond_embedding)
    with pytest.raises(UnsupportedModel, match=r"controlnet\.0: layer 'controlnet_cond_embedding\.blocks\.2'"):
        divide(pipe)
    assert untouched(pipe)


def test_gligen_is_refused_by_its_layer() -> None:
    """Its gated layers attend to the picture and to boxes together."""
    unet = sd_unet(attention_type="gated", **SD_BLOCKS)
    pipe = own_copy(build(diffusers.StableDiffusionGLIGENPipeline, "sd", unet=unet, safety_checker=None))
    with pytest.raises(UnsupportedModel, match=r"transformer_blocks\.0\.fuser' \(GatedSelfAttentionDense\)"):
        divide(pipe)


def test_controlnet_xs_is_refused_by_its_name(pipe: DiffusionPipeline) -> None:
    unet = sd_unet(layers_per_block=2, **SD_BLOCKS)
    side = ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, num_attention_heads=2)
    joined = UNetControlNetXSModel.from_unet(unet, side)
    pipe.unet = joined
    with pytest.raises(UnsupportedModel, match="UNetControlNetXSModel has no anatomy here"):
        divide(pipe)
