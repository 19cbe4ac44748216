"""Half precision and other memory layouts: a divided call is as near to the truth as the undivided one."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks, predictions

from distrifusion.denoiser import ParallelDenoiser
from models import moved, relative_error, run_request, sdxl_unet, to_dtype, unet_inputs

HALF = [
    pytest.param(dtype, marks=pytest.mark.supports("dtype", str(dtype).removeprefix("torch.")), id=str(dtype))
    for dtype in (torch.float16, torch.bfloat16)
]


@pytest.fixture(scope="module", params=HALF)
def half_unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return sdxl_unet().to(request.param)


@pytest.mark.parametrize("plan", ["patch3.displaced.all.w1", "cfg2.patch2.columns.displaced.all.w1"])
def test_half_precision_is_as_near_to_fp32_as_one_device(half_unet: UNet2DConditionModel, plan: str) -> None:
    """Both round at every layer, so both are off by the type's rounding many times over; dividing may not add to it.

    A quarter more is allowed: where the bands meet, sums are taken in another order.
    """
    x = to_dtype(unet_inputs(half_unet, 2, 25, 17), half_unet.dtype)
    steps = [x, moved(x), moved(x)]
    full = sdxl_unet()
    full.load_state_dict(half_unet.state_dict())
    with torch.no_grad():
        truth = [full(**to_dtype(inputs, torch.float32)).sample for inputs in steps]
        alone = [relative_error(half_unet(**inputs).sample, t) for inputs, t in zip(steps, truth, strict=True)]
    for outputs in predictions(half_unet, plan, steps):
        assert all(output.dtype == half_unet.dtype for output in outputs)
        for output, reference, error in zip(outputs, truth, alone, strict=True):
            assert 0 < relative_error(output, reference) <= 1.25 * error


@pytest.mark.supports("dtype", "torch.autocast")
def test_autocast_is_as_near_to_fp32_as_one_device(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 2, 25, 17)
    steps = [x, moved(x), moved(x)]
    with torch.no_grad():
        truth = [sdxl(**inputs).sample for inputs in steps]
        with torch.autocast("cpu", torch.bfloat16):
            alone = [relative_error(sdxl(**inputs).sample, t) for inputs, t in zip(steps, truth, strict=True)]

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return run_request(model, denoiser, steps)

    for outputs in on_ranks(sdxl, "cfg2.patch2.displaced.all.w1", work):
        for output, reference, error in zip(outputs, truth, alone, strict=True):
            assert EXACT < relative_error(output, reference) <= 1.25 * error


@pytest.mark.supports("feature", "channels_last")
@pytest.mark.parametrize("plan", ["patch3.displaced.all.w1", "patch2.columns.displaced.all.w1", "patch8", "cfg2"])
def test_channels_last_equals_one_device(plan: str) -> None:
    unet = sdxl_unet().to(memory_format=torch.channels_last)
    x = unet_inputs(unet, 2, 25, 17)
    y = moved(x)
    for inputs in (x, y):
        inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    assert max(errors(unet, plan, [x, y, y])) <= EXACT


def test_latents_that_are_not_contiguous_equal_one_device(sdxl: UNet2DConditionModel) -> None:
    inputs = unet_inputs(sdxl, 2, 25, 17)
    inputs["sample"] = inputs["sample"].transpose(2, 3)
    assert max(errors(sdxl, "patch3", [inputs])) <= EXACT
