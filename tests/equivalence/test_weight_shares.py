"""What a plan that divides weights divides: adapters with their layers, work, bytes of weights; how it comes off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks
from peft import LoraConfig
from test_detach import attributes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distrifusion import Plan
from distrifusion.anatomy.unit_sites import unit_sites
from distrifusion.anatomy.units import UnitSite
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.errors import UnsupportedModel
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.memory.weights import weights_of
from distrifusion.strategies.tensor import Share
from models import relative_error, sdxl_unet, unet_inputs
from transformers_tiny import FAMILIES, flux

# Adapters

TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "convolutions": ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "upsamplers.0.conv"],
    "feed-forward": ["ff.net.0.proj", "ff.net.2"],
}


def adapt(model: Any, targets: list[str], **options: Any) -> None:
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(4)  # virtual ranks share the global one
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_loaded_before_is_divided_with_its_layers(sdxl: UNet2DConditionModel, kind: str) -> None:
    unet = sdxl_unet()
    adapt(unet, TARGETS[kind])
    inputs = unet_inputs(unet, 2, 9, 8)
    with torch.no_grad():
        assert relative_error(unet(**inputs).sample, sdxl(**inputs).sample) > 1e-2
    assert max(errors(unet, "tp3", [inputs])) <= EXACT
    divided = {id(layer.module) for site in unit_sites(unet) for layer in (*site.makers, *getattr(site, "readers", ()))}
    factors = [part for m in unet.modules() if hasattr(m, "lora_A") for part in (m.lora_A, m.lora_B)]
    assert sum(id(f["default"]) in divided for f in factors) == len(factors) // 2


def test_an_adapter_loaded_and_merged_after_equals_one_device() -> None:
    inputs = unet_inputs(sdxl_unet(), 2, 9, 8)

    def change(model: Any) -> None:
        adapt(model, [*TARGETS["attention"], *TARGETS["convolutions"]])

    def call(model: Any, denoiser: ParallelDenoiser | None) -> list[torch.Tensor]:
        outputs = [model(**inputs).sample]
        for step in (lambda: change(model), lambda: model.fuse_lora(0.5), model.unfuse_lora, model.disable_adapters):
            step()
            if denoiser is not None:
                denoiser.refresh()
            outputs.append(model(**inputs).sample)
        return outputs

    with torch.no_grad():
        references = call(sdxl_unet(), None)
    for outputs in on_ranks(sdxl_unet(), "tp2", call_with_own_weights(call)):
        assert max(relative_error(a, b) for a, b in zip(outputs, references, strict=True)) <= EXACT


def call_with_own_weights(call: Any) -> Any:
    """Virtual ranks share weights, which merging changes: each gets its own."""

    def work(model: Any, denoiser: ParallelDenoiser) -> Any:
        with torch.no_grad():
            for module in model.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.clone())
        return call(model, denoiser)

    return work


def test_an_adapter_of_a_form_without_a_rule_runs_whole() -> None:
    unet = sdxl_unet()
    adapt(unet, TARGETS["attention"], use_dora=True)
    assert not any(isinstance(s, UnitSite) and s.name.endswith(("attn1", "attn2")) for s in unit_sites(unet))
    assert max(errors(unet, "tp2", [unet_inputs(unet, 1, 8, 8)])) <= EXACT


# What is divided, and what is left


def test_each_rank_does_its_share_of_the_work(sdxl: UNet2DConditionModel) -> None:
    inputs = unet_inputs(sdxl, 1, 16, 16)

    def work(model: Any) -> dict[Any, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
        return counter.get_flop_counts()["Global"]

    whole = sum(work(sdxl).values())
    shares = [sum(counts.values()) / whole for counts in on_ranks(sdxl, "tp2", lambda model, _: work(model))]
    # A tenth is left whole in so small a model: embeddings, the first and last convolution, projections around blocks.
    assert all(0.5 <= share < 0.6 for share in shares)
    assert sum(shares) >= 1


@pytest.mark.parametrize("family", ["FLUX.1 dev", "PixArt-Sigma"])
def test_each_rank_works_with_its_share_of_the_weights(family: str) -> None:
    model = FAMILIES[family].make()
    shares = [weights_of(model, Share(place, 3)) for place in range(3)]
    divided = sum(layer.module.weight.nbytes for site in unit_sites(model) for layer in (*site.makers, *site.readers))
    assert all(share.own < share.whole for share in shares)
    biases = [layer.module.bias for site in unit_sites(model) for layer in (*site.makers, *site.readers)]
    divided += sum(bias.nbytes for bias in biases if bias is not None)
    assert sum(share.own for share in shares) == 3 * shares[0].whole - 2 * divided
    assert weights_of(model, Share(0, 1)).own == shares[0].whole


def test_a_place_without_heads_works_with_no_weights_of_them() -> None:
    model = FAMILIES["PixArt-Sigma"].make()  # three heads
    assert weights_of(model, Share(3, 4)).own < weights_of(model, Share(2, 4)).own


def test_attaching_keeps_the_state_dict_and_detaching_restores_every_attribute() -> None:
    for model in (sdxl_unet(), flux()):
        parameters, before = dict(model.state_dict(keep_vars=True)), attributes(model)
        denoiser = ParallelDenoiser(model, Plan(tp=2), VirtualTransport(VirtualWorld(2), 0))
        denoiser.attach()
        attached = dict(model.state_dict(keep_vars=True))
        assert list(attached) == list(parameters)
        assert all(attached[name] is parameters[name] for name in parameters)
        assert attributes(model) != before
        denoiser.detach()
        assert attributes(model) == before


@pytest.mark.parametrize("family", ["FLUX.1 dev", "Wan 2.1"])
def test_a_detached_model_gives_the_bits_it_gave_before(family: str) -> None:
    whole, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(2, *FAMILIES[family].size)
    with torch.no_grad():
        reference = whole(**inputs).sample

    def work(model: Any, denoiser: ParallelDenoiser) -> torch.Tensor:
        model(**inputs)
        denoiser.detach()
        return model(**inputs).sample

    assert all(torch.equal(output, reference) for output in on_ranks(whole, "tp2", work))


def test_a_compiled_layer_is_refused_by_name() -> None:
    unet = sdxl_unet()
    unet.mid_block.resnets[0].compile()
    denoiser = ParallelDenoiser(unet, Plan(tp=2), VirtualTransport(VirtualWorld(2), 0))
    with pytest.raises(UnsupportedModel, match=r"mid_block\.resnets\.0"):
        denoiser.attach()
