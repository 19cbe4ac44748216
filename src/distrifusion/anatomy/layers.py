"""What each kind of layer of diffusers' U-Nets is: pointwise, a site, or unknown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.downsampling import Downsample2D, KDownsample2D
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import KUpsample2D, Upsample2D
from torch import nn

from distrifusion.anatomy.base import (
    AdaptiveNormSite,
    AttentionSite,
    ConvSite,
    EntrySite,
    FilterSite,
    NormSite,
    ResampleSite,
    Site,
    StackSite,
    UpsampleSite,
)
from distrifusion.errors import UnsupportedModel

# Each position is treated by itself (or, for embeddings, there is no position).
_POINTWISE = (nn.Linear, nn.SiLU, nn.GELU, nn.Mish, nn.ReLU, nn.Dropout, nn.Identity, nn.LayerNorm, nn.Embedding)
# Their own code only calls their children, adds, multiplies and reshapes.
_CONTAINERS = {
    "ApproximateGELU", "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D", "BasicTransformerBlock", "ControlNetModel",
    "CrossAttnDownBlock2D", "Decoder", "DownBlock2D", "DownEncoderBlock2D", "Encoder", "FeedForward", "GEGLU", "GELU",
    "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "KAttentionBlock", "KCrossAttnDownBlock2D",
    "KCrossAttnUpBlock2D", "KDownBlock2D", "KUpBlock2D", "ModuleDict", "ModuleList", "ParameterDict", "ResnetBlock2D",
    "ResnetBlockCondNorm2D", "Sequential", "Transformer2DModel", "UNet2DConditionModel", "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn", "UpDecoderBlock2D",
}  # fmt: skip
_PROCESSORS = {
    "AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0", "PAGIdentitySelfAttnProcessor2_0", "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}  # fmt: skip
_MAY_MIX = "it may mix positions of the picture"
_PADS = "it pads by another rule than zeros"
# FreeU (arXiv 2309.11497) scales the skip connections of the first two up blocks, each by a scale of its own.
_FILTER_SCALES = ("s1", "s2")
_FILTER_SWITCHES = ("s1", "s2", "b1", "b2")


def sites_of(name: str, module: nn.Module, level: int, level_out: int) -> list[Site]:
    """The site a module is, if it is one; raises UnsupportedModel if there is no rule for it."""
    if isinstance(module, nn.Conv2d):
        return _conv_site(name, module, level, level_out)
    if isinstance(module, nn.GroupNorm):
        return [NormSite(name, module, level, level)]
    if isinstance(module, Attention):
        return _attention_site(name, module, level)
    if isinstance(module, Upsample2D):
        require(module.interpolate and not module.use_conv_transpose, name, module, "it upsamples by its own rule")
        plain = module.norm is None and type(getattr(module, "conv", None)) is nn.Conv2d
        return [UpsampleSite(name, module, level, level_out, f"{name}.conv" if plain else None)]
    if isinstance(module, Downsample2D):
        require(module.use_conv and module.padding == 1, name, module, "it has no padded convolution")
        return []
    if isinstance(module, CrossAttnUpBlock2D | UpBlock2D):
        scale = dict(enumerate(_FILTER_SCALES)).get(module.resolution_idx)
        return [FilterSite(name, module, level, level, scale, _FILTER_SWITCHES)] if scale else []
    if isinstance(module, AdaGroupNorm):
        return [AdaptiveNormSite(name, module, level, level)]
    if isinstance(module, KDownsample2D | KUpsample2D):
        require(module.pad_mode == "reflect", name, module, "it pads by another rule than reflection")
        margin = 2 if isinstance(module, KDownsample2D) else 1
        return [ResampleSite(name, module, level, level_out, margin)]
    if isinstance(module, ControlNetConditioningEmbedding):
        return [_stack_site(name, module)]
    require(_is_known(module), name, module, _MAY_MIX)
    return []


def check_call(name: str, module: nn.Module) -> None:
    """Refuse a layer whose call is no longer its forward; raises UnsupportedModel with the remedy."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    require(not compiled, name, module, "it is compiled, and exchanges cannot be; parallelize without torch.compile")
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    hooked = f"diffusers hooks ({', '.join(hooks)}) run around it; remove them (group offload, caching, casting)"
    require(not hooks, name, module, hooked)
    # A hook on the whole model moves it before its call; one on a layer moves weights that are read beside the call.
    moved = name != "" and hasattr(module, "_hf_hook")
    require(not moved, name, module, "sequential CPU offload moves its weights; use enable_model_cpu_offload() instead")


def _conv_site(name: str, conv: nn.Conv2d, level: int, level_out: int) -> list[Site]:
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1):
        return []
    require(_pads_with_zeros(conv), name, conv, _PADS)
    if name.split(".")[0] == "conv_in":
        return [EntrySite(name, conv, level, level_out)]
    if ".downsamplers." in name:
        return [ConvSite(name, conv, level, level_out)]
    if ".upsamplers." in name:
        return [ConvSite(name, conv, level_out, level_out)]
    return [ConvSite(name, conv, level, level)]


def _attention_site(name: str, attention: Attention, level: int) -> list[Site]:
    processor = type(attention.processor).__name__
    require(processor in _PROCESSORS, name, attention, f"its processor {processor} may mix positions by its own rule")
    if attention.is_cross_attention:
        return []
    require(not attention.fused_projections, name, attention, "call unfuse_qkv_projections() first")
    require(attention.spatial_norm is None and attention.added_kv_proj_dim is None, name, attention, "it adds inputs")
    return [AttentionSite(name, attention, level, level)]


def _stack_site(name: str, stack: ControlNetConditioningEmbedding) -> StackSite:
    blocks = {f"blocks.{i}": block for i, block in enumerate(stack.blocks)}
    stages = [
        _stage(f"{name}.{part}", module)
        for part, module in {"conv_in": stack.conv_in, **blocks, "conv_out": stack.conv_out}.items()
    ]
    return StackSite(name, stack, 0, 0, tuple(stages))


def _stage(name: str, stage: nn.Module) -> tuple[nn.Conv2d, ...]:
    """The convolutions of one stage of a stack: one, or those of an adapter around it, which read the same rows."""
    convs = []
    for inner, module in stage.named_modules():
        path = f"{name}.{inner}".rstrip(".")
        check_call(path, module)
        if not isinstance(module, nn.Conv2d):
            require(_is_known(module), path, module, _MAY_MIX)
        elif module.kernel_size != (1, 1):
            require(_pads_with_zeros(module), path, module, _PADS)
            convs.append(module)
    require(bool(convs), name, stage, "it has no convolution that could say which rows it reads")
    return tuple(convs)


def _pads_with_zeros(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)


def _is_known(module: nn.Module) -> bool:
    """Whether a layer is pointwise, or only combines its children, which are sites or pointwise themselves."""
    adapter = type(module).__module__.startswith("peft.tuners.")
    return adapter or isinstance(module, _POINTWISE) or type(module).__name__ in _CONTAINERS


def require(condition: bool, name: str, module: nn.Module, why: str) -> None:
    """Raise UnsupportedModel naming the layer unless the condition holds."""
    if not condition:
        raise UnsupportedModel(f"layer '{name}' ({type(module).__name__}) cannot be split into bands: {why}")


def with_readers(sites: list[Site], model: nn.Module) -> list[Site]:
    """The sites, norms with what alone reads them."""
    readers = dict(_norm_readers(model))
    return [replace(s, **readers[s.name]) if isinstance(s, NormSite) and s.name in readers else s for s in sites]


def _norm_readers(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """By the name of a norm: the activation that alone reads it, and the convolution that alone reads that one."""
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            if module.upsample is None and module.downsample is None:
                yield f"{name}.norm1", _reader(module.nonlinearity, module.conv1, f"{name}.conv1")
            if module.dropout.p == 0:
                yield f"{name}.norm2", _reader(module.nonlinearity, module.conv2, f"{name}.conv2")
    if getattr(model, "conv_norm_out", None) is not None:
        yield "conv_norm_out", _reader(model.conv_act, model.conv_out, "conv_out")


def _reader(activation: nn.Module, conv: nn.Module, name: str) -> dict[str, Any]:
    """A convolution with an adapter is read by other layers too, so nothing is said of it."""
    plain = type(activation) is nn.SiLU and type(conv) is nn.Conv2d
    return {"activation": activation, "conv": name} if plain else {}
