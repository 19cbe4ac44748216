"""A synchronous call on any number of ranks equals the call on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks, predictions

from models import relative_error, sdxl_unet, unet_inputs

# plan, batch, height, width of the latents
EVERY_FAMILY = [
    ("patch2", 1, 41, 25),
    ("patch3", 2, 41, 25),
    ("patch4.columns", 1, 25, 41),
    ("cfg2.patch2", 2, 24, 20),
    ("patch8", 1, 24, 16),  # 6 or 3 rows at the coarsest level
]
ONE_FAMILY = [
    ("patch1", 2, 17, 9),
    ("patch2", 4, 32, 32),
    ("patch4", 2, 41, 25),
    ("patch5", 1, 37, 16),
    ("patch2.columns", 3, 41, 25),
    ("patch8.columns", 1, 6, 50),
    ("cfg2", 3, 9, 16),
    ("cfg2", 2, 41, 25),
    ("cfg2.patch3", 4, 41, 25),
    ("cfg2.patch4", 2, 19, 8),
    ("cfg2.patch2.columns", 3, 13, 22),
    ("patch7", 1, 7, 30),  # one row each, and only at the finest level
    ("patch2", 1, 2, 2),
]
TOO_SMALL_TO_CUT = [("patch8", 1, 5, 7), ("patch2", 1, 1, 30), ("cfg2.patch3", 2, 2, 9)]
SEVERAL_PICTURES = [
    ("dp2", 4, 9, 16),
    ("dp3", 4, 17, 9),
    ("dp2.cfg2", 6, 9, 16),
    ("dp2.patch2", 3, 41, 25),
    ("dp4.cfg2", 2, 12, 9),  # fewer rows than parts: the ranks take bands
    ("dp3.patch2.columns", 2, 13, 22),
]
ONE_PICTURE_WITHOUT_GUIDANCE = [("cfg2", 1, 9, 16), ("cfg2.patch2", 1, 41, 25), ("cfg2.patch3.columns", 1, 12, 41)]


@pytest.mark.parametrize(("plan", "batch", "height", "width"), EVERY_FAMILY)
def test_every_family_equals_one_device(
    unet: UNet2DConditionModel, plan: str, batch: int, height: int, width: int
) -> None:
    assert max(errors(unet, plan, [unet_inputs(unet, batch, height, width)])) <= EXACT


@pytest.mark.parametrize(
    ("plan", "batch", "height", "width"), [*ONE_FAMILY, *TOO_SMALL_TO_CUT, *ONE_PICTURE_WITHOUT_GUIDANCE]
)
def test_any_plan_and_size_equals_one_device(
    sdxl: UNet2DConditionModel, plan: str, batch: int, height: int, width: int
) -> None:
    assert max(errors(sdxl, plan, [unet_inputs(sdxl, batch, height, width)])) <= EXACT


@pytest.mark.supports("plan", "dp<N>")
@pytest.mark.parametrize(("plan", "batch", "height", "width"), SEVERAL_PICTURES)
def test_several_pictures_on_groups_of_ranks_equal_one_device(
    sdxl: UNet2DConditionModel, plan: str, batch: int, height: int, width: int
) -> None:
    assert max(errors(sdxl, plan, [unet_inputs(sdxl, batch, height, width)])) <= EXACT


@pytest.mark.parametrize("plan", ["patch4", "cfg2.patch2", "cfg2", "patch8"])
def test_all_ranks_have_the_same_bits(sdxl: UNet2DConditionModel, plan: str) -> None:
    first, *others = predictions(sdxl, plan, [unet_inputs(sdxl, 2, 24, 20)])
    assert all(torch.equal(other[0], first[0]) for other in others)


@pytest.mark.parametrize(
    "change",
    [
        {"timestep": 500},
        {"timestep": 500.0},
        {"timestep": torch.tensor([500])},
        {"timestep": torch.tensor([500, 20])},
        {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])},
        {"cross_attention_kwargs": {"scale": 1.0}},
        {"cross_attention_kwargs": None},
    ],
    ids=str,
)
def test_arguments_are_cut_as_what_they_are(sdxl: UNet2DConditionModel, change: dict[str, Any]) -> None:
    assert max(errors(sdxl, "cfg2.patch2", [{**unet_inputs(sdxl, 2, 17, 9), **change}])) <= EXACT


def test_a_call_by_position_that_wants_a_tuple_gets_one(sdxl: UNet2DConditionModel) -> None:
    inputs = unet_inputs(sdxl, 2, 17, 9)
    sample, timestep, text = (inputs.pop(name) for name in ("sample", "timestep", "encoder_hidden_states"))
    with torch.no_grad():
        (reference,) = sdxl(sample, timestep, text, return_dict=False, **inputs)

    by_rank = on_ranks(sdxl, "patch3", lambda model, _: model(sample, timestep, text, return_dict=False, **inputs))
    assert all(isinstance(output, tuple) and len(output) == 1 for output in by_rank)
    assert max(relative_error(output[0], reference) for output in by_rank) <= EXACT


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"in_channels": 9}, {"sample": torch.randn(2, 9, 17, 9, generator=torch.Generator().manual_seed(1))}),
        ({"time_cond_proj_dim": 8}, {"timestep_cond": torch.randn(2, 8, generator=torch.Generator().manual_seed(1))}),
        ({"num_class_embeds": 3}, {"class_labels": torch.tensor([2, 0])}),
        ({"conv_in_kernel": 5}, {}),
        ({"conv_out_kernel": 1}, {}),
        ({"layers_per_block": 2, "norm_num_groups": 16}, {}),
        ({"resnet_time_scale_shift": "scale_shift"}, {}),
        ({"mid_block_type": "UNetMidBlock2D"}, {}),
    ],
    ids=lambda value: ", ".join(value),
)
def test_relatives_of_the_families_equal_one_device(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Inpainting (9 channels), consistency distillation, class labels, and other kernels and norms."""
    unet = sdxl_unet(**config)
    inputs = {**unet_inputs(unet, 2, 17, 9), **arguments}
    assert max(errors(unet, "cfg2.patch2", [inputs])) <= EXACT
    assert max(errors(unet, "patch3.columns", [inputs])) <= EXACT


def residuals(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a ControlNet adds: a tensor for every skip connection and one for the middle block."""
    shapes: list[torch.Size] = []
    middle: list[torch.Size] = []
    blocks = [unet.conv_in, *(m for b in unet.down_blocks for m in (*b.resnets, *(b.downsamplers or ())))]
    hooks = [m.register_forward_hook(lambda _, __, out: shapes.append(out.shape)) for m in blocks]
    hooks.append(unet.mid_block.register_forward_hook(lambda _, __, out: middle.append(out.shape)))
    with torch.no_grad():
        unet(**inputs)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(8)
    down = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    return {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.randn(middle[0], generator=generator),
    }


@pytest.mark.parametrize("plan", ["patch3", "cfg2.patch2.columns", "patch8"])
def test_residuals_of_a_controlnet_are_cut_at_their_level(unets: dict[str, UNet2DConditionModel], plan: str) -> None:
    unet = unets["sd_unet"]
    inputs = unet_inputs(unet, 2, 41, 25)
    controlled = {**inputs, **residuals(unet, inputs)}
    with torch.no_grad():
        assert relative_error(unet(**controlled).sample, unet(**inputs).sample) > 0.1
    assert max(errors(unet, plan, [controlled])) <= EXACT


@pytest.mark.supports("feature", "attention slicing")
@pytest.mark.parametrize("slice_size", ["auto", "max", 1])
def test_sliced_attention_equals_one_device(sdxl: UNet2DConditionModel, slice_size: str | int) -> None:
    inputs = unet_inputs(sdxl, 2, 17, 9)
    with torch.no_grad():
        reference = sdxl(**inputs).sample

    def work(model: UNet2DConditionModel, _: Any) -> torch.Tensor:
        model.set_attention_slice(slice_size)
        return model(**inputs).sample

    assert max(relative_error(output, reference) for output in on_ranks(sdxl, "patch3", work)) <= EXACT
