"""What the last stage predicts on its way to all ranks, piece by piece: whole at once, or as far as it has come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from distrifusion.exchange.arriving import Arriving, Bands, arrive
from distrifusion.exchange.handles import Swap
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.mesh import CallLayout, StagePlace
from distrifusion.layout.partition import Interval
from distrifusion.nested import map_tensors
from distrifusion.strategies.attention import Piece


class Predictions:
    """The predictions of one call.

    Args:
        exchange: this rank's.
        prefix: begins the names of the model's layers.
        place: this rank's.
        layout: the call's.
        pieces: what flows in it.
        picture: tokens of the picture.
    """

    def __init__(
        self,
        exchange: Exchange,
        prefix: str,
        place: StagePlace,
        layout: CallLayout,
        pieces: Sequence[Piece],
        picture: int,
    ) -> None:
        self._exchange = exchange
        self._prefix = prefix
        self._place = place
        self._layout = layout
        self._pieces = pieces
        self._picture = picture
        self._rank = exchange.transport.rank

    def give(self, piece: Piece, result: Any) -> None:
        """Send a piece's part of what this rank predicts to all that want it, as soon as it is there."""

        def send(own: torch.Tensor) -> torch.Tensor:
            dim, part = band_of(own, piece, self._picture)
            if len(part):
                room = own.narrow(dim, part.start, len(part))
                self._exchange.underway.leave(
                    self._exchange.collect(self._name(self._rank), room, {}, self._place.takers)
                )
            return own

        map_tensors(result, send)

    def take(self, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """The prediction with all rows of the batch and all pieces, whole or arriving.

        Args:
            num_rows: rows of the batch.
            like: of the same shape with this rank's rows; in the last stage, what they are.
        """
        if self._place.sources == (self._rank,):
            return like
        whole = like.new_empty(num_rows, *like.shape[1:])
        coming: list[list[tuple[torch.Tensor, int, Swap]]] = [[] for _ in self._pieces]
        for source in self._place.sources:
            rows = whole[self._layout.batch[source].start : self._layout.batch[source].stop]
            if source == self._rank:
                rows.copy_(like)
                continue
            for piece, swaps in zip(self._pieces, coming, strict=True):
                dim, part = band_of(rows, piece, self._picture)
                if len(part):
                    room = rows.narrow(dim, part.start, len(part))
                    swap = self._exchange.collect(self._name(source), like, {source: room.shape}, ())
                    swaps.append((room, source, swap))
        bands = bands_of(whole, self._pieces, self._picture)
        if bands is None:
            for piece in self._pieces:
                _fill(coming, piece.index)
            return whole
        arriving = Arriving.of(whole, bands, partial(_fill, coming))
        # By its first piece every rank knows that every other is in this call.
        arrive(arriving, 0)
        self._exchange.underway.follow(arriving)
        return arriving

    def _name(self, source: int) -> str:
        return f"{self._prefix}exit.{self._place.sources.index(source)}"


def _fill(coming: list[list[tuple[torch.Tensor, int, Swap]]], piece: int) -> None:
    for room, source, swap in coming[piece]:
        room.copy_(swap.wait()[source])
    coming[piece] = []


def bands_of(prediction: torch.Tensor, pieces: Sequence[Piece], picture: int) -> Bands | None:
    """The pieces' parts of a prediction, or of latents of its shape; None where there is one alone."""
    found = [band_of(prediction, piece, picture) for piece in pieces]
    if len(found) == 1 or any(not dim for dim, _ in found):
        return None
    return Bands(found[0][0], tuple(part for _, part in found))


def band_of(prediction: torch.Tensor, piece: Piece, picture: int) -> tuple[int, Interval]:
    """Where a piece's part of a prediction lies: a dimension and an interval of it.

    Args:
        prediction: tokens [B, L, C] or a picture [B, C, H, W]; others are whole with the last piece.
        piece: the piece.
        picture: tokens of the picture.
    """
    if prediction.dim() == 3 and prediction.shape[1] == picture:
        return 1, piece.of(picture)
    if prediction.dim() == 4 and piece.picture:
        height = prediction.shape[2] * piece.width // picture
        part = piece.of(picture)
        return 2, Interval(part.start // piece.width * height, part.stop // piece.width * height)
    return 0, Interval(0, len(prediction) if piece.index == piece.num - 1 else 0)
