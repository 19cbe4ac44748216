"""Patch parallelism (DistriFusion, arXiv 2402.19481): each rank computes one band of the picture at every layer.

Synchronous, the layers exchange what they lack within the call and the result equals one device to rounding.
Displaced, they use what the other ranks computed in the last call; which of the two is the exchange's policy, not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distrifusion.anatomy.base import AttentionSite, BandSite, ConvSite, EntrySite, NormSite, Site, UpsampleSite
from distrifusion.errors import UnsupportedModel
from distrifusion.exchange.handles import Gathered, Halo
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.partition import Interval, Level
from distrifusion.plan import Norms, SiteKind, Split
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.moments import KnownNorm, corrected_moments, correcting, local_moments, merge_moments
from distrifusion.strategies.strips import Made, Piece, Rows, convolve, empty_rows, layout_read_by, reach

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class PatchStep:
    """What a layer must know of the denoiser call it is in.

    Attributes:
        levels: every resolution with its bands.
        index: the band that this rank owns.
        entry: the model's input [B, C, H, W], all rows: the first convolution cuts its own halo from it.
        separate_norms: norms use the statistics of the own band alone.
    """

    levels: tuple[Level, ...]
    index: int
    entry: torch.Tensor
    separate_norms: bool = False

    @property
    def dim(self) -> int:
        """Dimension of the cut in tensors [B, C, H, W]."""
        return 2 if self.levels[0].split is Split.ROWS else 3


@dataclass
class _Reading:
    """What a convolution will read, while the model carries a stand-in for it there.

    Attributes:
        stand_in: what the layers between give in place of the rows.
        conv: the convolution.
        rows: the rows.
    """

    stand_in: torch.Tensor
    conv: ConvSite
    rows: Rows


class PatchStrategy:
    """Splits a denoiser's sites into bands.

    A tensor that has all rows of its level needs no exchange: this covers one rank, levels too coarse to cut, and the
    way between those and the cut ones.
    """

    def __init__(self, exchange: Exchange, norms: Norms) -> None:
        self._exchange = exchange
        self._norms = norms
        self._step: PatchStep | None = None
        self._convs: dict[str, ConvSite] = {}
        self._reading: _Reading | None = None

    def attach(self, sites: Sequence[Site], attachment: Attachment) -> None:
        """Replace the forward of every site."""
        self._convs = {site.name: site for site in sites if isinstance(site, ConvSite)}
        activations = {id(a): a for site in sites if isinstance(site, NormSite) and (a := site.activation) is not None}
        for activation in activations.values():
            attachment.replace(activation, "forward", partial(partial, self._activation))
        for site in sites:
            match site:
                case EntrySite():
                    attachment.replace(site.module, "forward", partial(partial, self._entry, site))
                case ConvSite():
                    attachment.replace(site.module, "forward", partial(partial, self._conv, site))
                case NormSite():
                    attachment.replace(site.module, "forward", partial(partial, self._norm, site))
                case UpsampleSite():
                    attachment.replace(site.module, "forward", partial(partial, self._upsample, site))
                case AttentionSite():
                    _BandAttention(self, site).attach(attachment)
                case _:
                    raise UnsupportedModel(f"layer '{site.name}': patch parallelism has no rule for {type(site)}")

    def begin(self, step: PatchStep) -> None:
        """Set the call that the layers are in."""
        self._step = step
        self._reading = None

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's band of a tensor [B, C, h, w] that has all rows of one level."""
        level = next((level for level in self.step.levels if (level.height, level.width) == tuple(x.shape[2:])), None)
        if level is None:
            raise UnsupportedModel(f"a residual of size {tuple(x.shape[2:])} matches no resolution of the model")
        return self._rows(x, level.bands[self.step.index]) if level.bands else x

    @property
    def step(self) -> PatchStep:
        """The call that the layers are in."""
        assert self._step is not None, "a split layer ran outside a denoiser call"
        return self._step

    def is_whole(self, length: int, level: Level) -> bool:
        """Whether a tensor of this length along the cut has all rows of its level."""
        return level.bands is None or length == level.size

    def gather(
        self, site: BandSite, pieces: tuple[torch.Tensor, ...], kind: SiteKind | None, per_row: int | None = None
    ) -> Gathered:
        """Start gathering tensors [B, L_own, C] of every band.

        Args:
            site: the asking layer.
            pieces: this rank's tensors, cut along L.
            kind: what they are; None for values that are always fresh.
            per_row: entries of L for each row of the cut; None for one per position.
        """
        level = self.step.levels[site.level]
        assert level.bands is not None
        tokens = level.across if per_row is None else per_row
        return self._exchange.gather(site.name, kind, pieces, tuple(len(band) * tokens for band in level.bands))

    def _rows(self, x: torch.Tensor, band: Interval) -> torch.Tensor:
        return x.narrow(self.step.dim, band.start, len(band))

    def _entry(self, site: BandSite, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        level, dim = self.step.levels[site.level], self.step.dim
        if self.is_whole(x.shape[dim], level):
            return forward(x)
        assert level.bands is not None
        want = input_rows(site.module, dim, level.bands[self.step.index])
        inside = self._rows(self.step.entry, want & Interval(0, level.size))
        return convolve(site.module, Rows(inside, dim, (max(0, -want.start), inside, max(0, want.stop - level.size))))

    def _conv(self, site: ConvSite, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        level, level_out, dim = self.step.levels[site.level], self.step.levels[site.level_out], self.step.dim
        if self._reading is not None and self._reading.conv is site:
            return convolve(site.module, self._read(x))
        own = x.narrow(dim, 0, x.shape[dim] - site.padded) if site.padded else x
        if self.is_whole(own.shape[dim], level):
            return forward(x)
        if level_out.bands is None:
            whole = self.gather_rows(site, own, level)
            return forward(F.pad(whole, (0, 0, 0, site.padded) if dim == 2 else (0, site.padded)))
        halo = self._halo(site, own)
        return convolve(site.module, Rows(own, dim, _around(halo, self._rows(own, halo.inside))))

    def _read(self, x: torch.Tensor) -> Rows:
        """What the stand-in x stands for."""
        reading, self._reading = self._reading, None
        assert reading is not None
        if x is not reading.stand_in:
            raise UnsupportedModel(
                f"layer '{reading.conv.name}' reads something else than its norm or resampling gives"
            )
        return reading.rows

    def _stand_in(self, x: torch.Tensor, conv: ConvSite, rows: Rows) -> torch.Tensor:
        """What the model carries to a convolution that will read these rows."""
        self._reading = _Reading(x.view_as(x), conv, rows)
        return self._reading.stand_in

    def _halo(self, site: BandSite, x: torch.Tensor) -> Halo:
        """Ask for the rows of x that a convolution wants of the other bands."""
        bands, bands_out = self.step.levels[site.level].bands, self.step.levels[site.level_out].bands
        assert bands is not None and bands_out is not None
        return self._exchange.halo(site.name, x, self.step.dim, bands, self._wants(site, bands_out))

    def _wants(self, site: Site, bands: tuple[Interval, ...]) -> tuple[Interval, ...]:
        """The rows that a convolution wants for every band of its output."""
        return _rows_read(reach(site.module, self.step.dim), bands)

    def gather_rows(self, site: BandSite, x: torch.Tensor, level: Level) -> torch.Tensor:
        """All rows, always fresh: from here on the levels are too coarse to cut."""
        first = x.movedim(self.step.dim, 1)
        tokens = first.reshape(x.shape[0], first.shape[1], -1)
        (gathered,) = self.gather(site, (tokens,), kind=None, per_row=1).wait()
        whole = gathered.reshape(x.shape[0], level.size, *first.shape[2:])
        return whole.movedim(1, self.step.dim).contiguous()

    def _norm(self, site: NormSite, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        level = self.step.levels[site.level]
        spatial = x.dim() == 4
        rows = x.shape[self.step.dim] if spatial else x.shape[-1] // level.across
        if self.is_whole(rows, level):
            return forward(x)
        assert level.bands is not None and isinstance(site.module, nn.GroupNorm)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        conv = self._convs.get(site.conv or "") if spatial and not differentiable else None
        halo = self._halo(conv, x) if conv and self._border_travels_early() else None
        own = local_moments(x, site.module.num_groups)
        moments = own.unbind() if self.step.separate_norms else self._moments(site, level.bands, own)
        norm = KnownNorm(site.module, *moments)
        return norm(x) if conv is None else self._stand_in(x, conv, self._activated(x, norm, conv, halo))

    def _activated(self, x: torch.Tensor, norm: KnownNorm, conv: ConvSite, halo: Halo | None) -> Rows:
        """A band, normed and activated, in what surrounds it, which `halo` has as the norm's input if given."""
        dim = self.step.dim

        def write(place: torch.Tensor, part: Interval) -> None:
            _silu_into(norm(self._rows(x, part)), out=place)

        if halo is not None:
            own = Made(x.shape[dim], write)
            return Rows(x, dim, _around(halo, own, lambda rows: F.silu(norm(rows), inplace=True)))
        level = self.step.levels[conv.level]
        assert level.bands is not None
        want, band = input_rows(conv.module, dim, level.bands[self.step.index]), level.bands[self.step.index]
        room = empty_rows(x, dim, len(want), layout_read_by(conv.module))
        inside = room.narrow(dim, band.start - want.start, len(band))
        write(inside, Interval(0, len(band)))
        self._halo(conv, inside).fill(room)
        return Rows(room, dim, (room,))

    def _border_travels_early(self) -> bool:
        """Whether the border rows that the next convolution wants travel as the norm's input, with its statistics.

        That is one wait for both; the receiver norms and activates them. Old rows must not: normed with newer and
        other statistics than those of the band they are from, they can drive neighbours apart.
        """
        return not self._exchange.keeps(SiteKind.HALO, SiteKind.NORM)

    def _moments(
        self, site: NormSite, bands: tuple[Interval, ...], own: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance [B, G] over all bands, from the own ones [2, B, G] and what the others say."""
        moments, previous = self._exchange.share(site.name, SiteKind.NORM, own).wait()
        if previous is None or self._norms is Norms.STALE:
            return merge_moments(torch.stack(moments), _shares(bands, own.device))
        index = self.step.index
        weights = _correcting_shares(bands, index, own.device)
        return corrected_moments(torch.stack([*moments, previous]), weights, index)

    def _activation(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """The activation of a normed band is part of what its convolution reads."""
        return x if self._reading is not None and x is self._reading.stand_in else forward(x)

    def _upsample(
        self, site: UpsampleSite, forward: Forward, x: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Upsample to this rank's part of the finer level, whatever size the model derived from its own part."""
        level, level_out = self.step.levels[site.level], self.step.levels[site.level_out]
        if self.is_whole(x.shape[self.step.dim], level):
            whole = forward(x, (level_out.height, level_out.width), *args, **kwargs)
            return self._rows(whole, level_out.bands[self.step.index]) if level_out.bands else whole
        conv = self._convs.get(site.conv or "")
        if conv is None:
            return forward(x, level_out.band_shape(self.step.index), *args, **kwargs)
        return conv.module(self._stand_in(x, conv, self._upsampled(x, conv, level, level_out)))

    def _upsampled(self, x: torch.Tensor, conv: ConvSite, level: Level, level_out: Level) -> Rows:
        """The rows that a convolution reads of an upsampled band: its neighbours' travel before they are upsampled."""
        assert level.bands is not None and level_out.bands is not None
        dim, whole = self.step.dim, Interval(0, level_out.size)
        wants = self._wants(conv, level_out.bands)
        halves = tuple(rows_below(want & whole) for want in wants)
        halo = self._exchange.halo(conv.name, x, dim, level.bands, halves)
        coarse = Rows(x, dim, _around(halo, x))
        want, half = wants[self.step.index], halves[self.step.index]
        fine = want & whole

        def write(place: torch.Tensor, part: Interval) -> None:
            rows = Interval(fine.start + part.start, fine.start + part.stop)
            source = rows_below(rows)
            read = coarse.read(Interval(source.start - half.start, source.stop - half.start))
            size = (2 * len(source), level_out.across)
            doubled = F.interpolate(read, size if dim == 2 else size[::-1], mode="nearest")
            place.copy_(doubled.narrow(dim, rows.start - 2 * source.start, len(rows)))

        edges = fine.start - want.start, want.stop - fine.stop
        return Rows(x, dim, (edges[0], Made(len(fine), write), edges[1]), level_out.across)


class _BandAttention:
    """Self-attention of the own band's queries over everybody's keys and values.

    The attention's own code runs on: only its projections answer for all bands. Keys and values travel together, and
    start before the queries are computed.
    """

    def __init__(self, strategy: PatchStrategy, site: BandSite) -> None:
        self._strategy = strategy
        self._site = site
        self._hidden: torch.Tensor | None = None
        self._gathered: Gathered | None = None

    def attach(self, attachment: Attachment) -> None:
        attention: Any = self._site.module
        key, value = attention.to_k.forward, attention.to_v.forward
        attachment.replace(attention.to_q, "forward", partial(partial, self._query, key, value))
        attachment.replace(attention.to_k, "forward", partial(partial, self._read, 0))
        attachment.replace(attention.to_v, "forward", partial(partial, self._read, 1))

    def _query(self, key: Forward, value: Forward, query: Forward, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        level = self._strategy.step.levels[self._site.level]
        if self._strategy.is_whole(hidden.shape[1] // level.across, level):
            self._gathered = None
        else:
            self._hidden = hidden
            pieces = (key(hidden, *args), value(hidden, *args))
            self._gathered = self._strategy.gather(self._site, pieces, SiteKind.KV)
        return query(hidden, *args)

    def _read(self, piece: int, forward: Forward, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        if self._gathered is None:
            return forward(hidden, *args)
        if hidden is not self._hidden:
            raise UnsupportedModel(f"layer '{self._site.name}' attends to other states than its own; it has no rule")
        result = self._gathered.wait()[piece]
        if piece == 1:
            self._gathered = self._hidden = None
        return result


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _shares(bands: tuple[Interval, ...], device: torch.device) -> torch.Tensor:
    """Share of the rows in every band, on the device once and for all: a copy per layer would make a GPU wait."""
    rows = torch.tensor([float(len(band)) for band in bands])
    return (rows / rows.sum()).to(device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _correcting_shares(bands: tuple[Interval, ...], index: int, device: torch.device) -> torch.Tensor:
    return correcting(_shares(bands, torch.device("cpu")), index).to(device)


def input_rows(conv: nn.Module, dim: int, out: Interval) -> Interval:
    """The input rows, edges beyond the picture included, that a convolution needs for the output rows given."""
    return _rows_read(reach(conv, dim), (out,))[0]


@lru_cache(maxsize=1024)
def _rows_read(geometry: tuple[int, int, int], outs: tuple[Interval, ...]) -> tuple[Interval, ...]:
    stride, padding, extent = geometry
    starts = [out.start * stride - padding for out in outs]
    return tuple(
        Interval(start, start + (len(out) - 1) * stride + extent) for start, out in zip(starts, outs, strict=True)
    )


def _around(
    halo: Halo, own: Piece, change: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
) -> tuple[Piece, ...]:
    """A band's rows between those of others, which are changed first, and zeros beyond the picture's edges."""
    before, after = halo.wait()
    return (halo.edges[0], *map(change, before), own, *map(change, after), halo.edges[1])


def rows_below(rows: Interval) -> Interval:
    """The rows of the resolution below that these are upsampled from."""
    return Interval(rows.start // 2, -(-rows.stop // 2))


_silu_into = torch.ops.aten.silu.out
