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
from distrifusion.partition import Interval, Level, split_evenly
from distrifusion.plan import Norms, SiteKind, Split
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.moments import Affine, corrected_moments, local_moments, merge_moments

Forward = Callable[..., torch.Tensor]

# Input bytes up to which a convolution runs in one piece.
_STRIP_BYTES = 64 << 20


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
class _Chain:
    """A normed band on its way through an activation to a convolution.

    Attributes:
        normed: the band.
        conv: the convolution.
        halo: where the rows of other bands go that came with the statistics; None if activated rows travel.
        before, after: those rows, normed.
    """

    normed: torch.Tensor
    conv: ConvSite
    halo: Halo | None
    before: list[torch.Tensor]
    after: list[torch.Tensor]


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
        self._chain: _Chain | None = None
        self._extended: torch.Tensor | None = None

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
        self._chain = self._extended = None

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

    def _pad(self, x: torch.Tensor, edges: tuple[int, int]) -> torch.Tensor:
        """Zeros before the first and after the last row of the cut."""
        return F.pad(x, (0, 0, *edges) if self.step.dim == 2 else edges)

    def _entry(self, site: BandSite, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        level = self.step.levels[site.level]
        if self.is_whole(x.shape[self.step.dim], level):
            return forward(x)
        assert level.bands is not None
        want = input_rows(site.module, self.step.dim, level.bands[self.step.index])
        inside = self._rows(self.step.entry, want & Interval(0, level.size))
        edges = (max(0, -want.start), max(0, want.stop - level.size))
        return conv_without_padding(site.module, self.step.dim, self._pad(inside, edges))

    def _conv(self, site: ConvSite, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        level, level_out = self.step.levels[site.level], self.step.levels[site.level_out]
        if x is self._extended:
            self._extended = None
            return conv_without_padding(site.module, self.step.dim, x)
        own = x.narrow(self.step.dim, 0, x.shape[self.step.dim] - site.padded) if site.padded else x
        if self.is_whole(own.shape[self.step.dim], level):
            return forward(x)
        if level_out.bands is None:
            return forward(self._pad(self.gather_rows(site, own, level), (0, site.padded)))
        return conv_without_padding(site.module, self.step.dim, self._halo(site, own).extend(own))

    def _halo(self, site: BandSite, x: torch.Tensor) -> Halo:
        """Ask for the rows of x that a convolution wants of the other bands."""
        bands, bands_out = self.step.levels[site.level].bands, self.step.levels[site.level_out].bands
        assert bands is not None and bands_out is not None
        wants = _rows_read(_reach(site.module, self.step.dim), bands_out)
        return self._exchange.halo(site.name, x, self.step.dim, bands, wants)

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
        norm = Affine.of(site.module, *moments)
        normed = norm(x)
        if conv is not None:
            before, after = halo.wait() if halo else ([], [])
            self._chain = _Chain(normed, conv, halo, [norm(rows) for rows in before], [norm(rows) for rows in after])
        return normed

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
        weights = _shares(bands, own.device)
        if previous is None or self._norms is Norms.STALE:
            return merge_moments(moments, weights)
        return corrected_moments(moments, weights, self.step.index, previous)

    def _activation(self, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """The activation of a normed band, written into the place that the convolution's border rows surround."""
        chain = self._chain
        if chain is None or x is not chain.normed:
            return forward(x)
        self._chain = None
        dim, bands = self.step.dim, self.step.levels[chain.conv.level].bands
        assert bands is not None
        own = bands[self.step.index]
        want = input_rows(chain.conv.module, dim, own)
        self._extended = _room(x, len(want), dim)
        inside = self._extended.narrow(dim, own.start - want.start, len(own))
        _silu_into(x, out=inside)
        if chain.halo is not None:
            chain.halo.fill(self._extended, chain.before, chain.after, lambda place, rows: _silu_into(rows, out=place))
        else:
            halo = self._halo(chain.conv, inside)
            halo.fill(self._extended, *halo.wait(), torch.Tensor.copy_)
        return self._extended

    def _upsample(
        self, site: BandSite, forward: Forward, x: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Upsample to this rank's part of the finer level, whatever size the model derived from its own part."""
        level, level_out = self.step.levels[site.level], self.step.levels[site.level_out]
        if not self.is_whole(x.shape[self.step.dim], level):
            return forward(x, level_out.band_shape(self.step.index), *args, **kwargs)
        whole = forward(x, (level_out.height, level_out.width), *args, **kwargs)
        return self._rows(whole, level_out.bands[self.step.index]) if level_out.bands else whole


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


def input_rows(conv: nn.Module, dim: int, out: Interval) -> Interval:
    """The input rows, edges beyond the picture included, that a convolution needs for the output rows given."""
    return _rows_read(_reach(conv, dim), (out,))[0]


def _reach(conv: nn.Module, dim: int) -> tuple[int, int, int]:
    """Stride, padding and extent of a convolution along the cut."""
    assert isinstance(conv, nn.Conv2d)
    axis = dim - 2
    return conv.stride[axis], int(conv.padding[axis]), conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1


@lru_cache(maxsize=1024)
def _rows_read(reach: tuple[int, int, int], outs: tuple[Interval, ...]) -> tuple[Interval, ...]:
    stride, padding, extent = reach
    starts = [out.start * stride - padding for out in outs]
    return tuple(
        Interval(start, start + (len(out) - 1) * stride + extent) for start, out in zip(starts, outs, strict=True)
    )


_silu_into = torch.ops.aten.silu.out


def _room(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """An empty tensor like x [B, C, H, W] but of this length along the cut."""
    shape = [length if d == dim else n for d, n in enumerate(x.shape)]
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def conv_without_padding(conv: nn.Module, dim: int, x: torch.Tensor) -> torch.Tensor:
    """A convolution whose padding along the cut is already part of x [B, C, H, W]; a large one in strips of rows.

    On CPU the kernel copies its whole input and output into a layout of its own: at the last resolutions of a VAE that
    is more memory than all else.
    """
    assert isinstance(conv, nn.Conv2d)
    padding = [int(p) for p in conv.padding]
    padding[dim - 2] = 0
    run = partial(F.conv2d, weight=conv.weight, bias=conv.bias, stride=conv.stride, padding=tuple(padding))
    run = partial(run, dilation=conv.dilation, groups=conv.groups)
    if x.device.type != "cpu" or x.nbytes <= _STRIP_BYTES or torch.is_grad_enabled():
        return run(x)
    stride, _, extent = _reach(conv, dim)
    num_out = (x.shape[dim] - extent) // stride + 1
    out: torch.Tensor | None = None
    for strip in split_evenly(num_out, min(num_out, -(-x.nbytes // _STRIP_BYTES))):
        part = run(x.narrow(dim, strip.start * stride, (len(strip) - 1) * stride + extent))
        out = _room(part, num_out, dim) if out is None else out
        out.narrow(dim, strip.start, len(strip)).copy_(part)
    assert out is not None
    return out
