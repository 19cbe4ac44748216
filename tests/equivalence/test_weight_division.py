"""Denoisers whose layers are divided by weights: any number of ranks, any number of units, equal to one device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks, predictions

from distrifusion.denoiser import ParallelDenoiser
from models import relative_error, sd_unet, sdxl_unet, unet_inputs
from transformers_tiny import FAMILIES, flux, flux_inputs, sd3, sd3_inputs, sd35, wan, wan_inputs


@cache
def model_of(family: str) -> Any:
    return FAMILIES[family].make()


def inputs_of(family: str, batch: int = 2) -> dict[str, Any]:
    return FAMILIES[family].inputs(batch, *FAMILIES[family].size)


# U-Nets


@pytest.mark.supports("plan", "tp<N>")
@pytest.mark.parametrize("plan", ["tp3", "cfg2.tp2"])
def test_every_unet_equals_one_device(unet: UNet2DConditionModel, plan: str) -> None:
    assert max(errors(unet, plan, [unet_inputs(unet, 2, 17, 9)])) <= EXACT


@pytest.mark.parametrize(
    ("plan", "batch", "height", "width"),
    [
        ("tp2", 1, 17, 9),
        ("tp4", 2, 9, 16),
        ("tp5", 1, 8, 8),  # four heads at most, and three groups for some ranks of eight
        ("dp2.tp2", 2, 9, 16),
        ("dp2.cfg2.tp2", 4, 8, 8),
        ("cfg2.tp2", 3, 9, 8),
        ("cfg2.tp2", 1, 9, 8),  # one picture without branches: two teams do the same
    ],
)
def test_any_plan_and_size_equals_one_device(
    sdxl: UNet2DConditionModel, plan: str, batch: int, height: int, width: int
) -> None:
    assert max(errors(sdxl, plan, [unet_inputs(sdxl, batch, height, width)])) <= EXACT


@pytest.mark.parametrize(
    "config",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"norm_num_groups": 1},
        {"norm_num_groups": 2, "attention_head_dim": 1},
        {"class_embed_type": None, "only_cross_attention": True},
        {"cross_attention_norm": "layer_norm"},
        {"mid_block_type": "UNetMidBlock2D"},
    ],
    ids=str,
)
def test_relatives_of_the_families_equal_one_device(config: dict[str, Any]) -> None:
    unet = sdxl_unet(**config)
    assert max(errors(unet, "tp3", [unet_inputs(unet, 2, 9, 8)])) <= EXACT


def test_residuals_of_a_controlnet_are_those_of_the_own_rows(unets: dict[str, UNet2DConditionModel]) -> None:
    unet = unets["sd_unet"]
    inputs = unet_inputs(unet, 2, 8, 8)
    generator = torch.Generator().manual_seed(8)
    residual = torch.randn(2, 32, 1, 1, generator=generator)
    down = [torch.zeros(1, 1, 1, 1)] * 7 + [residual]
    inputs |= {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": residual}
    assert max(errors(unet, "cfg2.tp2", [inputs])) <= EXACT


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_layout_of_weights_stays(layout: torch.memory_format) -> None:
    unet = sd_unet(norm_num_groups=2).to(memory_format=layout)
    inputs = unet_inputs(unet, 2, 16, 16)
    assert max(errors(unet, "tp3", [inputs])) <= EXACT


@pytest.mark.parametrize("slice_size", ["auto", 1])
def test_sliced_attention_equals_one_device(sdxl: UNet2DConditionModel, slice_size: str | int) -> None:
    inputs = unet_inputs(sdxl, 2, 9, 8)
    with torch.no_grad():
        reference = sdxl(**inputs).sample

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> torch.Tensor:
        model.set_attention_slice(slice_size)
        denoiser.refresh()
        return model(**inputs).sample

    assert max(relative_error(output, reference) for output in on_ranks(sdxl, "tp3", work)) <= EXACT


# Transformers


@pytest.mark.parametrize("plan", ["tp2", "tp4"])  # three heads
@pytest.mark.parametrize("family", FAMILIES)
def test_every_transformer_equals_one_device(family: str, plan: str) -> None:
    assert max(errors(model_of(family), plan, [inputs_of(family)])) <= EXACT


@pytest.mark.parametrize(
    ("plan", "batch"), [("tp3", 1), ("cfg2.tp2", 2), ("dp2.tp2", 3), ("cfg2.tp2", 1), ("dp2.cfg2.tp2", 4)]
)
@pytest.mark.parametrize("family", ["SD3.5 medium", "FLUX.1 dev", "Hunyuan-DiT"])
def test_any_plan_of_a_transformer_equals_one_device(family: str, plan: str, batch: int) -> None:
    assert max(errors(model_of(family), plan, [inputs_of(family, batch)])) <= EXACT


@pytest.mark.parametrize("plan", ["tp2", "tp4", "cfg2.tp2", "dp2.tp2"])
def test_all_ranks_have_the_same_bits(sdxl: UNet2DConditionModel, plan: str) -> None:
    for model, inputs in ((model_of("SD3"), inputs_of("SD3")), (sdxl, unet_inputs(sdxl, 2, 9, 8))):
        first, *others = predictions(model, plan, [inputs])
        assert all(torch.equal(other[0], first[0]) for other in others)


@pytest.mark.parametrize("plan", ["tp2", "cfg2.tp3"])
def test_half_the_precision_stays_near_and_alike(plan: str) -> None:
    model = sd35().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in sd3_inputs(2, 14, 10).items()}
    assert max(errors(model, plan, [inputs])) <= 2e-2
    first, *others = predictions(model, plan, [inputs])
    assert all(torch.equal(other[0], first[0]) for other in others)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(sd3, lambda: sd3_inputs(2, 14, 10)), (flux, lambda: flux_inputs(2, 7, 5)), (wan, lambda: wan_inputs(2, 6, 10))],
    ids=["SD3", "FLUX", "Wan"],
)
def test_fused_projections_equal_one_device(make: Any, inputs: Any) -> None:
    model = make()
    model.fuse_qkv_projections()
    assert max(errors(model, "tp2", [inputs()])) <= EXACT


def test_feed_forward_in_chunks_equals_one_device() -> None:
    model = sd3()
    model.enable_forward_chunking(7, dim=1)
    assert max(errors(model, "tp3", [sd3_inputs(2, 14, 10)])) <= EXACT


@pytest.mark.parametrize("plan", ["tp2", "cfg2.tp2"])
def test_a_call_by_position_that_wants_a_tuple_gets_one(plan: str) -> None:
    model, inputs = model_of("SD3"), inputs_of("SD3")
    with torch.no_grad():
        (reference,) = model(*inputs.values(), return_dict=False)
    by_rank = on_ranks(model, plan, lambda model, _: model(*inputs.values(), return_dict=False))
    assert all(isinstance(output, tuple) and len(output) == 1 for output in by_rank)
    assert max(relative_error(output[0], reference) for output in by_rank) <= EXACT
