"""Keys and values of one site for all tokens, of which pieces are renewed one after the other."""

from __future__ import annotations

import torch

from distrifusion.errors import ConfigError


class PieceBuffer:
    """What a rank keeps of one attention between denoiser calls whose tokens flow in pieces.

    The tokens of a whole stand in another order (text, then picture) than pieces, which have some of both. Attention
    does not mind the order, but what stands in one cannot be renewed in the other: unless it is known how to arrange
    them, all keys in the first call of pieces are the last whole call's. Later each piece's are as fresh as can be.

    Attributes:
        streams: numbers of tokens of the streams that a whole consists of, in its order; empty if that is not known,
            or no whole waits to be arranged.
    """

    def __init__(self) -> None:
        self._whole: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        self._room: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._start = 0
        self.streams: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held = (*(self._whole or ()), self._room, self._bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def keep(
        self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, streams: tuple[int, ...] = ()
    ) -> None:
        """Keep what a call of the whole attends to: keys and values [B, N, L, D], bias [B or 1, N or 1, 1, L]."""
        self._whole, self.streams = (key, value, bias), streams

    def arrange(self, order: torch.Tensor) -> None:
        """Put what the whole attended to in the order of the pieces, given as places in the whole [L]."""
        assert self._whole is not None
        key, value, bias = self._whole
        self._room = torch.stack([key[:, :, order], value[:, :, order]])
        self._bias = None if bias is None else bias[..., order]
        self._whole, self.streams = None, ()

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
        if self._room is None or (self._whole is not None and index == 0):
            self._make_room()
        assert self._room is not None
        start = 0 if index == 0 else self._start
        stop = self._start = start + key.shape[2]
        self._room[0, :, :, start:stop] = key
        self._room[1, :, :, start:stop] = value
        if self._bias is not None:
            assert bias is not None
            self._bias[..., start:stop] = bias
        read = self._whole or (self._room[0], self._room[1], self._bias)
        if index == num - 1:
            self._whole = None
        return read

    def _make_room(self) -> None:
        if self._whole is None:
            raise ConfigError("a block ran in pieces that the whole call before had skipped; skip it in both or none")
        key, _, bias = self._whole
        self._room = key.new_empty(2, *key.shape)
        self._bias = None if bias is None else torch.empty_like(bias)
