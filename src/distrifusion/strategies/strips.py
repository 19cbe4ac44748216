"""Convolutions on rows that are made where they are read, so that nothing as large as a band lies between two layers.

A large convolution on CPU runs in strips. Its kernel copies its input and its output into a layout of its own, and the
system gives large blocks out anew each time, page by page: what is done strip by strip stays in memory that is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from distrifusion.layout.partition import Interval, split_evenly

# Input bytes up to which a convolution runs in one piece.
_STRIP_BYTES = 16 << 20


@dataclass(frozen=True)
class Made:
    """Rows that are made when they are read.

    Attributes:
        length: how many there are.
        write: write an interval of them into a place.
    """

    length: int
    write: Callable[[torch.Tensor, Interval], object]


# Rows as they are, rows that are made, and a number of rows of zeros.
Piece = torch.Tensor | Made | int


class Rows:
    """What a convolution reads, padding along the cut included.

    Args:
        like: a tensor [B, C, H, W] of the same batch, type and device, and as long across the cut unless `across`
            says otherwise.
        dim: dimension of the cut, 2 or 3.
        pieces: the rows in order.
        across: length across the cut.
    """

    def __init__(self, like: torch.Tensor, dim: int, pieces: Sequence[Piece], across: int | None = None) -> None:
        self.dim = dim
        self._like = like
        self._pieces = pieces
        self._across = like.shape[5 - dim] if across is None else across

    def __len__(self) -> int:
        return sum(self._length(piece) for piece in self._pieces)

    @property
    def nbytes(self) -> int:
        """Size of all rows."""
        return len(self) * self._across * self._like.shape[0] * self._like.shape[1] * self._like.element_size()

    def read(self, wanted: Interval, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        """An interval of the rows; where they lie in one piece as they are, a view of it, in its own layout."""
        room: torch.Tensor | None = None
        start = 0
        for piece in self._pieces:
            stop = start + self._length(piece)
            part = wanted & Interval(start, stop)
            inside = Interval(part.start - start, part.stop - start)
            if isinstance(piece, torch.Tensor) and part == wanted:
                return self._narrow(piece, inside)
            if len(part):
                if room is None:
                    room = empty_rows(self._like, self.dim, len(wanted), layout, self._across)
                self._write(room.narrow(self.dim, part.start - wanted.start, len(part)), piece, inside)
            start = stop
        assert room is not None
        return room

    def _length(self, piece: Piece) -> int:
        match piece:
            case torch.Tensor():
                return piece.shape[self.dim]
            case Made():
                return piece.length
            case _:
                return piece

    def _narrow(self, x: torch.Tensor, part: Interval) -> torch.Tensor:
        return x.narrow(self.dim, part.start, len(part))

    def _write(self, place: torch.Tensor, piece: Piece, part: Interval) -> None:
        match piece:
            case torch.Tensor():
                place.copy_(self._narrow(piece, part))
            case Made():
                piece.write(place, part)
            case _:
                place.zero_()


def empty_rows(
    like: torch.Tensor, dim: int, length: int, layout: torch.memory_format, across: int | None = None
) -> torch.Tensor:
    """An empty tensor like one [B, C, H, W], of this length along the cut, maybe of another across it."""
    shape = list(like.shape)
    shape[dim] = length
    if across is not None:
        shape[5 - dim] = across
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def layout_read_by(conv: nn.Module) -> torch.memory_format:
    """The layout of the rows that a convolution reads: that of its weight.

    Rows can come channels-last out of an attention. Convolutions with other weights would hand that on from layer to
    layer, several times less exact on CPU.
    """
    assert isinstance(conv, nn.Conv2d)
    return _layout_of(conv.weight)


def _layout_of(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def reach(conv: nn.Module, dim: int) -> tuple[int, int, int]:
    """Stride, padding and extent of a convolution along the cut."""
    assert isinstance(conv, nn.Conv2d)
    axis = dim - 2
    return conv.stride[axis], int(conv.padding[axis]), conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1


def convolve(conv: nn.Module, rows: Rows) -> torch.Tensor:
    """A convolution [B, C, H, W] of rows that its padding along the cut is part of."""
    assert isinstance(conv, nn.Conv2d)
    dim = rows.dim
    padding = [int(p) for p in conv.padding]
    padding[dim - 2] = 0
    run = partial(F.conv2d, weight=conv.weight, bias=conv.bias, stride=conv.stride, padding=tuple(padding))
    run = partial(run, dilation=conv.dilation, groups=conv.groups)
    layout, num_strips = layout_read_by(conv), -(-rows.nbytes // _STRIP_BYTES)
    if num_strips == 1 or conv.weight.device.type != "cpu" or torch.is_grad_enabled():
        return run(rows.read(Interval(0, len(rows)), layout))
    stride, _, extent = reach(conv, dim)
    num_out = (len(rows) - extent) // stride + 1
    out: torch.Tensor | None = None
    for strip in split_evenly(num_out, min(num_out, num_strips)):
        part = run(rows.read(Interval(strip.start * stride, (strip.stop - 1) * stride + extent), layout))
        out = empty_rows(part, dim, num_out, _layout_of(part)) if out is None else out
        out.narrow(dim, strip.start, len(strip)).copy_(part)
    assert out is not None
    return out
