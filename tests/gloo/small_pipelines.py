"""Tiny text-to-image pipelines of the true classes, and every scheduler that is supported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models import perturb, sd_unet, sdxl_unet

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

SCHEDULERS: dict[str, Callable[[], SchedulerMixin]] = {
    "ddim": lambda: DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(**_NOISE),
    "euler_ancestral": lambda: EulerAncestralDiscreteScheduler(**_NOISE),
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**_NOISE, use_karras_sigmas=True),
    "dpmpp_2m_sde": lambda: DPMSolverMultistepScheduler(**_NOISE, algorithm_type="sde-dpmsolver++"),
    "dpmpp_sde": lambda: DPMSolverSDEScheduler(**_NOISE),
    "heun": lambda: HeunDiscreteScheduler(**_NOISE),
    "pndm": lambda: PNDMScheduler(**_NOISE, skip_prk_steps=True),
    "pndm_prk": lambda: PNDMScheduler(**_NOISE, skip_prk_steps=False),
    "lcm": lambda: LCMScheduler(**_NOISE),
    "unipc": lambda: UniPCMultistepScheduler(**_NOISE),
}


def tokenizer() -> CLIPTokenizer:
    """A vocabulary of bytes: any text has tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_config(hidden_size: int, vocab_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def autoencoder() -> AutoencoderKL:
    """Factor 8, as in the large models."""
    blocks = 4
    return AutoencoderKL(
        down_block_types=blocks * ("DownEncoderBlock2D",),
        up_block_types=blocks * ("UpDecoderBlock2D",),
        block_out_channels=blocks * (4,),
        norm_num_groups=2,
        latent_channels=4,
    ).eval()


def sdxl_pipeline(scheduler: str) -> StableDiffusionXLPipeline:
    """SDXL in small: two text encoders of 8 and 16 channels, a U-Net of two levels that reads both."""
    words = tokenizer()
    torch.manual_seed(2)
    return _quiet(
        StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=perturb(CLIPTextModel(text_config(8, len(words)))),
            text_encoder_2=perturb(CLIPTextModelWithProjection(text_config(16, len(words)))),
            tokenizer=words,
            tokenizer_2=words,
            unet=sdxl_unet(
                block_out_channels=(16, 32),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1),
                attention_head_dim=(2, 4),
            ),
            scheduler=SCHEDULERS[scheduler](),
            add_watermarker=False,
        )
    )


def sd_pipeline(scheduler: str) -> StableDiffusionPipeline:
    """SD 1.x in small: a U-Net of two levels."""
    words = tokenizer()
    torch.manual_seed(2)
    return _quiet(
        StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=perturb(CLIPTextModel(text_config(24, len(words)))),
            tokenizer=words,
            unet=sd_unet(
                block_out_channels=(16, 32),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            scheduler=SCHEDULERS[scheduler](),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


PIPELINES: dict[str, Callable[[str], DiffusionPipeline]] = {"sdxl": sdxl_pipeline, "sd": sd_pipeline}


def _quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Call:
    """One call of a pipeline, in plain values, so that every process can make it.

    Attributes:
        arguments: given to the pipeline besides the prompt.
        seed: of the global generators on rank 0; the other ranks' are different.
        generator: seed of a generator that is passed to the call, or None.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 5
    generator: int | None = None

    def __call__(self, pipe: DiffusionPipeline, rank: int = 0) -> torch.Tensor:
        """The latents; ranks other than 0 start from random states of their own, as unseeded processes do."""
        torch.manual_seed(self.seed + rank)
        given = dict(_DEFAULTS, **self.arguments)
        if self.generator is not None:
            given["generator"] = torch.Generator().manual_seed(self.generator + rank)
        return pipe(**given).images


_DEFAULTS = {
    "prompt": "a calm lake",
    "height": 200,
    "width": 136,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "output_type": "latent",
}
