"""What a picture takes outside the denoiser: the prompt's encoding by one rank, and the VAE's decoding by all.

Both are counted on the meta device, as denoiser calls are: the decoder by the code that divides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

from distrifusion.autoencoder import Calls, ParallelCoder
from distrifusion.errors import UnsupportedModel
from distrifusion.plan import Plan, Split
from distrifusion.planner.operations import Counting, Operations
from distrifusion.planner.rehearsal import CallWork, SilentTransport

_MOST_WORDS = 512  # of encoders that know no limit (T5), and of those that could read more than pipelines give them


def rehearse_decoding(vae: nn.Module, plan: Plan, latents: torch.Tensor) -> CallWork | None:
    """What rank 0, which gets the picture, does when latents [B, C, H, W] on the meta device become pictures.

    None for an autoencoder that is of another kind than AutoencoderKL. One that has no rule runs whole on every rank.
    """
    if not isinstance(vae, AutoencoderKL) or not isinstance(vae.decoder, Decoder):
        return None
    transport = SilentTransport(0, plan.num_ranks, {})
    split = Split.ROWS if plan.split is Split.ALTERNATING else plan.split
    coder = ParallelCoder(vae.decoder, split, transport, "vae.decoder.") if plan.num_ranks > 1 else None
    try:
        if coder is not None:
            coder.attach()
    except UnsupportedModel:
        coder = None
    try:
        return _decode(vae, coder, transport, latents)
    finally:
        if coder is not None:
            coder.detach()


def _decode(
    vae: AutoencoderKL, coder: ParallelCoder | None, transport: SilentTransport, latents: torch.Tensor
) -> CallWork:
    transport.begin()
    with torch.no_grad(), Counting() as counting:
        if coder is None:
            vae.decode(latents)
        else:
            with coder.calls(Calls.FIRST):
                vae.decode(latents)
    return CallWork(counting.operations, posts=transport.posts)


@dataclass(frozen=True)
class LeftOut:
    """A part of the pipeline whose seconds are in no prediction, and why."""

    part: str
    reason: str


def rehearse_encoding(
    encoders: Mapping[str, nn.Module], num_prompts: int
) -> tuple[list[Operations], tuple[LeftOut, ...]]:
    """What text encoders on the meta device do for some prompts, one after the other as pipelines do.

    One that cannot be called with word numbers alone is left out, and is the second thing that is told.
    """
    found, left_out = [], []
    for part, encoder in encoders.items():
        words = torch.zeros(1, _num_words(encoder), dtype=torch.long, device="meta")
        try:
            with torch.no_grad(), Counting() as counting:
                for _ in range(num_prompts):
                    encoder(input_ids=words)
        except Exception as error:  # other libraries miss an argument in ways of their own
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            left_out.append(LeftOut(part, f"a {type(encoder).__name__}, called with word numbers alone: {why}"))
        else:
            found.append(counting.operations)
    return found, tuple(left_out)


def _num_words(encoder: Any) -> int:
    config = getattr(encoder, "config", None)
    return min(getattr(config, "max_position_embeddings", None) or _MOST_WORDS, _MOST_WORDS)
