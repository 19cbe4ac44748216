"""What a diffusion transformer is, as facts: where its streams of tokens begin and end, and where tokens mix."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from distrifusion.anatomy.base import LinkSite, Site
from distrifusion.anatomy.blocks import BlockKind
from distrifusion.anatomy.layers import check_call
from distrifusion.errors import ConfigError, UnsupportedModel
from distrifusion.layout.partition import Interval
from distrifusion.nested import map_tensors, take_rows

# Processors of the general Attention class that call scaled_dot_product_attention once, on all tokens that they get.
_PROCESSORS = {
    "AttnProcessor2_0", "CogVideoXAttnProcessor2_0", "FusedAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0",
    "FusedHunyuanAttnProcessor2_0", "FusedJointAttnProcessor2_0", "HunyuanAttnProcessor2_0", "JointAttnProcessor2_0",
    "QwenDoubleStreamAttnProcessor2_0",
}  # fmt: skip
_CONTROL = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")
_IMAGE_PROMPT = ("ip_adapter_image_embeds", "ip_hidden_states", "ip_adapter_masks")
# A member of a list of the model's, by the name of a layer in it.
_BLOCK = re.compile(r"(\w+\.\d+)\.")
_KWARGS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")


@dataclass(frozen=True)
class Cut:
    """Where a stream of tokens begins: from here on each rank has its own part.

    Attributes:
        module: name of the module, "*" for any one index; "" is the model.
        tensor: name of the argument, or number of the output; nested tensors are all cut, None is left.
        dim: dimension of the tokens.
        num_dims: tensors with another number of dimensions are left whole; None: all are cut.
    """

    module: str
    tensor: str | int
    dim: int
    num_dims: int | None = None


@dataclass(frozen=True)
class Join:
    """Where every rank gets all tokens again: the output of a module, along a dimension."""

    module: str
    dim: int


@dataclass(frozen=True)
class CutSite(Site):
    """A module whose argument or output begins a stream of tokens."""

    cut: Cut


@dataclass(frozen=True)
class JoinSite(Site):
    """A module whose output is joined along a dimension."""

    dim: int


class TokenAttentionSite(Site):
    """Attention over tokens of other ranks: one call of `scaled_dot_product_attention` within its forward."""


@dataclass(frozen=True)
class TokenCall:
    """The arguments of one call.

    Attributes:
        bound: all arguments by name.
        latents: the name of one of them.
        tokens: arguments that have tokens, not the batch, as first dimension.
    """

    bound: inspect.BoundArguments
    latents: str
    tokens: frozenset[str]

    @property
    def sample(self) -> torch.Tensor:
        """The latents, with the batch as first dimension."""
        return self.bound.arguments[self.latents]

    @property
    def timestep(self) -> Any:
        """The timestep: a number or a tensor [] or [B]."""
        return self.bound.arguments.get("timestep", 0)

    @property
    def key(self) -> Hashable:
        """What must be alike in two calls that use the same kept values."""
        # Not what is nested: the residuals of a ControlNet come and go within a run, and change no number of tokens.
        tensors = {name: value for name, value in self.bound.arguments.items() if isinstance(value, torch.Tensor)}
        return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())

    def of_rows(self, take: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model's forward for some rows of the batch; `take` gives those of a tensor with all."""
        bound = self._taking(take).bound
        return bound.args, bound.kwargs

    def at(self, timestep: Any) -> TokenCall:
        """The call at another timestep."""
        return self._with({**self.bound.arguments, "timestep": timestep})

    def map(self, change: Callable[[torch.Tensor], Any]) -> TokenCall:
        """The call with every tensor changed."""
        return self._with({name: map_tensors(value, change) for name, value in self.bound.arguments.items()})

    def take_rows(self, rows: Interval) -> TokenCall:
        """The call with some rows of the batch only."""
        return self._taking(partial(take_rows, rows, self.sample.shape[0]))

    def _taking(self, take: Callable[[torch.Tensor], torch.Tensor]) -> TokenCall:
        changed = {
            name: value if name in self.tokens else map_tensors(value, take)
            for name, value in self.bound.arguments.items()
        }
        return self._with(changed)

    def _with(self, arguments: dict[str, Any]) -> TokenCall:
        bound = inspect.BoundArguments(self.bound.signature, arguments)  # type: ignore[arg-type]
        return replace(self, bound=bound)


@dataclass(frozen=True)
class TokenAnatomy:
    """Facts about one family of transformers. Its own forward runs on a part of the tokens.

    Attributes:
        cuts: where streams of tokens begin. Everything up to there sees the whole picture, position embeddings too.
        joins: where they end.
        attentions: names of the attention modules over tokens that were cut, "*" for any one index. Other modules treat
            each token by itself; attention over a text that is whole does.
        sample: name of the argument with the latents.
        processors: class names of attention processors, beside the known ones, that call `scaled_dot_product_attention`
            once, on all tokens that they get.
        refused: arguments that have no rule, and why.
        patchwise: up to where the picture's stream begins, each token is made of its own patch of the latents alone.
        blocks: what the blocks give to the next, by class name, beside the known ones.
    """

    cuts: tuple[Cut, ...]
    joins: tuple[Join, ...]
    attentions: tuple[str, ...]
    sample: str = "hidden_states"
    processors: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, BlockKind] = field(default_factory=dict)
    patchwise: bool = False

    def sites(self, model: nn.Module) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""
        found: list[Site] = []
        for name, module in model.named_modules():
            check_call(name, module)
            if name:
                found += [CutSite(name, module, cut) for cut in self.cuts if _names(cut.module).fullmatch(name)]
                found += [
                    JoinSite(name, module, join.dim) for join in self.joins if _names(join.module).fullmatch(name)
                ]
            if name and _names(*self.attentions).fullmatch(name):
                self._check_attention(name, module)
                found.append(TokenAttentionSite(name, module))
            else:
                _check_local(name, module)
        self._check_found(model, {site.name for site in found})
        return found

    def links(self, model: nn.Module) -> list[LinkSite]:
        """The blocks that attention lies in, and where streams end."""
        blocks = {block[1] for site in self.sites(model) if (block := _BLOCK.match(site.name))}
        ends = {join.module for join in self.joins}
        return [LinkSite(name, module) for name, module in model.named_modules() if name in blocks | ends]

    def bind(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenCall:
        """Sort the arguments of a call; raises ConfigError on one that has no rule."""
        bound = inspect.signature(forward).bind(*args, **kwargs)
        for name, why in self.refused.items():
            if bound.arguments.get(name) is not None:
                raise ConfigError(f"{name} {why}; leave it None")
        for name in _KWARGS:
            prompts = [key for key in _IMAGE_PROMPT if (bound.arguments.get(name) or {}).get(key) is not None]
            if prompts:
                raise ConfigError(f"{name} {', '.join(prompts)}: image prompts of transformers have no rule for plans")
        tokens = frozenset(str(cut.tensor) for cut in self.own_cuts if cut.dim == 0)
        return TokenCall(bound, self.sample, tokens)

    @property
    def own_cuts(self) -> list[Cut]:
        """Cuts of the model's own arguments."""
        return [cut for cut in self.cuts if cut.module == ""]

    @property
    def local(self) -> bool:
        """Whether a part of the tokens needs its own part of the latents alone."""
        return self.patchwise or any(cut.tensor == self.sample for cut in self.own_cuts)

    def _check_attention(self, name: str, module: Any) -> None:
        """Refuse attention whose tokens may mix elsewhere than in one scaled_dot_product_attention."""
        processor = type(getattr(module, "processor", module)).__name__
        default = getattr(type(module), "_default_processor_cls", None)
        known = _PROCESSORS if isinstance(module, Attention) else {getattr(default, "__name__", None)}
        if not _is_attention(module) or processor not in {*known, *self.processors}:
            raise UnsupportedModel(
                f"layer '{name}' ({type(module).__name__}) cannot be cut by tokens: its processor {processor} has no "
                "rule"
            )

    def _check_found(self, model: nn.Module, names: set[str]) -> None:
        wanted = [cut.module for cut in self.cuts if cut.module] + [join.module for join in self.joins]
        for pattern in (*wanted, *self.attentions):
            if pattern not in names and not any(map(_names(pattern).fullmatch, names)):
                raise UnsupportedModel(f"{type(model).__name__} has no module '{pattern}', of which its anatomy tells")


def from_context_plan(model: nn.Module) -> TokenAnatomy | None:
    """The anatomy that diffusers itself gives for a model's context parallelism, None if it gives none.

    Raises:
        UnsupportedModel: if it says more than there is a rule for.
    """
    plan: Mapping[str, Any] | None = getattr(model, "_cp_plan", None)
    if plan is None:
        return None
    cuts: list[Cut] = []
    joins: list[Join] = []
    for module, entries in plan.items():
        if not isinstance(entries, Mapping):
            _require_plain(model, module, hasattr(entries, "gather_dim"))
            joins.append(Join(module, entries.gather_dim))
            continue
        for tensor, entry in entries.items():
            _require_plain(model, module, hasattr(entry, "split_dim") and entry.split_output is isinstance(tensor, int))
            cuts.append(Cut(module, tensor, entry.split_dim, entry.expected_dims))
    # A ControlNet's residuals are those of the picture's tokens.
    parameters = inspect.signature(model.forward).parameters
    cuts += [Cut("", name, 1) for name in _CONTROL if name in parameters]
    # Attention to a text that is not cut is each token's own.
    text_is_cut = any(cut.tensor == "encoder_hidden_states" for cut in cuts)
    mixes = [
        name
        for name, module in model.named_modules()
        if _is_attention(module) and (text_is_cut or not getattr(module, "is_cross_attention", False))
    ]
    return TokenAnatomy(tuple(cuts), tuple(joins), tuple(mixes))


def _require_plain(model: nn.Module, module: str, plain: bool) -> None:
    if not plain:
        raise UnsupportedModel(
            f"{type(model).__name__}: its plan for context parallelism says of '{module}' what has no rule here; write "
            "an anatomy for it (docs/adding-a-model.md)"
        )


@lru_cache(maxsize=256)
def _names(*patterns: str) -> re.Pattern[str]:
    """What matches names of modules, "*" for any one index; a large model has thousands of names."""
    return re.compile("|".join(r"\d+".join(map(re.escape, pattern.split("*"))) for pattern in patterns))


def _is_attention(module: nn.Module) -> bool:
    """An attention module of diffusers, of its general class or one that a model's file defines."""
    mixin = any(cls.__name__ == "AttentionModuleMixin" for cls in type(module).__mro__)
    return mixin or isinstance(module, Attention)


def _check_local(name: str, module: nn.Module) -> None:
    """Refuse a layer that mixes tokens and is not in the anatomy. A kernel without overlap embeds patches."""
    mixes = isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase)
    if isinstance(module, nn.modules.conv._ConvNd):
        mixes = any(k not in (1, s) for k, s in zip(module.kernel_size, module.stride, strict=True))
    if mixes:
        raise UnsupportedModel(
            f"layer '{name}' ({type(module).__name__}) cannot be cut by tokens: it may mix positions of the picture"
        )
