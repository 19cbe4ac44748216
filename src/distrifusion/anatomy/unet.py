"""The anatomy of diffusers' UNet2DConditionModel (SD 1.x, SD 2.x, SDXL and their derivatives)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from distrifusion.anatomy.base import BoundCall, LinkSite, Site
from distrifusion.anatomy.layers import check_call, sites_of, with_readers
from distrifusion.errors import ConfigError, UnsupportedModel

# Subtrees that see the timestep, the text or labels, not the picture.
_EMBEDDINGS = ("time_proj", "time_embedding", "class_embedding", "add_time_proj", "add_embedding", "encoder_hid_proj")
# Their convolutions belong to the site that the stack itself is.
_STACKS = ("controlnet_cond_embedding.",)
_BATCHED = ("timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs",
            "encoder_attention_mask", "controlnet_cond")  # fmt: skip
_SPATIAL = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
_SHARED_ATTENTION_KWARGS = {"scale"}
# Children of a block that run one after the other.
_LINKS = ("resnets", "attentions", "downsamplers", "upsamplers")
_ENDS = ("conv_in", "conv_norm_out", "conv_out")


class UNetAnatomy:
    """Facts about UNet2DConditionModel."""

    def num_levels(self, model: Any) -> int:
        return 1 + sum(1 for block in model.down_blocks if block.downsamplers is not None)

    def sites(self, model: nn.Module) -> list[Site]:
        _check_config(model)
        levels = dict(block_levels(model))
        sites: list[Site] = []
        for name, module in model.named_modules():
            head = name.split(".")[0]
            if head in _EMBEDDINGS or name.startswith(_STACKS):
                continue
            block = next((b for b in (".".join(name.split(".")[:2]), head) if b in levels), None)
            level, level_out = levels[block] if block else (0, 0)
            check_call(name, module)
            sites += sites_of(name, module, level, level_out)
        return with_readers(sites, model)

    def links(self, model: nn.Module) -> list[LinkSite]:
        found: list[LinkSite] = []
        for name, module in model.named_modules():
            check_call(name, module)
            parent, _, last = name.rpartition(".")
            if name in _ENDS or (last.isdigit() and parent.rpartition(".")[2] in _LINKS):
                found.append(LinkSite(name, module))
        return found

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

    def exits(self, model: Any) -> tuple[int, ...]:
        return (0,)

    def tensors(self, result: Any) -> list[torch.Tensor]:
        return list(result)

    def stays_cut(self, call: BoundCall) -> bool:
        return False

    def output(self, tensors: list[torch.Tensor], call: BoundCall) -> Any:
        (sample,) = tensors
        return UNet2DConditionOutput(sample=sample) if call.rest.get("return_dict", True) else (sample,)


def _check_config(model: Any) -> None:
    config = model.config
    if config.get("center_input_sample") or config.get("addition_embed_type") == "image_hint":
        raise UnsupportedModel(
            f"{type(model).__name__} changes its input before the first convolution "
            "(center_input_sample or image_hint), for which there is no rule"
        )


def block_levels(model: Any, level: int = 0) -> Iterator[tuple[str, tuple[int, int]]]:
    """Level inside each block, and the level its down- or upsampler leads to; the first block is at `level`."""
    for i, block in enumerate(getattr(model, "down_blocks", ())):
        after = level + (block.downsamplers is not None)
        yield f"down_blocks.{i}", (level, after)
        level = after
    yield "mid_block", (level, level)
    for i, block in enumerate(getattr(model, "up_blocks", ())):
        after = level - (block.upsamplers is not None)
        yield f"up_blocks.{i}", (level, after)
        level = after
