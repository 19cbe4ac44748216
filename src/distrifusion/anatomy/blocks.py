"""The blocks of a transformer, one after the other: where one can be told from the next, and what each gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from distrifusion.anatomy.base import Site
from distrifusion.errors import UnsupportedModel
from distrifusion.layout.partition import Interval, balance

_NOMINAL_TOKENS = 4096  # by which attention is weighed against all else, before a call is known
_PICTURE = ("hidden_states",)
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_TEXT_LAST = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True)
class BlockKind:
    """What is common to the blocks of a class.

    Attributes:
        gives: arguments that its results take the place of, in the order of the results; streams of tokens all.
        keys: arguments whose tokens its attention over several streams reads as keys, in that order; empty if that is
            not told by its arguments.
        met: share of its weights that each token meets, below 1 where text and picture have weights of their own.
        skips: blocks of the second half read what those of the first gave.
    """

    gives: tuple[str, ...] = _PICTURE
    keys: tuple[str, ...] = _PICTURE
    met: float = 1.0
    skips: bool = False


# By the name of the block's class.
KINDS: Mapping[str, BlockKind] = {
    "BasicTransformerBlock": BlockKind(),
    "CogVideoXBlock": BlockKind(_TEXT_LAST, _TEXT_FIRST),
    "Flux2SingleTransformerBlock": BlockKind(keys=()),  # one argument has both streams
    "Flux2TransformerBlock": BlockKind(_TEXT_FIRST, _TEXT_FIRST, met=0.5),
    "FluxSingleTransformerBlock": BlockKind(_TEXT_FIRST, _TEXT_FIRST),
    "FluxTransformerBlock": BlockKind(_TEXT_FIRST, _TEXT_FIRST, met=0.5),
    "HunyuanDiTBlock": BlockKind(skips=True),
    "JointTransformerBlock": BlockKind(_TEXT_FIRST, _TEXT_LAST, met=0.5),
    "LTXVideoTransformerBlock": BlockKind(),
    "QwenImageTransformerBlock": BlockKind(_TEXT_FIRST, _TEXT_FIRST, met=0.5),
    "WanTransformerBlock": BlockKind(),
}


@dataclass(frozen=True)
class BlockSite(Site):
    """One block.

    Attributes:
        index: its place among all, from 0.
        kind: what is common to its class.
    """

    index: int
    kind: BlockKind


def blocks_of(model: nn.Module, kinds: Mapping[str, BlockKind] | None = None) -> list[BlockSite]:
    """The blocks of a model in the order in which they run.

    Args:
        model: the transformer.
        kinds: of blocks that are not known here, by the name of their class.

    Raises:
        UnsupportedModel: if a list of its layers has a class that is not known, or there is no list.
    """
    known = {**KINDS, **(kinds or {})}
    found: list[BlockSite] = []
    for name, layers in model.named_children():
        if not isinstance(layers, nn.ModuleList):
            continue
        for i, block in enumerate(layers):
            kind = known.get(type(block).__name__)
            if kind is None:
                raise UnsupportedModel(
                    f"{type(model).__name__}: of block '{name}.{i}' ({type(block).__name__}) it is not known what it "
                    "gives to the next; its anatomy can tell (docs/adding-a-model.md)"
                )
            found.append(BlockSite(f"{name}.{i}", block, len(found), kind))
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no list of blocks that run one after the other")
    return found


def operations(block: BlockSite, attentions: Sequence[Site], num_tokens: int) -> float:
    """Multiplications that a block does for one token, to compare the blocks of one model.

    Layers in norms are not counted: they read the timestep, once per picture.

    Args:
        block: the block.
        attentions: the model's attention modules over all tokens; those of the block are counted.
        num_tokens: that they attend to.
    """
    layers = block.module.named_modules()
    linear = [layer for name, layer in layers if isinstance(layer, nn.Linear) and "norm" not in name]
    inside = [site.module for site in attentions if site.name.startswith(f"{block.name}.")]
    channels = sum(int(getattr(module, "inner_dim", 0)) for module in inside)
    weights = sum(layer.in_features * layer.out_features for layer in linear)
    return block.kind.met * weights + 2 * num_tokens * channels


def alike_parts(blocks: Sequence[BlockSite], attentions: Sequence[Site], num_parts: int) -> tuple[Interval, ...]:
    """Cut the blocks of a model, given with its attention modules, into contiguous parts that compute alike."""
    return balance([operations(block, attentions, _NOMINAL_TOKENS) for block in blocks], num_parts)
