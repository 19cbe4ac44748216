"""What inside a module does not look at each other: heads, hidden units, groups of a norm, channels.

Each of such units is made of the module's whole input by weights of its own, and read by weights of its own: what reads
them adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from distrifusion.anatomy.base import Site


@dataclass(frozen=True, eq=False)
class Units:
    """Units of one kind inside one module.

    Attributes:
        count: how many there are.
    """

    count: int


@dataclass(frozen=True)
class Stretch:
    """Channels of units, one unit after the other.

    Attributes:
        units: whose they are.
        width: channels of each unit.
    """

    units: Units
    width: int = 1


@dataclass(frozen=True)
class UnitLayer:
    """A layer with channels of units, in stretches one after the other.

    Attributes:
        module: a linear layer, a convolution or a norm.
        stretches: of its output where it makes units, of its input where it reads them.
    """

    module: Any
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class UnitCount:
    """An attribute by which a module's code knows its channels: the number of units times what each has of them."""

    owner: nn.Module
    name: str
    stretch: Stretch


@dataclass(frozen=True)
class UnitSite(Site):
    """A module with units inside.

    Attributes:
        makers: layers that make units of whole inputs.
        readers: linear layers and convolutions that read units, or, like a shortcut, what is whole.
        sums: the modules in which the readers' outputs come together and no unit is left: their output, and nothing
            that reads it, is the sum over all units.
        norms: group norms of which each unit is a group.
        spans: root-mean-square norms over the channels of all units together.
        counts: what the module's code must be told if it has some of the units alone.
    """

    makers: tuple[UnitLayer, ...]
    readers: tuple[UnitLayer, ...]
    sums: tuple[Site, ...]
    norms: tuple[UnitLayer, ...] = ()
    spans: tuple[tuple[Site, UnitLayer], ...] = ()
    counts: tuple[UnitCount, ...] = ()

    def under(self, prefix: str) -> Self:
        sums = tuple(site.under(prefix) for site in self.sums)
        spans = tuple((site.under(prefix), layer) for site, layer in self.spans)
        return replace(super().under(prefix), sums=sums, spans=spans)


@dataclass(frozen=True)
class PartSite(Site):
    """A layer alone, the outputs of which do not look at each other.

    Attributes:
        makers: it, and those of an adapter around it that give the same outputs.
    """

    makers: tuple[UnitLayer, ...]


def makers(layer: Any, *stretches: Stretch) -> list[UnitLayer] | None:
    """The plain layers whose outputs are those of a layer; None if it is not known what it does."""
    return _plain(layer, stretches, "lora_B")


def readers(layer: Any, *stretches: Stretch) -> list[UnitLayer] | None:
    """The plain layers whose inputs are those of a layer; None if it is not known what it does."""
    return _plain(layer, stretches, "lora_A")


def joined(*layers: Iterable[UnitLayer] | None) -> tuple[UnitLayer, ...] | None:
    """All layers together; None if something is not known of one."""
    known = [some for some in layers if some is not None]
    return tuple(layer for some in known for layer in some) if len(known) == len(layers) else None


def _plain(layer: Any, stretches: tuple[Stretch, ...], side: str) -> list[UnitLayer] | None:
    found = [layer]
    if type(layer).__module__.startswith("peft.tuners.lora."):
        # A variant (DoRA and others) norms over what is divided here; a bias behind the factors would be added twice.
        biased = any(factor.bias is not None for factor in layer.lora_B.values())
        if biased or getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values()):
            return None
        found = [layer.base_layer, *getattr(layer, side).values()]
    return [UnitLayer(one, stretches) for one in found] if all(map(_is_plain, found)) else None


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear
