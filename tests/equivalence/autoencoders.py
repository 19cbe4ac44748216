"""Tiny autoencoders of the families' shapes, and one on virtual ranks, to be compared with one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL

from distrifusion.autoencoder import Calls, ParallelCoder
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.plan import Split
from models import perturb, share_weights

T = TypeVar("T")


def sd_vae(**overrides: Any) -> AutoencoderKL:
    """The shape of SD and SDXL in small: 4 latent channels, convolutions that quantise, factor 8."""
    torch.manual_seed(3)
    config: dict[str, Any] = {
        "down_block_types": 4 * ("DownEncoderBlock2D",),
        "up_block_types": 4 * ("UpDecoderBlock2D",),
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 64,
    }
    return perturb(AutoencoderKL(**{**config, **overrides}))


def flux_vae() -> AutoencoderKL:
    """The shape of SD3 and FLUX in small: 16 latent channels, nothing that quantises."""
    shape = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, "force_upcast": False}
    return sd_vae(latent_channels=16, layers_per_block=2, **shape)


def vae_without_attention() -> AutoencoderKL:
    """Two resolutions and no attention in the middle."""
    blocks = {"down_block_types": 2 * ("DownEncoderBlock2D",), "up_block_types": 2 * ("UpDecoderBlock2D",)}
    return sd_vae(block_out_channels=(8, 16), mid_block_add_attention=False, **blocks)


VAES = {make.__name__: make for make in (sd_vae, flux_vae, vae_without_attention)}


def decoded(vae: AutoencoderKL, batch: int, height: int, width: int) -> Callable[[AutoencoderKL], torch.Tensor]:
    """The decoding of random latents [batch, C, height, width]."""
    shape = (batch, vae.config.latent_channels, height, width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(vae.dtype)
    return lambda model: model.decode(latents).sample


def encoded(vae: AutoencoderKL, batch: int, height: int, width: int) -> Callable[[AutoencoderKL], torch.Tensor]:
    """The moments of a random picture [batch, 3, height, width]."""
    pictures = torch.randn((batch, 3, height, width), generator=torch.Generator().manual_seed(5)).to(vae.dtype)
    return lambda model: model.encode(pictures).latent_dist.parameters


def attach(vae: AutoencoderKL, transport: Any, split: Split = Split.ROWS) -> tuple[ParallelCoder, ParallelCoder]:
    """Divide both halves of an autoencoder."""
    coders = (
        ParallelCoder(vae.encoder, split, transport, "encoder."),
        ParallelCoder(vae.decoder, split, transport, "decoder."),
    )
    for coder in coders:
        coder.attach()
    return coders


def on_ranks(
    vae: AutoencoderKL,
    num_ranks: int,
    work: Callable[[AutoencoderKL], T],
    split: Split = Split.ROWS,
    how: Calls = Calls.ALL,
) -> list[T]:
    """What `work(model)` gives on every rank; modules are each rank's own, weights are shared."""

    def body(transport: VirtualTransport) -> T:
        model = share_weights(vae)
        encoder, decoder = attach(model, transport, split)
        with torch.no_grad(), encoder.calls(how), decoder.calls(how):
            return work(model)

    return VirtualWorld(num_ranks).run(body)
