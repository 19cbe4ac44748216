"""How many bytes of a denoiser's weights each rank works with where a plan divides them, from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distrifusion.anatomy.unit_sites import unit_sites
from distrifusion.anatomy.units import PartSite, UnitLayer, UnitSite
from distrifusion.strategies.tensor import Share
from distrifusion.strategies.weights import num_bytes


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights.

    Attributes:
        own: that a rank reads in a call.
        whole: of the model.
    """

    own: int
    whole: int


def weights_of(model: nn.Module, share: Share) -> Weights:
    """The weights that one place works with, of every layer that is divided its part and all of the others."""
    whole = num_bytes((), model)
    foreign = 0
    for site in unit_sites(model):
        match site:
            case PartSite():
                foreign += _foreign(site.makers, share, 0)
            case UnitSite():
                made = (*site.makers, *site.norms, *(layer for _, layer in site.spans))
                foreign += _foreign(made, share, 0) + _foreign(site.readers, share, 1)
    return Weights(whole - foreign, whole)


def _foreign(layers: Sequence[UnitLayer], share: Share, dim: int) -> int:
    """Bytes of layers' parameters, divided along a dimension, that other places work with."""
    total = 0
    for layer in layers:
        # A bias of what is read belongs to the sum, which the first place adds it to.
        of_outputs = [p for p in (getattr(layer.module, "bias", None),) if p is not None]
        if dim == 1:
            total += sum(bias.nbytes for bias in of_outputs) if share.place else 0
        else:
            total += sum(_away(bias, layer, share, 0) for bias in of_outputs)
        if layer.module.weight is not None:
            total += _away(layer.module.weight, layer, share, dim)
    return total


def _away(parameter: torch.Tensor, layer: UnitLayer, share: Share, dim: int) -> int:
    own = sum(
        len(channels)
        for channels, stretch in zip(share.channels(layer.stretches), layer.stretches, strict=True)
        if share.has(stretch.units)
    )
    return parameter.nbytes - parameter.nbytes // parameter.shape[dim] * own
