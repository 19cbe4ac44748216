"""Keys and values of one site for all tokens, of which pieces are renewed one after the other."""

from __future__ import annotations

import torch

from distrifusion.errors import ConfigError
from distrifusion.exchange.forecast import Weight, carry_on

_Whole = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class PieceBuffer:
    """What a rank keeps of one attention between denoiser calls whose tokens flow in pieces.

    The tokens of a whole stand in another order (text, then picture) than pieces, which have some of both. Attention
    does not mind the order, but what stands in one cannot be renewed in the other: unless it is known how to arrange
    them, all keys in the first call of pieces are the last whole call's. Later each piece's are as fresh as can be.

    Args:
        forecasts: the values of the call before the last are kept too, so that old ones can be carried on.

    Attributes:
        streams: numbers of tokens of the streams that a whole consists of, in its order; empty if that is not known,
            or no whole waits to be arranged.
    """

    def __init__(self, forecasts: bool = False) -> None:
        self._wholes: list[_Whole] = []
        self._num_kept = 2 if forecasts else 1
        # Of the last calls [2, B, N, L, D]: the latest last; a forecast is made in the place of the oldest.
        self._rooms: list[torch.Tensor] = []
        self._num_calls = 0
        self._bias: torch.Tensor | None = None
        self._start = 0
        self.streams: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held = (*(tensor for whole in self._wholes for tensor in whole), *self._rooms, self._bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def keep(
        self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, streams: tuple[int, ...] = ()
    ) -> None:
        """Keep what a call of the whole attends to: keys and values [B, N, L, D], bias [B or 1, N or 1, 1, L]."""
        self._wholes = [*self._wholes, (key, value, bias)][-self._num_kept :]
        self.streams = streams

    def arrange(self, order: torch.Tensor) -> None:
        """Put what the whole attended to in the order of the pieces, given as places in the whole [L]."""
        self._num_calls = len(self._wholes)
        bias = self._wholes[-1][2]
        self._bias = None if bias is None else bias[..., order]
        self._rooms = [torch.stack([key[:, :, order], value[:, :, order]]) for key, value, _ in self._wholes]
        self._wholes, self.streams = [], ()
        self._add_rooms()

    def advance(self, weight: Weight) -> None:
        """Prepare what is kept for a call of pieces, carried on by so much of its last change; 0 leaves it."""
        if self._wholes:
            self._make_room()
        elif self._rooms and self._num_kept > 1:
            before, latest = self._rooms
            self._rooms = [latest, carry_on(before, latest, weight if self._num_calls > 1 else 0.0, rows=1, out=before)]
        self._num_calls += 1

    def renew(
        self, index: int, num: int, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put in a piece's keys, and return those of all tokens; the pieces of a call come in order.

        Args:
            index: of the piece, 0 to num - 1.
            num: pieces of a call.
            key, value: of the piece [B, N, L_piece, D].
            bias: of its keys [B or 1, N or 1, 1, L_piece]; None adds nothing.

        Raises:
            ConfigError: if the attention did not run in the call of the whole.
        """
        if not self._rooms:
            raise ConfigError("a block ran in pieces that the whole call before had skipped; skip it in both or none")
        room = self._rooms[-1]
        start = 0 if index == 0 else self._start
        stop = self._start = start + key.shape[2]
        room[0, :, :, start:stop] = key
        room[1, :, :, start:stop] = value
        if self._bias is not None:
            assert bias is not None
            self._bias[..., start:stop] = bias
        read = self._wholes[-1] if self._wholes else (room[0], room[1], self._bias)
        if index == num - 1:
            self._wholes = []
        return read

    def _make_room(self) -> None:
        """Room for pieces while the last whole is read, which cannot be arranged."""
        key, _, bias = self._wholes[-1]
        self._wholes = self._wholes[-1:]
        self._rooms = [key.new_empty(2, *key.shape)]
        self._bias = None if bias is None else torch.empty_like(bias)
        self._num_calls = 0
        self._add_rooms()

    def _add_rooms(self) -> None:
        # Zeros: they are read before they have a value, with the weight 0.
        missing = self._num_kept - len(self._rooms)
        self._rooms = [torch.zeros_like(self._rooms[-1]) for _ in range(missing)] + self._rooms
