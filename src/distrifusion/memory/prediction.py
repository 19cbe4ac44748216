"""Bytes that a plan keeps between denoiser calls, from the shapes of the model's layers; no tensor is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.base import (
    AdaptiveNormSite,
    AttentionSite,
    BandSite,
    ConvSite,
    NormSite,
    ResampleSite,
    Site,
    UpsampleSite,
)
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.errors import PlanError, UnsupportedModel
from distrifusion.exchange.gathering import SAMPLED, Sending
from distrifusion.exchange.pool import padded
from distrifusion.layout.mesh import RankGrid
from distrifusion.layout.partition import Interval, Level, partition_levels
from distrifusion.plan import Plan, SiteKind, Split
from distrifusion.strategies.patch import input_rows, rows_below

_NORM_BYTES = 4  # statistics are fp32 in every model
_SAMPLE_BYTES = 4  # and so are samples of keys and values


def pool_bytes(model: nn.Module, plan: Plan, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Counter[SiteKind]:
    """Bytes that one rank keeps between denoiser calls of one shape, by kind; exact plans keep nothing.

    A pipeline that calls its denoiser several times in a scheduler step keeps as much for each of these calls, and a
    ControlNet is counted by itself.

    Args:
        model: the denoiser, divided or not, on any device.
        plan: how it is divided.
        rank: 0 to plan.num_ranks - 1.
        shape: of the latents that all ranks are called with: batch, the guidance branches included; channels, rows,
            columns.
        dtype: of the model.

    Raises:
        PlanError: if the plan has components.
        UnsupportedModel: if the denoiser has a layer for which there is no rule, or is a transformer.
    """
    if plan.components > 1:
        raise PlanError(f"plan '{plan}': what components of a model keep is known after its first call")
    anatomy = anatomy_of(model)
    if isinstance(anatomy, TokenAnatomy):
        raise UnsupportedModel(
            f"{type(model).__name__}: how many tokens a call has, it alone knows; ask "
            "distrifusion.memory.tokens.pool_bytes_of_call with the arguments of one"
        )
    return kept_by(anatomy.sites(model), anatomy.num_levels(model), plan, rank, shape, dtype)


@dataclass(frozen=True)
class BandQuestion:
    """What a call of a model with rows and columns keeps.

    Attributes:
        sites, num_levels: of the denoiser.
        shape: of the latents of all ranks: batch, channels, rows, columns.
        dtype: of the latents.
    """

    sites: Sequence[Site]
    num_levels: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def by_rank(self, plan: Plan) -> list[int]:
        """Bytes that every rank of a plan would keep."""
        ranks = range(plan.num_ranks)
        return [kept_by(self.sites, self.num_levels, plan, r, self.shape, self.dtype).total() for r in ranks]

    def smaller(self, part: float) -> BandQuestion:
        """The same for a picture of a part of the height and of the width."""
        batch, channels, height, width = self.shape
        return replace(self, shape=(batch, channels, max(1, int(height * part)), max(1, int(width * part))))


def kept_by(
    sites: Sequence[Site], num_levels: int, plan: Plan, rank: int, shape: Sequence[int], dtype: torch.dtype
) -> Counter[SiteKind]:
    """As `pool_bytes`, from the sites of a model."""
    total: Counter[SiteKind] = Counter()
    if not plan.kept:
        return total
    num_rows, _, height, width = shape
    layout = RankGrid(plan, rank).layout(num_rows)
    levels = partition_levels(height, width, num_levels, len(layout.team), plan.split)
    band = _Band(plan, levels, layout.index, len(layout.batch[rank]), dtype.itemsize)
    channels = 0
    # What follows within an upsampler from a level that every rank has whole reads whole rows too.
    whole = tuple(f"{s.name}." for s in sites if isinstance(s, UpsampleSite) and levels[s.level].bands is None)
    below = {s.conv: levels[s.level] for s in sites if isinstance(s, UpsampleSite) and s.conv}
    for site in sites:
        kind = _KINDS.get(type(site))
        if isinstance(site, BandSite) and kind in plan.kept and not site.name.startswith(whole):
            total[kind] += band.kept(site, channels, below.get(site.name))
        channels = getattr(site.module, "out_channels", channels)
    return total


def gathered_bytes(plan: Plan, parts: Sequence[Sequence[int]], index: int, itemsize: int) -> int:
    """Bytes of everybody's keys and values at one site, and of what their forecast, coding and drift need.

    Args:
        plan: how they travel.
        parts: shapes [L, B, 2, C] of what every place of the team has.
        index: this rank's place.
        itemsize: bytes of a value.
    """
    sending = Sending.of(plan)
    own = parts[index]
    total = itemsize * sum(map(prod, parts)) * (2 if sending.forecasts else 1)
    if sending.codec is not None:
        # What the peers hold of the own values, and the codes given and taken.
        total += itemsize * prod(own) + sum(map(sending.codec.num_bytes, parts))
    if plan.resync is not None:
        total += _SAMPLE_BYTES * -(-own[0] // SAMPLED) * prod(own[1:])
    return total


_KINDS: dict[type[Site], SiteKind] = {
    AttentionSite: SiteKind.KV,
    ConvSite: SiteKind.HALO,
    ResampleSite: SiteKind.HALO,
    NormSite: SiteKind.NORM,
    AdaptiveNormSite: SiteKind.NORM,
}


@dataclass(frozen=True)
class _Band:
    """One rank's part of every level, and the batch rows and bytes per value of its call."""

    plan: Plan
    levels: tuple[Level, ...]
    index: int
    batch: int
    itemsize: int

    def kept(self, site: BandSite, channels: int, below: Level | None) -> int:
        """Bytes kept of a site.

        Args:
            site: the layer.
            channels: those of its input.
            below: the level that the input is upsampled from, whose rows travel instead.
        """
        level, level_out = self.levels[site.level], self.levels[site.level_out]
        module: Any = site.module
        if level.bands is None or level_out.bands is None:
            return 0  # the levels are whole on every rank, or the way to them gathers afresh
        match site:
            case AttentionSite():
                return self._gathered(level, module.to_k.out_features)
            case NormSite() | AdaptiveNormSite():
                statistics = padded(2 * self.batch * module.num_groups * _NORM_BYTES)
                return 2 * statistics * (len(level.bands) - 1)  # given to every other band, and taken from it
            case ResampleSite():
                wants = [Interval(band.start - site.margin, band.stop + site.margin) for band in level.bands]
                return self._borders(level, wants, channels)
        dim = 2 if level.split is Split.ROWS else 3
        wants = [input_rows(module, dim, band) for band in level_out.bands]
        if below is not None:
            wants = [rows_below(want & Interval(0, level.size)) for want in wants]
        return self._borders(below or level, wants, module.in_channels)

    def _gathered(self, level: Level, channels: int) -> int:
        """Bytes of everybody's keys and values of a level, and of what goes with them."""
        assert level.bands is not None
        parts = [(len(band) * level.across, self.batch, 2, channels) for band in level.bands]
        return gathered_bytes(self.plan, parts, self.index, self.itemsize)

    def _borders(self, level: Level, wants: Sequence[Interval], channels: int) -> int:
        """Bytes of the rows that this band gives and takes where every band wants some interval."""
        assert level.bands is not None
        row = prod((self.batch, channels, level.across, self.itemsize))
        own, wanted = level.bands[self.index], wants[self.index]
        others = [
            (band, want) for i, (band, want) in enumerate(zip(level.bands, wants, strict=True)) if i != self.index
        ]
        return sum(padded(len(own & want) * row) + padded(len(band & wanted) * row) for band, want in others)
