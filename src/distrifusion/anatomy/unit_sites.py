"""Which modules of diffusers have units inside: its general classes, whatever the model around them."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from distrifusion.anatomy.attention_units import attention_site, parallel_block_site
from distrifusion.anatomy.base import Site
from distrifusion.anatomy.layers import check_call
from distrifusion.anatomy.units import PartSite, Stretch, UnitLayer, Units, UnitSite, joined, makers, readers

# How many times the hidden units of a feed-forward come out of its first projection: with a gate beside them or not.
_HIDDEN = {"GELU": 1, "ApproximateGELU": 1, "LinearActivation": 1, "GEGLU": 2, "SwiGLU": 2}


def unit_sites(model: nn.Module) -> list[Site]:
    """The modules of a model that have units inside, in its own order; all others are right if they run whole.

    Raises:
        UnsupportedModel: if a module's call is no longer its forward.
    """
    found = []
    for name, module in model.named_modules():
        check_call(name, module)
        found.append(_site_of(name, module))
    return [site for site in found if site is not None]


def _site_of(name: str, module: Any) -> Site | None:
    match module:
        case ResnetBlock2D():
            return _residual_block(name, module)
        case FeedForward():
            times = _HIDDEN.get(type(module.net[0]).__name__)
            return _feed_forward(name, module, module.net[0].proj, times, "net.2") if times else None
        case Upsample2D() | Downsample2D():
            conv = getattr(module, "conv", None)
            parts = makers(conv, Stretch(Units(module.out_channels)))
            return PartSite(f"{name}.conv", conv, tuple(parts)) if parts and isinstance(conv, nn.Module) else None
    if type(module).__name__ == "Flux2FeedForward":
        return _feed_forward(name, module, module.linear_in, 2, "linear_out")
    return parallel_block_site(name, module) or attention_site(name, module)


def _feed_forward(name: str, module: nn.Module, first: Any, times: int, last: str) -> UnitSite | None:
    """Hidden units, each read from every channel and with a gate of its own or none."""
    reader = module.get_submodule(last)
    hidden = Stretch(Units(getattr(reader, "in_features", 0)))
    made, read = makers(first, *[hidden] * times), readers(reader, hidden)
    if made is None or read is None:
        return None
    return UnitSite(name, module, tuple(made), tuple(read), (Site(f"{name}.{last}", reader),))


def _residual_block(name: str, block: ResnetBlock2D) -> UnitSite | None:
    """Groups of the second norm: made by the first convolution and the timestep, read by the second convolution.

    A shortcut that is a convolution reads channels of the block's input, so that one sum does for both.
    """
    norm = block.norm2
    group = Stretch(Units(norm.num_groups), norm.num_channels // norm.num_groups)
    times = 2 if block.time_embedding_norm == "scale_shift" else 1
    timestep: list[UnitLayer] | None = []
    if block.time_emb_proj is not None:
        timestep = makers(block.time_emb_proj, *[group] * times)
    made = joined(makers(block.conv1, group), timestep)
    shortcut: list[UnitLayer] | None = []
    sums = Site(f"{name}.conv2", block.conv2)
    if block.conv_shortcut is not None:
        shortcut = readers(block.conv_shortcut, Stretch(Units(block.in_channels)))
        sums = Site(name, block)
    read = joined(readers(block.conv2, group), shortcut)
    if made is None or read is None or not isinstance(norm, nn.GroupNorm):
        return None
    return UnitSite(name, block, made, read, (sums,), norms=(UnitLayer(norm, (group,)),))
