"""Adapters added before or after attaching: the divided model equals one device that has them too."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, on_ranks
from peft import LoraConfig

from distrifusion.denoiser import ParallelDenoiser
from models import image_prompt, moved, relative_error, run_request, share_weights, unet_inputs

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv", "conv_shortcut"]
TARGETS = {"attention": ATTENTION, "convolutions": CONVOLUTIONS, "both": ATTENTION + CONVOLUTIONS}


@pytest.fixture(params=TARGETS)
def lora(request: pytest.FixtureRequest) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[request.param], init_lora_weights=False)


def adapted(unet: UNet2DConditionModel, lora: LoraConfig) -> UNet2DConditionModel:
    """A copy of the model with the adapter, its weights drawn once."""
    copy = share_weights(unet)
    torch.manual_seed(4)
    copy.add_adapter(lora)
    return copy.eval()


def add(model: UNet2DConditionModel, lora: LoraConfig, source: UNet2DConditionModel) -> None:
    """Add the adapter with the weights that `source` has."""
    model.add_adapter(lora)
    weights = {name: tensor for name, tensor in source.state_dict().items() if "lora_" in name}
    assert weights
    model.load_state_dict(weights, strict=False)
    model.eval()


def added_after(lora: LoraConfig, source: UNet2DConditionModel) -> Callable[..., None]:
    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> None:
        add(model, lora, source)
        denoiser.refresh()

    return work


def added_before(lora: LoraConfig, source: UNet2DConditionModel) -> Callable[..., None]:
    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> None:
        denoiser.detach()
        add(model, lora, source)
        denoiser.attach()

    return work


@pytest.mark.parametrize("order", [added_before, added_after])
@pytest.mark.parametrize("plan", ["patch3.displaced.all.w1", "cfg2.patch2.columns.displaced.all.w1"])
def test_an_adapter_equals_one_device_with_it(
    sdxl: UNet2DConditionModel, lora: LoraConfig, plan: str, order: Callable[..., Callable[..., None]]
) -> None:
    source = adapted(sdxl, lora)
    x = unet_inputs(sdxl, 2, 25, 17)
    steps = [x, moved(x), moved(x)]
    with torch.no_grad():
        references = [source(**inputs).sample for inputs in steps]
        assert relative_error(references[0], sdxl(**x).sample) > 1e-2
    prepare = order(lora, source)

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        prepare(model, denoiser)
        return run_request(model, denoiser, steps)

    for outputs in on_ranks(sdxl, plan, work):
        assert max(map(relative_error, outputs, references)) <= EXACT


def test_an_adapter_taken_off_again_leaves_the_model_as_it_was(sdxl: UNet2DConditionModel) -> None:
    lora = LoraConfig(r=3, target_modules=ATTENTION + CONVOLUTIONS, init_lora_weights=False)
    inputs = unet_inputs(sdxl, 1, 25, 17)
    source = adapted(sdxl, lora)

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> tuple[torch.Tensor, torch.Tensor]:
        add(model, lora, source)
        denoiser.refresh()
        model.delete_adapters("default")
        model.unload_lora()
        denoiser.refresh()
        divided = model(**inputs).sample
        denoiser.detach()
        return divided, model(**inputs).sample

    with torch.no_grad():
        reference = sdxl(**inputs).sample
    for divided, detached in on_ranks(sdxl, "patch2", work):
        assert relative_error(divided, reference) <= EXACT
        assert torch.equal(detached, reference)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_an_adapters_scale_is_that_of_the_call(sdxl: UNet2DConditionModel, scale: float) -> None:
    lora = LoraConfig(r=3, target_modules=ATTENTION, init_lora_weights=False)
    source = adapted(sdxl, lora)
    inputs = {**unet_inputs(sdxl, 2, 25, 17), "cross_attention_kwargs": {"scale": scale}}

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> torch.Tensor:
        add(model, lora, source)
        denoiser.refresh()
        return model(**inputs).sample

    with torch.no_grad():
        reference = source(**inputs).sample
    assert all(relative_error(output, reference) <= EXACT for output in on_ranks(sdxl, "cfg2.patch2", work))


def test_an_adapter_exchanged_for_another_of_the_same_form_is_attached(sdxl: UNet2DConditionModel) -> None:
    """The new layers may lie at the addresses of the old ones."""
    lora = LoraConfig(r=3, target_modules=ATTENTION + CONVOLUTIONS, init_lora_weights=False)
    inputs = unet_inputs(sdxl, 1, 25, 17)
    first, second = adapted(sdxl, lora), adapted(sdxl, lora)
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "lora_" in name:
                parameter.neg_().mul_(1.5)
        reference = second(**inputs).sample

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> tuple[torch.Tensor, bool]:
        add(model, lora, first)
        denoiser.refresh()
        old = {id(module) for name, module in model.named_modules() if "lora_" in name}
        model.unload_lora()
        gc.collect()
        add(model, lora, second)
        reused = bool(old & {id(module) for module in model.modules()})
        denoiser.refresh()
        return model(**inputs).sample, reused

    for output, reused in on_ranks(sdxl, "patch2", work):
        assert relative_error(output, reference) <= EXACT
        assert not reused, "a refresh that knows modules by their addresses could take the new ones for the old"


@pytest.mark.parametrize("plan", ["patch3.displaced.all.w1", "cfg2.patch2"])
def test_an_image_prompt_equals_one_device(unets: dict[str, UNet2DConditionModel], plan: str) -> None:
    plain = unets["sd_unet"]
    weights = image_prompt(plain)
    images = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(7))
    x = {**unet_inputs(plain, 2, 25, 17), "added_cond_kwargs": {"image_embeds": [images]}}
    steps = [x, moved(x), moved(x)]
    source = share_weights(plain)
    source._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        model._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)  # what it does else is for one thread only
        denoiser.refresh()
        return run_request(model, denoiser, steps)

    with torch.no_grad():
        references = [source(**inputs).sample for inputs in steps]
        assert relative_error(references[0], plain(**x).sample) > 1e-2
    for outputs in on_ranks(plain, plan, work):
        assert max(map(relative_error, outputs, references)) <= EXACT
