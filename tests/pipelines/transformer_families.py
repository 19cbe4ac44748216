"""Tiny pipelines of diffusers' own classes for transformers, and one call of each at a size that does not divide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModelWithProjection

from gloo.small_pipelines import autoencoder, text_config, tokenizer
from models import perturb
from transformers_tiny import cogvideox, flux, hunyuan, noise, pixart, qwen, sd3, sd35, wan

HEIGHT, WIDTH = 112, 80  # 7x5 tokens of two by two latents
SIZE = {"height": HEIGHT, "width": WIDTH}


def picture() -> torch.Tensor:
    return torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def mask() -> torch.Tensor:
    """1 where to paint: a rectangle across the parts of ranks."""
    painted = torch.zeros(1, 1, HEIGHT, WIDTH)
    painted[..., HEIGHT // 5 : HEIGHT // 2 + 9, WIDTH // 3 :] = 1
    return painted


@dataclass(frozen=True)
class Case:
    """One pipeline and one call of it.

    Attributes:
        make: builds the plain pipeline.
        arguments: of the call, besides steps, generator and output.
        plans: synchronous plans that must equal one device.
    """

    make: Callable[[], DiffusionPipeline]
    arguments: dict[str, Any]
    plans: tuple[str, ...] = ("patch3", "cfg2.ulysses2", "ring2")

    def __call__(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """The latents, or the picture where `output_type` says so."""
        common = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
        generator = torch.Generator().manual_seed(5)
        return pipe(**{**common, "generator": generator, **self.arguments, **changes})[0]


def vae() -> diffusers.AutoencoderKL:
    """Four latent channels, factor 8, shifted as that of SD3."""
    torch.manual_seed(0)
    model = autoencoder()
    model.register_to_config(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    model.quant_conv = model.post_quant_conv = None
    return perturb(model)


def clip(seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(text_config(8, len(tokenizer()))).eval()


@cache
def _euler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def control(cls: Any, transformer: Any) -> Any:
    """A ControlNet that fits a transformer, no layer of it zero; it runs whole on every rank."""
    torch.manual_seed(1)
    return perturb(cls.from_config({**transformer.config, "num_layers": 2}))


def stable_diffusion_3(cls: type[DiffusionPipeline], transformer: Any) -> DiffusionPipeline:
    """Two CLIP encoders, the place of the third one empty."""
    parts = {"text_encoder": clip(0), "text_encoder_2": clip(1), "text_encoder_3": None, "tokenizer_3": None}
    return cls(
        transformer=transformer, vae=vae(), scheduler=_euler(), tokenizer=tokenizer(), tokenizer_2=tokenizer(), **parts
    )


def flux_pipeline(cls: type[DiffusionPipeline], guidance_embeds: bool, **more: Any) -> DiffusionPipeline:
    empty = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return cls(transformer=flux(guidance_embeds), vae=vae(), scheduler=_euler(), **empty, **more)


def pixart_pipeline(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return cls(transformer=pixart(), vae=vae(), scheduler=scheduler, tokenizer=None, text_encoder=None)


def hunyuan_pipeline() -> DiffusionPipeline:
    empty = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker"))
    return diffusers.HunyuanDiTPipeline(
        transformer=hunyuan(), vae=vae(), scheduler=diffusers.DDPMScheduler(), feature_extractor=None,
        requires_safety_checker=False, **empty,
    )  # fmt: skip


def wan_pipeline(two: bool = False) -> DiffusionPipeline:
    """`two`: a second transformer takes over at the lower timesteps, as in Wan 2.2."""
    torch.manual_seed(0)
    video_vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    more = {"transformer_2": perturb(wan(in_channels=16, out_channels=16), 9), "boundary_ratio": 0.6} if two else {}
    return diffusers.WanPipeline(
        transformer=wan(in_channels=16, out_channels=16), vae=video_vae.eval(), text_encoder=None, tokenizer=None,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), **more,
    )  # fmt: skip


def cogvideox_pipeline() -> DiffusionPipeline:
    torch.manual_seed(0)
    blocks = 4
    video_vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=blocks * ("CogVideoXDownBlock3D",), up_block_types=blocks * ("CogVideoXUpBlock3D",),
        block_out_channels=blocks * (8,), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        transformer=cogvideox(), vae=video_vae.eval(), scheduler=diffusers.CogVideoXDDIMScheduler(), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip


def qwen_pipeline() -> DiffusionPipeline:
    torch.manual_seed(0)
    picture_vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=qwen(), vae=picture_vae.eval(), scheduler=_euler(), text_encoder=None, tokenizer=None
    )


def _sd3_cases() -> dict[str, Case]:
    prompt = {"prompt": "a lake", "negative_prompt": "fog", "max_sequence_length": 9}
    image = {**prompt, **SIZE, "image": picture(), "strength": 0.9}
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    text, from_image = diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusion3Img2ImgPipeline
    return {
        "StableDiffusion3Pipeline": Case(lambda: stable_diffusion_3(text, sd3()), {**prompt, **SIZE}),
        "StableDiffusion3Pipeline, SD 3.5 medium": Case(
            lambda: stable_diffusion_3(text, sd35()), {**prompt, **SIZE, **skipped}
        ),
        "StableDiffusion3Img2ImgPipeline": Case(lambda: stable_diffusion_3(from_image, sd3()), image),
    }


def _flux_cases() -> dict[str, Case]:
    text = {"prompt_embeds": noise(1, 7, 24, seed=4), "pooled_prompt_embeds": noise(1, 16, seed=5)}
    negative = {
        "negative_prompt_embeds": noise(1, 7, 24, seed=6), "negative_pooled_prompt_embeds": noise(1, 16, seed=7),
        "true_cfg_scale": 2.0,
    }  # fmt: skip
    name, from_image = diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline
    return {
        "FluxPipeline, dev": Case(lambda: flux_pipeline(name, True), {**text, **SIZE}),
        "FluxPipeline, schnell": Case(lambda: flux_pipeline(name, False), {**text, **SIZE, "guidance_scale": 0.0}),
        "FluxPipeline, true guidance": Case(lambda: flux_pipeline(name, True), {**text, **negative, **SIZE}),
        "FluxImg2ImgPipeline": Case(
            lambda: flux_pipeline(from_image, True), {**text, **SIZE, "image": picture(), "strength": 0.9}
        ),
        "FluxInpaintPipeline": Case(
            lambda: flux_pipeline(diffusers.FluxInpaintPipeline, True),
            {**text, **SIZE, "image": picture(), "mask_image": mask(), "strength": 0.9},
            ("patch3",),
        ),
        "FluxKontextPipeline": Case(
            lambda: flux_pipeline(diffusers.FluxKontextPipeline, True),
            {**text, **SIZE, "image": picture(), "_auto_resize": False, "max_area": HEIGHT * WIDTH},
            ("ulysses2",),
        ),
        "FluxControlNetPipeline": Case(
            lambda: flux_pipeline(
                diffusers.FluxControlNetPipeline, True, controlnet=control(diffusers.FluxControlNetModel, flux())
            ),
            {**text, **SIZE, "control_image": picture(), "controlnet_conditioning_scale": 0.7},
            ("patch3", "ring2"),
        ),
    }


def _with_text_of_their_own() -> dict[str, Case]:
    text = {
        "prompt_embeds": noise(1, 7, 12, seed=4), "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "negative_prompt_embeds": noise(1, 7, 12, seed=6), "prompt": None, "negative_prompt": None,
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]), "use_resolution_binning": False,
    }  # fmt: skip
    two_texts = {
        "prompt_embeds": noise(1, 4, 12, seed=4), "prompt_attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "negative_prompt_embeds": noise(1, 4, 12, seed=6),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 0, 0]]),
        "prompt_embeds_2": noise(1, 3, 16, seed=5), "prompt_attention_mask_2": torch.tensor([[1, 1, 0]]),
        "negative_prompt_embeds_2": noise(1, 3, 16, seed=7),
        "negative_prompt_attention_mask_2": torch.ones(1, 3).long(),
        "prompt": None, "use_resolution_binning": False,
    }  # fmt: skip
    video = {
        "prompt_embeds": noise(1, 7, 16, seed=4), "negative_prompt_embeds": noise(1, 5, 16, seed=6),
        "height": 48, "width": 80, "num_frames": 9,
    }  # fmt: skip
    words = {
        "prompt_embeds": noise(1, 7, 16, seed=4), "prompt_embeds_mask": torch.ones(1, 7).long(),
        "negative_prompt_embeds": noise(1, 4, 16, seed=6), "negative_prompt_embeds_mask": torch.ones(1, 4).long(),
        "true_cfg_scale": 2.0, "guidance_scale": None,
    }  # fmt: skip
    return {
        "PixArtAlphaPipeline": Case(lambda: pixart_pipeline(diffusers.PixArtAlphaPipeline), {**text, **SIZE}),
        "PixArtSigmaPipeline": Case(lambda: pixart_pipeline(diffusers.PixArtSigmaPipeline), {**text, **SIZE}),
        "HunyuanDiTPipeline": Case(hunyuan_pipeline, {**two_texts, **SIZE}),
        "WanPipeline": Case(wan_pipeline, video),
        "WanPipeline, two transformers": Case(lambda: wan_pipeline(two=True), video),
        "CogVideoXPipeline": Case(
            cogvideox_pipeline, {**video, "negative_prompt_embeds": noise(1, 7, 16, seed=6), "max_sequence_length": 7}
        ),
        "QwenImagePipeline": Case(qwen_pipeline, {**words, **SIZE}),
    }


PIPELINES = {**_sd3_cases(), **_flux_cases(), **_with_text_of_their_own()}
