"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): each rank has some units of every layer, and outputs are summed.

Units are heads, hidden units, groups of a norm. A rank makes its own of the whole input and reads them with the weights
that go with them; one sum over the ranks gives the output. Exact up to the order of that sum. Parameters stay whole and
as they are: what a rank works with is taken of them in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.units import PartSite, Stretch, UnitCount, UnitLayer, Units, UnitSite
from distrifusion.errors import UnsupportedModel
from distrifusion.exchange.summing import PART
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.partition import Interval, split_evenly
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.strips import layout_read_by

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Share:
    """One of several places among which the units of every layer are divided, as evenly as can be.

    Attributes:
        place: which; those before it have as many units, or one more.
        num_places: how many there are.
    """

    place: int
    num_places: int

    def has(self, units: Units) -> bool:
        """Whether there is a unit for this place."""
        return self.place < units.count

    def of(self, units: Units) -> Interval:
        """The units of this place; where it has none, the first, which it computes and nobody reads."""
        return split_evenly(units.count, self.num_places)[self.place] if self.has(units) else Interval(0, 1)

    def channels(self, stretches: Sequence[Stretch]) -> list[Interval]:
        """The channels of this place's units, for each stretch."""
        found, start = [], 0
        for stretch in stretches:
            own = self.of(stretch.units)
            found.append(Interval(start + own.start * stretch.width, start + own.stop * stretch.width))
            start += stretch.units.count * stretch.width
        return found


class TensorStrategy:
    """Divides the modules of a denoiser that have units inside.

    Args:
        exchange: this rank's.
        share: what this rank has of every layer; always the same.
    """

    def __init__(self, exchange: Exchange, share: Share) -> None:
        self._exchange = exchange
        self.share = share

    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forward of every layer that makes, norms or reads units, and of those whose output is a sum."""
        for site in sites:
            match site:
                case UnitSite():
                    self._attach_units(site, layers)
                case PartSite():
                    self._attach_makers(site.makers, layers)
                    layers.replace(site.module, "forward", partial(partial, self._complete, site))
                case _:
                    raise UnsupportedModel(f"layer '{site.name}': tensor parallelism has no rule for {type(site)}")

    def _attach_units(self, site: UnitSite, layers: Attachment) -> None:
        self._attach_makers(site.makers, layers)
        for layer in site.norms:
            layers.replace(layer.module, "forward", partial(partial, self._norm, layer))
        for place, layer in site.spans:
            layers.replace(layer.module, "forward", partial(partial, self._span, place, layer))
        for layer in site.readers:
            layers.replace(layer.module, "forward", partial(partial, self._read, layer))
        layout = _layout(site.readers)
        for place in site.sums:
            layers.replace(place.module, "forward", partial(partial, self._sum, place, layout))
        if site.counts:
            layers.replace(site.module, "forward", partial(partial, self._counted, site.counts))

    def _attach_makers(self, makers: Sequence[UnitLayer], layers: Attachment) -> None:
        for layer in makers:
            layers.replace(layer.module, "forward", partial(partial, self._make, layer))

    def _make(self, layer: UnitLayer, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """The own units of a whole input."""
        module, own = layer.module, self.share.channels(layer.stretches)
        bias = None if module.bias is None else take(module.bias, 0, own)
        return _apply(module, x, take(module.weight, 0, own), bias)

    def _norm(self, layer: UnitLayer, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """The group norm of the own groups."""
        norm, own = layer.module, self.share.channels(layer.stretches)
        assert isinstance(norm, nn.GroupNorm)
        weight, bias = (take(p, 0, own) for p in (norm.weight, norm.bias)) if norm.affine else (None, None)
        return F.group_norm(x, len(self.share.of(layer.stretches[0].units)), weight, bias, norm.eps)

    def _span(self, place: Site, layer: UnitLayer, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """A root-mean-square norm over the channels [..., C] of everybody's units, for the own ones."""
        (stretch,) = layer.stretches
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        if not self.share.has(stretch.units):
            squares.zero_()
        mean = self._exchange.sum(place.name, squares).wait() / (stretch.units.count * stretch.width)
        eps = torch.finfo(x.dtype).eps if layer.module.eps is None else layer.module.eps
        normed = wide * torch.rsqrt(mean + eps)
        weight = layer.module.weight
        if weight is not None:
            normed = normed * take(weight, 0, self.share.channels(layer.stretches))
        return normed.to(x.dtype)

    def _read(self, layer: UnitLayer, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """What the own units add to the output [B, ..., C] or [B, C, H, W]; the first place adds the bias."""
        module, dim = layer.module, 1 if isinstance(layer.module, nn.Conv2d) else -1
        own = self.share.channels(layer.stretches)
        read = [c for c, stretch in zip(own, layer.stretches, strict=True) if self.share.has(stretch.units)]
        bias = module.bias if self.share.place == 0 else None
        if x.shape[dim] == sum(stretch.units.count * stretch.width for stretch in layer.stretches):
            x = take(x, dim, read or own)
        elif 0 < len(read) < len(own):
            x = take(x, dim, [here for here, c in zip(_one_after_the_other(own), own, strict=True) if c in read])
        part = _apply(module, x, take(module.weight, 1, read or own), bias)
        return part if read else part.zero_()

    def _sum(self, place: Site, layout: torch.memory_format, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        part = forward(*args, **kwargs)
        part = part.contiguous(memory_format=layout) if part.dim() == 4 else part.contiguous()
        return self._exchange.sum(place.name, part).wait()

    def _complete(self, site: PartSite, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """The output [B, C, H, W] of a convolution, of which each rank makes some channels."""
        own = forward(x)
        (stretch,) = site.makers[0].stretches
        whole = own.new_empty(stretch.units.count, own.shape[0], *own.shape[2:])
        places = [Share(place, self.share.num_places) for place in range(self.share.num_places)]
        lengths = [len(share.of(stretch.units)) if share.has(stretch.units) else 0 for share in places]
        parts = dict(zip(self._exchange.team, whole.split(lengths), strict=True))
        mine = parts.pop(self._exchange.transport.rank)
        if self.share.has(stretch.units):
            mine.copy_(own.transpose(0, 1))
        self._exchange.swap(site.name, dict.fromkeys(parts, mine), parts, PART).wait()
        return whole.transpose(0, 1).contiguous(memory_format=_layout(site.makers))

    def _counted(self, counts: Sequence[UnitCount], forward: Forward, *args: Any, **kwargs: Any) -> Any:
        with _set((count.owner, count.name, self._own_count(count.stretch)) for count in counts):
            return forward(*args, **kwargs)

    def _own_count(self, stretch: Stretch) -> int:
        return len(self.share.of(stretch.units)) * stretch.width


def take(x: torch.Tensor, dim: int, parts: Sequence[Interval]) -> torch.Tensor:
    """Some intervals of a tensor; one is a view."""
    found = [x.narrow(dim, part.start, len(part)) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _one_after_the_other(parts: Sequence[Interval]) -> list[Interval]:
    """Where parts lie in what `take` gives."""
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    return [Interval(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]


def _apply(module: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer or a convolution with other weights."""
    if not isinstance(module, nn.Conv2d):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)


def _layout(layers: Sequence[UnitLayer]) -> torch.memory_format:
    """The layout of the weights of some layers: what ranks add up lies alike on all of them."""
    convs = [layer.module for layer in layers if isinstance(layer.module, nn.Conv2d)]
    return layout_read_by(convs[0]) if convs else torch.contiguous_format


@contextmanager
def _set(values: Any) -> Iterator[None]:
    """Attributes that have other values within a block."""
    before = []
    try:
        for owner, name, value in values:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
