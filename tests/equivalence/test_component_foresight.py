"""Where a chain is cut is foreseen without values, as a call that is made shows it; or it is said that it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks
from peft import LoraConfig
from test_component_traffic import watched
from test_detach import attributes

from distrifusion.anatomy import anatomy_of
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.nested import map_tensors
from distrifusion.strategies.foreseeing import foresee
from distrifusion.strategies.watching import Seen
from models import UNETS, image_prompt, moved, sdxl_unet, unet_inputs, with_residuals
from transformers_tiny import FAMILIES

Case = tuple[Any, dict[str, Any]]


def form(seen: list[Seen]) -> list[Any]:
    """What is kept of uses of layers, with shapes and types in the place of tensors."""
    return [(s.name, s.site, s.layer, map_tensors(s.output, lambda t: (t.shape, t.dtype, t.is_meta))) for s in seen]


def foreseen(model: Any, inputs: dict[str, Any]) -> tuple[list[Seen], Any]:
    layers = {site.name: (site.module, site.module.forward) for site in anatomy_of(model).links(model)}
    watch, result = foresee(model, model.forward, layers, (), inputs)
    return watch.seen, result


def unet() -> Case:
    model = sdxl_unet()
    return model, unet_inputs(model, 1, 17, 9)


def adapter_residuals() -> Case:
    model, x = unet()
    shapes = [(16, 9, 5), (32, 9, 5), (32, 5, 3)]
    return model, {**x, "down_intrablock_additional_residuals": [torch.ones(1, *shape) for shape in shapes]}


def control_residuals() -> Case:
    model, x = unet()
    return model, with_residuals(x)


def lora() -> Case:
    model, x = unet()
    model.add_adapter(LoraConfig(r=3, target_modules=["to_q", "conv1"], init_lora_weights=False))
    return model, x


def image() -> Case:
    model, x = unet()
    model._load_ip_adapter_weights([image_prompt(model)])
    x["added_cond_kwargs"] = {**x["added_cond_kwargs"], "image_embeds": [torch.ones(1, 1, 10)]}
    return model, x


def freeu() -> Case:
    model, x = unet()
    model.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    return model, x


def half() -> Case:
    model, x = unet()
    return model.to(torch.bfloat16), map_tensors(x, lambda t: t.bfloat16() if t.is_floating_point() else t)


def skipped() -> Case:
    model, x = FAMILIES["SD3"].make(), FAMILIES["SD3"].inputs(1, *FAMILIES["SD3"].size)
    return model, {**x, "skip_layers": [1]}


MORE = (adapter_residuals, control_residuals, lora, image, freeu, half, skipped)


def check_foreseen(model: Any, inputs: dict[str, Any]) -> None:
    before = attributes(model)
    seen, result = foreseen(model, inputs)
    assert attributes(model) == before
    assert form(seen) == form(watched(model, inputs)) and seen
    with torch.no_grad():
        real = model(**inputs)
    assert map_tensors(result, lambda t: (t.shape, t.dtype)) == map_tensors(real, lambda t: (t.shape, t.dtype))


@pytest.mark.parametrize("name", UNETS)
def test_what_every_unet_shows_is_foreseen(name: str) -> None:
    model = UNETS[name]()
    check_foreseen(model, unet_inputs(model, 2, 20, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_every_transformer_shows_is_foreseen(family: str) -> None:
    check_foreseen(FAMILIES[family].make(), FAMILIES[family].inputs(1, *FAMILIES[family].size))


@pytest.mark.parametrize("make", MORE)
def test_what_adapters_and_switches_change_is_foreseen(make: Callable[[], Case]) -> None:
    check_foreseen(*make())


def test_hooks_of_others_see_no_call_that_is_foreseen() -> None:
    model, x = unet()
    model.conv_in.register_forward_hook(lambda *_: pytest.fail("a hook got tensors without values"))
    foreseen(model, x)


# Where it is not foreseen


class Wanting(torch.nn.Module):
    """A layer that decides by values."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.max().item() >= 0 else x


def test_a_model_that_wants_values_runs_whole_once_and_says_why() -> None:
    model, x = unet()
    model.time_proj = Wanting(model.time_proj)
    other = unet_inputs(model, 1, 24, 16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for steps in ([x, moved(x), other, moved(other)], [x, x]):
            assert max(errors(model, "async3.sync", steps)) <= EXACT
    texts = [str(warning.message) for warning in said if "async3" in str(warning.message)]
    assert len(texts) == 2  # two times the plan was put on
    assert "shapes do not tell where UNet2DConditionModel is cut" in texts[0] and "item" in texts[0]
    assert errors(model, "async2.w1", [x, moved(x), moved(x, seed=1), *4 * [x]])[-1] <= EXACT


def test_a_call_under_autocast_runs_whole_once(sdxl: UNet2DConditionModel) -> None:
    """Types would be other ones where there are no values."""
    x = unet_inputs(sdxl, 1, 17, 9)

    def work(model: Any, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(action="ignore"):
            return [model(**x).sample for _ in range(2)]

    for whole, handed in on_ranks(sdxl, "async2.sync", work):
        assert whole.dtype == handed.dtype
        assert torch.allclose(whole.float(), handed.float(), atol=0.1, rtol=0.1)


def test_what_is_wrong_with_a_call_is_said_by_the_call(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)
    wrong = {**x, "encoder_hidden_states": torch.ones(1, 7, 23)}
    with warnings.catch_warnings(action="ignore"), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        on_ranks(sdxl, "async2.sync", lambda model, _: model(**wrong))
