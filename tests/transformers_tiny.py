"""Tiny diffusion transformers of the true classes, and one call of each at a number of tokens that does not divide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_3d_rotary_pos_embed

from models import perturb

Inputs = dict[str, Any]


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sd3(**changes: Any) -> SD3Transformer2DModel:
    """SD 3's blocks in small: joint attention, the last block without a text of its own."""
    torch.manual_seed(0)
    config = {
        "sample_size": 32, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 3, "joint_attention_dim": 24, "caption_projection_dim": 24,
        "pooled_projection_dim": 16, "pos_embed_max_size": 24,
    }  # fmt: skip
    return perturb(SD3Transformer2DModel(**{**config, **changes}))


def sd35(**changes: Any) -> SD3Transformer2DModel:
    """SD 3.5 medium's: also attention over the picture alone, and norms of queries and keys."""
    return sd3(**{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **changes})


def sd3_inputs(batch: int, height: int, width: int) -> Inputs:
    """Latents [batch, 4, height, width], both even."""
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, 7, 24, seed=4),
        "pooled_projections": noise(batch, 16, seed=5),
        "timestep": torch.full((batch,), 500.0),
    }


def flux(guidance_embeds: bool = True, **changes: Any) -> FluxTransformer2DModel:
    """FLUX.1's blocks in small: two streams, then one; `guidance_embeds` as in dev, without as in schnell."""
    torch.manual_seed(1)
    config = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "joint_attention_dim": 24, "pooled_projection_dim": 16, "guidance_embeds": guidance_embeds,
        "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return perturb(FluxTransformer2DModel(**{**config, **changes}))


def flux_inputs(batch: int, height: int, width: int, guidance: bool = True) -> Inputs:
    """Latents of height times width tokens."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    inputs = {
        "hidden_states": noise(batch, height * width, 16),
        "encoder_hidden_states": noise(batch, 7, 24, seed=4),
        "pooled_projections": noise(batch, 16, seed=5),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(7, 3),
    }
    return {**inputs, "guidance": torch.full((batch,), 3.5)} if guidance else inputs


def flux2(**changes: Any) -> Flux2Transformer2DModel:
    """FLUX.2's blocks in small: attention and feed-forward share their projections in blocks of one stream."""
    torch.manual_seed(1)
    config = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "joint_attention_dim": 24, "timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
    }  # fmt: skip
    return perturb(Flux2Transformer2DModel(**{**config, **changes}))


def flux2_inputs(batch: int, height: int, width: int) -> Inputs:
    """Latents of height times width tokens; positions have the batch as first dimension."""
    inputs = flux_inputs(batch, height, width)
    ids = torch.cat([inputs["img_ids"], torch.zeros(height * width, 1)], 1)
    ids = {"img_ids": ids.expand(batch, -1, -1), "txt_ids": torch.zeros(batch, 7, 4)}
    return {**{name: value for name, value in inputs.items() if name != "pooled_projections"}, **ids}


def pixart(**changes: Any) -> PixArtTransformer2DModel:
    """PixArt's blocks in small: attention over the picture, then to the text; alpha also reads the picture's size."""
    torch.manual_seed(2)
    config = {
        "sample_size": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 3, "cross_attention_dim": 24, "caption_channels": 12, "norm_num_groups": 1,
        "use_additional_conditions": False,
    }  # fmt: skip
    return perturb(PixArtTransformer2DModel(**{**config, **changes}))


def pixart_inputs(batch: int, height: int, width: int, sized: bool = False) -> Inputs:
    """Latents [batch, 4, height, width], both even; the last words of the text are masked."""
    added = {"resolution": torch.full((batch, 2), 16.0), "aspect_ratio": torch.ones(batch, 1)} if sized else {}
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, 7, 12, seed=4),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * batch),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": added or {"resolution": None, "aspect_ratio": None},
    }


def hunyuan(**changes: Any) -> HunyuanDiT2DModel:
    """Hunyuan-DiT's blocks in small: skip connections between the halves, rotary tables as an argument."""
    torch.manual_seed(3)
    config = {
        "sample_size": 16, "in_channels": 4, "patch_size": 2, "num_layers": 6, "attention_head_dim": 8,
        "num_attention_heads": 3, "hidden_size": 24, "cross_attention_dim": 12, "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8, "text_len": 4, "text_len_t5": 3,
    }  # fmt: skip
    return perturb(HunyuanDiT2DModel(**{**config, **changes}))


def hunyuan_inputs(batch: int, height: int, width: int) -> Inputs:
    """Latents [batch, 4, height, width], both even."""
    grid = (height // 2, width // 2)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, 4, 12, seed=4),
        "text_embedding_mask": torch.tensor([[1, 1, 1, 0]] * batch),
        "encoder_hidden_states_t5": noise(batch, 3, 16, seed=5),
        "text_embedding_mask_t5": torch.tensor([[1, 1, 0]] * batch),
        "image_meta_size": torch.full((batch, 6), 16.0),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), grid), grid, output_type="pt"),
    }


def wan(**changes: Any) -> WanTransformer3DModel:
    """Wan's blocks in small: latents of a video, in patches of two by two."""
    torch.manual_seed(4)
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 3,
        "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32,
    }  # fmt: skip
    return perturb(WanTransformer3DModel(**{**config, **changes}))


def wan_inputs(batch: int, height: int, width: int, timesteps_of_tokens: bool = False) -> Inputs:
    """Latents [batch, 4, 3, height, width], both even; Wan 2.2 can give each token a timestep of its own."""
    num_tokens = 3 * (height // 2) * (width // 2)
    each = torch.linspace(100, 500, num_tokens).expand(batch, -1)
    return {
        "hidden_states": noise(batch, 4, 3, height, width),
        "encoder_hidden_states": noise(batch, 7, 16, seed=4),
        "timestep": each if timesteps_of_tokens else torch.full((batch,), 500.0),
    }


def qwen(**changes: Any) -> QwenImageTransformer2DModel:
    """Qwen-Image's blocks in small: joint attention, words masked inside it."""
    torch.manual_seed(5)
    config = {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return perturb(QwenImageTransformer2DModel(**{**config, **changes}))


def qwen_inputs(batch: int, height: int, width: int) -> Inputs:
    """Latents of height times width tokens; the last words of the text are masked."""
    return {
        "hidden_states": noise(batch, height * width, 16),
        "encoder_hidden_states": noise(batch, 7, 16, seed=4),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * batch),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * batch,
    }


def cogvideox(**changes: Any) -> CogVideoXTransformer3DModel:
    """CogVideoX's blocks in small: words and video in one attention, rotary tables as in 5B."""
    torch.manual_seed(7)
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3,
        "time_embed_dim": 8, "text_embed_dim": 16, "max_text_seq_length": 7, "sample_width": 10, "sample_height": 6,
        "sample_frames": 9, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    return perturb(CogVideoXTransformer3DModel(**{**config, **changes}))


def cogvideox_inputs(batch: int, height: int, width: int) -> Inputs:
    """Latents [batch, 3, 4, height, width], both even."""
    grid = (height // 2, width // 2)
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, 3)
    return {
        "hidden_states": noise(batch, 3, 4, height, width),
        "encoder_hidden_states": noise(batch, 7, 16, seed=4),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": rotary,
    }


def ltx(**changes: Any) -> LTXVideoTransformer3DModel:
    """LTX-Video's blocks in small; diffusers' plan for it cuts the text too, which attention alone reads."""
    torch.manual_seed(6)
    config = {
        "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "cross_attention_dim": 24, "caption_channels": 16,
    }  # fmt: skip
    return perturb(LTXVideoTransformer3DModel(**{**config, **changes}))


def ltx_inputs(batch: int, height: int, width: int) -> Inputs:
    """Latents of 3 frames of height times width tokens; the last words of the text are masked."""
    return {
        "hidden_states": noise(batch, 3 * height * width, 16),
        "encoder_hidden_states": noise(batch, 7, 16, seed=4),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * batch),
        "timestep": torch.full((batch,), 500.0),
        "num_frames": 3,
        "height": height,
        "width": width,
    }


@dataclass(frozen=True)
class Family:
    """One family: how a model is made, and the arguments of a call by batch size, height and width."""

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    size: tuple[int, int]


FAMILIES = {
    "SD3": Family(sd3, sd3_inputs, (14, 10)),
    "SD3.5 medium": Family(sd35, sd3_inputs, (14, 10)),
    "FLUX.1 dev": Family(flux, flux_inputs, (7, 5)),
    "FLUX.1 schnell": Family(lambda: flux(False), lambda b, h, w: flux_inputs(b, h, w, False), (7, 5)),
    "FLUX.2": Family(flux2, flux2_inputs, (7, 5)),
    "PixArt-Sigma": Family(pixart, pixart_inputs, (14, 10)),
    "PixArt-alpha": Family(
        lambda: pixart(use_additional_conditions=True), lambda b, h, w: pixart_inputs(b, h, w, True), (14, 10)
    ),
    "Hunyuan-DiT": Family(hunyuan, hunyuan_inputs, (14, 10)),
    "Wan 2.1": Family(wan, wan_inputs, (6, 10)),
    "Wan 2.2, a timestep of each token": Family(wan, lambda b, h, w: wan_inputs(b, h, w, True), (6, 10)),
    "CogVideoX 5B": Family(cogvideox, cogvideox_inputs, (6, 10)),
    "CogVideoX 2B": Family(
        lambda: cogvideox(use_rotary_positional_embeddings=False),
        lambda b, h, w: {**cogvideox_inputs(b, h, w), "image_rotary_emb": None},
        (6, 10),
    ),
    "Qwen-Image": Family(qwen, qwen_inputs, (7, 5)),
    "LTX-Video": Family(ltx, ltx_inputs, (3, 5)),
}
