"""Attaching changes no parameter, and detaching leaves nothing behind."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from division import on_ranks

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from models import moved, sdxl_unet, unet_inputs


def attributes(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Every instance attribute of every module."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_attaching_keeps_the_state_dict_and_detaching_restores_every_attribute() -> None:
    unet = sdxl_unet()
    parameters, before = dict(unet.state_dict(keep_vars=True)), attributes(unet)
    denoiser = ParallelDenoiser(unet, Plan.parse("patch2.displaced.all"), VirtualTransport(VirtualWorld(2), 0))
    denoiser.attach()
    attached = dict(unet.state_dict(keep_vars=True))
    assert list(attached) == list(parameters)
    assert all(attached[name] is parameters[name] for name in parameters)
    assert type(unet) is UNet2DConditionModel
    assert attributes(unet) != before
    denoiser.detach()
    assert attributes(unet) == before
    assert hooks(unet) == 0
    assert all(tensor is parameters[name] for name, tensor in unet.state_dict(keep_vars=True).items())


def test_a_detached_model_gives_the_bits_it_gave_before(unet: UNet2DConditionModel) -> None:
    inputs = unet_inputs(unet, 2, 25, 17)
    with torch.no_grad():
        reference = unet(**inputs).sample

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> torch.Tensor:
        denoiser.open("request")
        model(**inputs)
        model(**moved(inputs))
        denoiser.close()
        denoiser.detach()
        return model(**inputs).sample

    assert all(torch.equal(output, reference) for output in on_ranks(unet, "patch3.displaced.all.w0", work))


def test_a_forward_that_was_replaced_before_is_put_back() -> None:
    """Other tools replace forwards too; ours runs theirs, and leaves it in place."""
    unet = sdxl_unet()
    conv = unet.down_blocks[0].resnets[0].conv1
    conv.forward = theirs = conv.forward
    denoiser = ParallelDenoiser(unet, Plan(patch=2), VirtualTransport(VirtualWorld(2), 0))
    denoiser.attach()
    assert conv.forward is not theirs
    denoiser.detach()
    assert vars(conv)["forward"] is theirs
