"""A layer that mixes positions and has no rule is named before anything is replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from distrifusion import ConfigError, Plan, UnsupportedModel
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from models import sd_unet, sdxl_unet, unet_inputs


class Blur(nn.Module):
    """A layer of somebody's own, in which every position sees its neighbours."""

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 3, stride=1, padding=1)


class GridProcessor:
    """An attention processor of somebody's own."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def unknown_layer(unet: UNet2DConditionModel) -> str:
    unet.down_blocks[0].resnets[0].conv2 = Blur()
    return "down_blocks.0.resnets.0.conv2"


def unknown_child(unet: UNet2DConditionModel) -> str:
    unet.mid_block.add_module("blur", Blur())
    return "mid_block.blur"


def pooling(unet: UNet2DConditionModel) -> str:
    unet.mid_block.resnets[1].nonlinearity = nn.AvgPool2d(3, stride=1, padding=1)
    return "mid_block.resnets.1.nonlinearity"


def transposed_convolution(unet: UNet2DConditionModel) -> str:
    unet.up_blocks[0].upsamplers[0].conv = nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1)
    return "up_blocks.0.upsamplers.0.conv"


def circular_padding(unet: UNet2DConditionModel) -> str:
    unet.up_blocks[1].resnets[0].conv1.padding_mode = "circular"
    return "up_blocks.1.resnets.0.conv1"


def padding_by_name(unet: UNet2DConditionModel) -> str:
    unet.conv_out.padding = "same"
    return "conv_out"


def circular_entry(unet: UNet2DConditionModel) -> str:
    unet.conv_in.padding_mode = "circular"
    return "conv_in"


def unknown_processor(unet: UNet2DConditionModel) -> str:
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(GridProcessor())
    return "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def unknown_cross_processor(unet: UNet2DConditionModel) -> str:
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.set_processor(GridProcessor())
    return "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def fused_projections(unet: UNet2DConditionModel) -> str:
    unet.fuse_qkv_projections()
    return "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def compiled_block(unet: UNet2DConditionModel) -> str:
    unet.up_blocks[0].compile()
    return "up_blocks.0"


def moved_weights(unet: UNet2DConditionModel) -> str:
    """What enable_sequential_cpu_offload does to every layer."""
    accelerate.hooks.add_hook_to_module(unet.mid_block.resnets[0].conv1, accelerate.hooks.ModelHook())
    return "mid_block.resnets.0.conv1"


def hooked_layer(unet: UNet2DConditionModel) -> str:
    """Group offload, caches and layerwise casting are hooks of this kind."""
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(unet.up_blocks[1])
    registry.register_hook(diffusers.hooks.ModelHook(), "group_offloading")
    return "up_blocks.1"


def batch_norm(unet: UNet2DConditionModel) -> str:
    unet.conv_norm_out = nn.BatchNorm2d(16)
    return "conv_norm_out"


CHANGES: list[Callable[[UNet2DConditionModel], str]] = [
    unknown_layer,
    unknown_child,
    pooling,
    transposed_convolution,
    circular_padding,
    padding_by_name,
    circular_entry,
    unknown_processor,
    unknown_cross_processor,
    fused_projections,
    batch_norm,
    compiled_block,
    moved_weights,
    hooked_layer,
]


def one_of_two() -> VirtualTransport:
    """A transport of two ranks over which nothing is sent: attaching does not communicate."""
    return VirtualTransport(VirtualWorld(2), 0)


def replaced(model: nn.Module) -> list[str]:
    """Modules with a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_without_a_rule_is_named_and_nothing_is_replaced(change: Callable[[UNet2DConditionModel], str]) -> None:
    unet = sdxl_unet()
    name = change(unet)
    before = replaced(unet)
    with pytest.raises(UnsupportedModel, match=re.escape(f"'{name}'")):
        ParallelDenoiser(unet, Plan(patch=2), one_of_two()).attach()
    assert replaced(unet) == before


@pytest.mark.parametrize("change", [circular_padding, unknown_processor, fused_projections, compiled_block])
def test_a_change_after_attaching_is_named_when_layers_are_looked_at_again(
    change: Callable[[UNet2DConditionModel], str],
) -> None:
    unet = sdxl_unet()
    denoiser = ParallelDenoiser(unet, Plan(patch=2), one_of_two())
    denoiser.attach()
    name = change(unet)
    with pytest.raises(UnsupportedModel, match=re.escape(f"'{name}'")):
        denoiser.refresh()


@pytest.mark.parametrize(
    "config",
    [
        {"center_input_sample": True},
        {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")},
        {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D")},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"downsample_padding": 0},
    ],
    ids=str,
)
def test_a_configuration_without_a_rule_is_refused(config: dict[str, Any]) -> None:
    unet = sdxl_unet(**config)
    with pytest.raises(UnsupportedModel):
        ParallelDenoiser(unet, Plan(patch=2), one_of_two()).attach()
    assert replaced(unet) == []


@pytest.mark.parametrize("make", [sdxl_unet, sd_unet])
def test_the_known_families_pass(make: Callable[[], UNet2DConditionModel]) -> None:
    ParallelDenoiser(make(), Plan(patch=2), one_of_two()).attach()


def test_a_family_without_anatomy_is_refused_by_its_name() -> None:
    with pytest.raises(UnsupportedModel, match="AutoencoderKL"):
        ParallelDenoiser(AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)), Plan(patch=2), one_of_two())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_mask": torch.ones(1, 25 * 17)}, "attention_mask"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "gligen"),
    ],
)
def test_an_argument_that_cannot_be_cut_is_named(arguments: dict[str, Any], named: str) -> None:
    unet = sdxl_unet()
    ParallelDenoiser(unet, Plan(patch=2), one_of_two()).attach()
    with pytest.raises(ConfigError, match=named):
        unet(**unet_inputs(unet, 1, 25, 17), **arguments)


def test_a_refusal_leaves_the_model_alone_until_the_change_is_undone_and_then_divides_it_again() -> None:
    unet = sdxl_unet()
    denoiser = ParallelDenoiser(unet, Plan(patch=2), one_of_two())
    denoiser.attach()
    divided = replaced(unet)
    intact = unet.mid_block.resnets[1].nonlinearity
    pooling(unet)
    with pytest.raises(UnsupportedModel):
        denoiser.refresh()
    unet.mid_block.resnets[1].nonlinearity = intact
    denoiser.refresh()
    assert replaced(unet) == divided
