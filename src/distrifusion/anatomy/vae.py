"""The anatomy of the two halves of diffusers' AutoencoderKL (SD, SDXL, SD3, FLUX): its encoder and its decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from torch import nn

from distrifusion.anatomy.base import ConvSite, Site
from distrifusion.anatomy.layers import check_call, require, sites_of, with_readers
from distrifusion.anatomy.unet import block_levels
from distrifusion.errors import UnsupportedModel

# What stands before the first block and after the last one, and what only holds others.
_HEADS = ("", "conv_in", "down_blocks", "up_blocks")
_TAILS = ("conv_norm_out", "conv_act", "conv_out")


class EncoderAnatomy:
    """Facts about Encoder: from pixels (level 0) to latents."""

    gives_pictures = False

    def entry(self, model: Any) -> int:
        """Level of the input."""
        return 0

    def exit(self, model: Any) -> int:
        """Level of the output."""
        return self.num_levels(model) - 1

    def num_levels(self, model: Any) -> int:
        """Number of resolutions."""
        return 1 + sum(block.downsamplers is not None for block in model.down_blocks)

    def shapes(self, model: Any, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Height and width of every level, finest first, for an input of the size given."""
        return tuple((height >> i, width >> i) for i in range(self.num_levels(model)))

    def sites(self, model: nn.Module) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""
        return _sites(model, self.entry(model), self.exit(model))


class DecoderAnatomy:
    """Facts about Decoder: from latents to pixels (level 0)."""

    gives_pictures = True

    def entry(self, model: Any) -> int:
        """Level of the input."""
        return self.num_levels(model) - 1

    def exit(self, model: Any) -> int:
        """Level of the output."""
        return 0

    def num_levels(self, model: Any) -> int:
        """Number of resolutions."""
        return 1 + sum(block.upsamplers is not None for block in model.up_blocks)

    def shapes(self, model: Any, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Height and width of every level, finest first, for an input of the size given."""
        return tuple((height << i, width << i) for i in reversed(range(self.num_levels(model))))

    def sites(self, model: nn.Module) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""
        return _sites(model, self.entry(model), self.exit(model))


CoderAnatomy = EncoderAnatomy | DecoderAnatomy


def halves_of(name: str, component: Any) -> dict[str, nn.Module]:
    """The halves of a pipeline's component that have an anatomy here, by the prefix of their layers' names."""
    halves = {f"{name}.{half}.": getattr(component, half, None) for half in ("encoder", "decoder")}
    return {prefix: half for prefix, half in halves.items() if isinstance(half, Encoder | Decoder)}


def coder_anatomy_of(model: nn.Module) -> CoderAnatomy:
    """The anatomy of half an autoencoder.

    Raises:
        UnsupportedModel: if it is of no known kind.
    """
    if isinstance(model, Encoder):
        return EncoderAnatomy()
    if isinstance(model, Decoder):
        return DecoderAnatomy()
    raise UnsupportedModel(f"{type(model).__name__} has no anatomy here; known are Encoder and Decoder of diffusers")


def _sites(model: Any, entry: int, exit: int) -> list[Site]:
    levels = {**dict.fromkeys(_HEADS, (entry, entry)), **dict.fromkeys(_TAILS, (exit, exit))}
    levels |= dict(block_levels(model, entry))
    padding: tuple[str, ...] = ()
    sites: list[Site] = []
    for name, module in model.named_modules():
        block = ".".join(name.split(".")[:2])
        level, level_out = levels[block if block in levels else name.split(".")[0]]
        check_call(name, module)
        if isinstance(module, Downsample2D) and module.padding == 0:
            require(module.use_conv and module.norm is None, name, module, "it is more than a padded convolution")
            padding += (f"{name}.",)
            continue
        sites += sites_of(name, module, level, level_out)
    sites = [replace(s, padded=1) if isinstance(s, ConvSite) and s.name.startswith(padding) else s for s in sites]
    return with_readers(sites, model)
