"""The heads of diffusers' attention modules, and the hidden units of blocks that have both side by side."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.units import Stretch, UnitCount, UnitLayer, Units, UnitSite, joined, makers, readers

# Processors that treat each head alike and by itself, and ask the module how many there are.
_PROCESSORS = {
    "AttnProcessor", "AttnProcessor2_0", "CogVideoXAttnProcessor2_0", "Flux2AttnProcessor",
    "Flux2ParallelSelfAttnProcessor", "FluxAttnProcessor", "FusedAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0",
    "FusedHunyuanAttnProcessor2_0", "FusedJointAttnProcessor2_0", "HunyuanAttnProcessor2_0", "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0", "JointAttnProcessor2_0", "QwenDoubleStreamAttnProcessor2_0", "SlicedAttnProcessor",
    "WanAttnProcessor",
}  # fmt: skip
# Projections by their names in all of these modules, and how many times all heads come out of each.
_MAKERS = {"to_q": 1, "to_k": 1, "to_v": 1, "add_q_proj": 1, "add_k_proj": 1, "add_v_proj": 1, "to_qkv": 3, "to_kv": 2,
           "to_added_qkv": 3, "to_added_kv": 2}  # fmt: skip
_READERS = ("to_out.0", "to_add_out")
# Of image prompts, in the processor.
_PROMPT_MAKERS = ("to_k_ip", "to_v_ip")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def attention_site(name: str, module: Any) -> UnitSite | None:
    """The heads of an attention module whose result is what its own projections read; None if it has no rule."""
    if not _by_heads(module) or not isinstance(getattr(module, "to_out", None), nn.ModuleList):
        return None
    heads = _heads(module)
    outputs = [Site(f"{name}.{path}", layer) for path in _READERS if (layer := _part(module, path)) is not None]
    return _site(name, module, module, heads, _makers(module, heads), outputs, (heads,))


def parallel_block_site(name: str, module: Any) -> UnitSite | None:
    """The heads and hidden units of a block that one projection reads side by side; None if it is of no such kind."""
    kind = type(module).__name__
    if kind == "FluxSingleTransformerBlock" and _by_heads(module.attn):
        heads, hidden = _heads(module.attn), Stretch(Units(module.mlp_hidden_dim))
        made = joined(_makers(module.attn, heads), makers(module.proj_mlp, hidden))
        output = Site(f"{name}.proj_out", module.proj_out)
        return _site(name, module, module.attn, heads, made, [output], (heads, hidden))
    if kind == "Flux2ParallelSelfAttention" and _by_heads(module):
        heads, hidden = _heads(module), Stretch(Units(module.mlp_hidden_dim))
        made = joined(makers(module.to_qkv_mlp_proj, heads, heads, heads, *[hidden] * module.mlp_mult_factor))
        counts = (UnitCount(module, "mlp_hidden_dim", hidden),)
        output = Site(f"{name}.to_out", module.to_out)
        return _site(name, module, module, heads, made, [output], (heads, hidden), counts)
    return None


def _site(
    name: str,
    module: nn.Module,
    attention: Any,
    heads: Stretch,
    made: tuple[UnitLayer, ...] | None,
    outputs: list[Site],
    stretches: tuple[Stretch, ...],
    counts: tuple[UnitCount, ...] = (),
) -> UnitSite | None:
    read = joined(*(readers(site.module, *stretches) for site in outputs))
    spans = _spans(name, attention, heads)
    if not made or not read or spans is None:
        return None
    known = (UnitCount(attention, "heads", Stretch(heads.units)), UnitCount(attention, "inner_dim", heads))
    counts = (*(count for count in known if hasattr(attention, count.name)), *counts)
    return UnitSite(name, module, made, read, tuple(outputs), spans=spans, counts=counts)


def _by_heads(module: Any) -> bool:
    """Whether a module is attention, each head of which is treated by itself."""
    mixin = any(cls.__name__ == "AttentionModuleMixin" for cls in type(module).__mro__)
    if not (mixin or isinstance(module, Attention)) or type(module.processor).__name__ not in _PROCESSORS:
        return False
    # Where heads share keys and values, or have narrower ones, they have no rule.
    return all(getattr(module, name, module.inner_dim) == module.inner_dim for name in ("inner_kv_dim", "kv_inner_dim"))


def _heads(module: Any) -> Stretch:
    return Stretch(Units(module.heads), module.inner_dim // module.heads)


def _makers(module: Any, heads: Stretch) -> tuple[UnitLayer, ...] | None:
    named = [(getattr(module, name, None), times) for name, times in _MAKERS.items()]
    named += [(layer, 1) for name in _PROMPT_MAKERS for layer in getattr(module.processor, name, ())]
    return joined(*(makers(layer, *[heads] * times) for layer, times in named if layer is not None))


def _spans(name: str, module: Any, heads: Stretch) -> tuple[tuple[Site, UnitLayer], ...] | None:
    """Norms of queries and keys over all heads together; None if one has no rule. Others are each head's own."""
    found = []
    for path in _NORMS:
        norm = getattr(module, path, None)
        shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
        # A norm without a shape has nothing that is as long as one head or all.
        if norm is None or not isinstance(shape, tuple) or tuple(shape) == (heads.width,):
            continue
        if type(norm).__name__ != "RMSNorm" or getattr(norm, "bias", None) is not None:
            return None
        found.append((Site(f"{name}.{path}", norm), UnitLayer(norm, (heads,))))
    return tuple(found)


def _part(module: nn.Module, path: str) -> Any:
    """A layer by its path, None if there is none."""
    part: Any = module
    for step in path.split("."):
        part = part[int(step)] if step.isdigit() and part is not None else getattr(part, step, None)
    return part
