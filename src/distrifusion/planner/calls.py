"""The arguments of one denoiser call as tensors without values, for the families whose calls are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import nn

from distrifusion.errors import ConfigError, UnsupportedModel

Arguments = dict[str, Any]

_PATCH = 2  # latents of FLUX and Qwen-Image come as patches of 2 x 2
_CLIP_WORDS, _T5_WORDS, _PIXART_WORDS, _SD3_WORDS = 77, 512, 120, 333
_TIME_IDS = 6
_WAN_FRAMES = 21  # latent frames of the 81 that its pipelines make if nothing else is said
_COGVIDEOX_RATIO = 4  # frames of a video to one of the latents, the first one aside
# Families whose pipelines call the denoiser once for each branch of guidance, one after the other.
_ONE_BRANCH_A_CALL = ("WanTransformer3DModel", "QwenImageTransformer2DModel")


def arguments(model: nn.Module, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    """What a pipeline calls its denoiser with.

    Args:
        model: the denoiser, on the meta device.
        batch: rows of the batch, guidance branches included.
        height, width: of the latents.
        dtype: of the latents and the prompt.

    Raises:
        ConfigError: if the latents have no row.
        UnsupportedModel: if nothing is known of the calls of such a model.
    """
    if min(batch, height, width) < 1:
        raise ConfigError(f"a call of {batch} rows with latents of {height}x{width}: each is at least 1")
    for name in (base.__name__ for base in type(model).__mro__):
        if name in _FAMILIES:
            with torch.device("meta"):
                return _FAMILIES[name](model.config, batch, height, width, dtype)
    raise UnsupportedModel(
        f"{type(model).__name__}: no rule says what it is called with, so no plan can be chosen for it; name a plan "
        f"(known are {', '.join(_FAMILIES)})"
    )


def branches(model: nn.Module) -> int:
    """Rows of the batch for one picture with guidance: 1 where it is an input of the network, or of another call."""
    distilled = isinstance(model, Flux2Transformer2DModel) or getattr(model.config, "guidance_embeds", None) is not None
    return 1 if distilled or calls_per_step(model) > 1 else 2


def calls_per_step(model: nn.Module) -> int:
    """Denoiser calls of a step with guidance, one after the other."""
    return 2 if type(model).__name__ in _ONE_BRANCH_A_CALL else 1


def _unet(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    given: Arguments = {
        "sample": torch.empty(batch, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.empty(()),
        "encoder_hidden_states": torch.empty(batch, _CLIP_WORDS, config.cross_attention_dim, dtype=dtype),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, pooled, dtype=dtype),
            "time_ids": torch.empty(batch, _TIME_IDS, dtype=dtype),
        }
    return given


def _flux(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    tokens = max(1, height // _PATCH) * max(1, width // _PATCH)
    given: Arguments = {
        "hidden_states": torch.empty(batch, tokens, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, _T5_WORDS, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(_T5_WORDS, 3),
    }
    return {**given, "guidance": torch.empty(batch, dtype=dtype)} if config.guidance_embeds else given


def _sd3(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    return {
        "hidden_states": torch.empty(batch, config.in_channels, height, width, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, _SD3_WORDS, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
    }


def _pixart(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    given: Arguments = {
        "hidden_states": torch.empty(batch, config.in_channels, height, width, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, _PIXART_WORDS, config.caption_channels, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    if config.use_additional_conditions or (config.use_additional_conditions is None and config.sample_size == 128):
        given["added_cond_kwargs"] = {
            "resolution": torch.empty(batch, 2, dtype=dtype),
            "aspect_ratio": torch.empty(batch, 1, dtype=dtype),
        }
    return given


def _flux2(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    tokens = max(1, height // _PATCH) * max(1, width // _PATCH)
    return {
        "hidden_states": torch.empty(batch, tokens, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, _T5_WORDS, config.joint_attention_dim, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "img_ids": torch.empty(batch, tokens, 4),
        "txt_ids": torch.empty(batch, _T5_WORDS, 4),
        "guidance": torch.empty(batch, dtype=dtype),
    }


def _qwen(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    rows, columns = max(1, height // _PATCH), max(1, width // _PATCH)
    return {
        "hidden_states": torch.empty(batch, rows * columns, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, _T5_WORDS, config.joint_attention_dim, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


def _hunyuan(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    tokens = (height // config.patch_size) * (width // config.patch_size)
    head = config.attention_head_dim
    return {
        "hidden_states": torch.empty(batch, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, config.text_len, config.cross_attention_dim, dtype=dtype),
        "text_embedding_mask": torch.empty(batch, config.text_len, dtype=torch.long),
        "encoder_hidden_states_t5": torch.empty(batch, config.text_len_t5, config.cross_attention_dim_t5, dtype=dtype),
        "text_embedding_mask_t5": torch.empty(batch, config.text_len_t5, dtype=torch.long),
        "image_meta_size": torch.empty(batch, _TIME_IDS, dtype=dtype),
        "style": torch.empty(batch, dtype=torch.long),
        "image_rotary_emb": (torch.empty(tokens, head), torch.empty(tokens, head)),
    }


def _wan(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    return {
        "hidden_states": torch.empty(batch, config.in_channels, _WAN_FRAMES, height, width, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, _T5_WORDS, config.text_dim, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
    }


def _cogvideox(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Arguments:
    frames = (config.sample_frames - 1) // _COGVIDEOX_RATIO + 1
    at_once = config.patch_size_t or 1
    frames = -(-frames // at_once) * at_once
    given: Arguments = {
        "hidden_states": torch.empty(batch, frames, config.in_channels, height, width, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, config.max_text_seq_length, config.text_embed_dim, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
    }
    if config.use_rotary_positional_embeddings:
        tokens = frames // at_once * (height // config.patch_size) * (width // config.patch_size)
        given["image_rotary_emb"] = tuple(torch.empty(tokens, config.attention_head_dim) for _ in range(2))
    return given


_FAMILIES: dict[str, Callable[..., Arguments]] = {
    "UNet2DConditionModel": _unet,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "HunyuanDiT2DModel": _hunyuan,
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
}
