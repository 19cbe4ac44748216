"""The anatomy of diffusers' UNet2DConditionModel (SD 1.x, SD 2.x, SDXL and their derivatives)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn

from distrifusion.anatomy.base import AttentionSite, BoundCall, ConvSite, EntrySite, NormSite, Site, UpsampleSite
from distrifusion.errors import ConfigError, UnsupportedModel

# Each position is treated by itself (or, for embeddings, there is no position).
_POINTWISE = (nn.Linear, nn.SiLU, nn.GELU, nn.Mish, nn.ReLU, nn.Dropout, nn.Identity, nn.LayerNorm, nn.Embedding)
# Their own code only calls their children, adds, multiplies and reshapes.
_CONTAINERS = {
    "ApproximateGELU", "BasicTransformerBlock", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D",
    "FeedForward", "GEGLU", "GELU", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "ModuleDict", "ModuleList",
    "ParameterDict", "ResnetBlock2D", "Sequential", "Transformer2DModel", "UNet2DConditionModel", "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn", "UpBlock2D",
}  # fmt: skip
# Subtrees that see the timestep, the text or labels, not the picture.
_EMBEDDINGS = ("time_proj", "time_embedding", "class_embedding", "add_time_proj", "add_embedding", "encoder_hid_proj")
_PROCESSORS = {
    "AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0",
    "SlicedAttnProcessor", "XFormersAttnProcessor",
}  # fmt: skip
_BATCHED = ("timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs",
            "encoder_attention_mask")  # fmt: skip
_SPATIAL = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
_FREE_U = ("s1", "s2", "b1", "b2")
_SHARED_ATTENTION_KWARGS = {"scale"}


class UNetAnatomy:
    """Facts about UNet2DConditionModel."""

    def num_levels(self, model: Any) -> int:
        return 1 + sum(1 for block in model.down_blocks if block.downsamplers is not None)

    def sites(self, model: nn.Module) -> list[Site]:
        _check_config(model)
        levels = dict(_block_levels(model))
        sites: list[Site] = []
        for name, module in model.named_modules():
            head = name.split(".")[0]
            if head in _EMBEDDINGS:
                continue
            block = next((b for b in (".".join(name.split(".")[:2]), head) if b in levels), None)
            level, level_out = levels[block] if block else (0, 0)
            sites += _site(name, module, level, level_out)
        readers = dict(_norm_readers(model))
        return [replace(s, **readers[s.name]) if isinstance(s, NormSite) and s.name in readers else s for s in sites]

    def bind(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundCall:
        bound = inspect.signature(forward).bind(*args, **kwargs).arguments
        if bound.get("attention_mask") is not None:
            raise ConfigError("attention_mask over picture positions cannot be cut into bands; leave it None")
        shared = set(bound.get("cross_attention_kwargs") or {})
        if shared - _SHARED_ATTENTION_KWARGS:
            names = ", ".join(sorted(shared - _SHARED_ATTENTION_KWARGS))
            raise ConfigError(f"cross_attention_kwargs {names} have no rule for bands; only 'scale' can be given")
        sample = bound.pop("sample")
        batched = {name: bound.pop(name) for name in _BATCHED if name in bound}
        spatial = {name: bound.pop(name) for name in _SPATIAL if name in bound}
        return BoundCall(sample, batched, spatial, rest=dict(bound))

    def output(self, sample: torch.Tensor, call: BoundCall) -> Any:
        return UNet2DConditionOutput(sample=sample) if call.rest.get("return_dict", True) else (sample,)


def _check_config(model: Any) -> None:
    if model.config.center_input_sample or model.config.addition_embed_type == "image_hint":
        raise UnsupportedModel(
            f"{type(model).__name__} changes its input before the first convolution "
            "(center_input_sample or image_hint), for which there is no rule"
        )


def _block_levels(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Level inside each block, and the level its down- or upsampler leads to."""
    level = 0
    for i, block in enumerate(model.down_blocks):
        after = level + (block.downsamplers is not None)
        yield f"down_blocks.{i}", (level, after)
        level = after
    yield "mid_block", (level, level)
    for i, block in enumerate(model.up_blocks):
        after = level - (block.upsamplers is not None)
        yield f"up_blocks.{i}", (level, after)
        level = after


def _norm_readers(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """By the name of a norm: the activation that alone reads it, and the convolution that alone reads that one."""
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            if module.upsample is None and module.downsample is None:
                yield f"{name}.norm1", _reader(module.nonlinearity, module.conv1, f"{name}.conv1")
            yield f"{name}.norm2", _reader(module.nonlinearity, module.conv2, f"{name}.conv2")
    if getattr(model, "conv_norm_out", None) is not None:
        yield "conv_norm_out", _reader(model.conv_act, model.conv_out, "conv_out")


def _reader(activation: nn.Module, conv: nn.Module, name: str) -> dict[str, Any]:
    """A convolution with an adapter is read by other layers too, so nothing is said of it."""
    plain = type(activation) is nn.SiLU and type(conv) is nn.Conv2d
    return {"activation": activation, "conv": name} if plain else {}


def _site(name: str, module: nn.Module, level: int, level_out: int) -> list[Site]:
    """The site a module is, if it is one; raises UnsupportedModel if there is no rule for it."""
    if isinstance(module, nn.Conv2d):
        return _conv_site(name, module, level, level_out)
    if isinstance(module, nn.GroupNorm):
        return [NormSite(name, module, level, level)]
    if isinstance(module, Attention):
        return _attention_site(name, module, level)
    if isinstance(module, Upsample2D):
        _require(module.interpolate and not module.use_conv_transpose, name, module, "it upsamples by its own rule")
        return [UpsampleSite(name, module, level, level_out)]
    if isinstance(module, Downsample2D):
        _require(module.use_conv and module.padding == 1, name, module, "it has no padded convolution")
        return []
    if any(getattr(module, name, None) is not None for name in _FREE_U):
        _require(False, name, module, "FreeU filters it over the whole picture; call disable_freeu() first")
    known = isinstance(module, _POINTWISE) or type(module).__name__ in _CONTAINERS
    _require(known or _is_adapter(module), name, module, "it may mix positions of the picture")
    return []


def _conv_site(name: str, conv: nn.Conv2d, level: int, level_out: int) -> list[Site]:
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1):
        return []
    padded = conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)
    _require(padded, name, conv, "it pads by another rule than zeros")
    if name.split(".")[0] == "conv_in":
        return [EntrySite(name, conv, 0, 0)]
    if ".downsamplers." in name:
        return [ConvSite(name, conv, level, level_out)]
    if ".upsamplers." in name:
        return [ConvSite(name, conv, level_out, level_out)]
    return [ConvSite(name, conv, level, level)]


def _attention_site(name: str, attention: Attention, level: int) -> list[Site]:
    processor = type(attention.processor).__name__
    _require(processor in _PROCESSORS, name, attention, f"its processor {processor} may mix positions by its own rule")
    if attention.is_cross_attention:
        return []
    _require(not attention.fused_projections, name, attention, "call unfuse_qkv_projections() first")
    _require(attention.spatial_norm is None and attention.added_kv_proj_dim is None, name, attention, "it adds inputs")
    return [AttentionSite(name, attention, level, level)]


def _is_adapter(module: nn.Module) -> bool:
    """Layers of a LoRA adapter: they add the outputs of child layers, which are sites or pointwise themselves."""
    return type(module).__module__.startswith("peft.tuners.")


def _require(condition: bool, name: str, module: nn.Module, why: str) -> None:
    if not condition:
        raise UnsupportedModel(f"layer '{name}' ({type(module).__name__}) cannot be split into bands: {why}")
