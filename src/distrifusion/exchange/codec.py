"""The compressed difference to the last value that sender and receiver both hold, with error feedback.

Residual compression of CompactFusion (arXiv 2507.17511): with base b, which both sides hold, the sender codes
d = x - b, and both sides add the decoded d^ to b. What one call loses is part of the next call's difference, so that
errors do not add up. Nothing here communicates; a codec keeps nothing between calls.

Quantiser: uniform with 2^bits levels at the odd multiples of half a step, where the step of token l and channel c is
u[l] v[c], a rank-1 table for each batch row, piece and block of 128 tokens. v is the channel's mean |d| in the block;
u makes the outermost level the token's largest |d / v| at 8 and 4 bits, so that nothing is clipped, and is a multiple
of its root mean square at 2 and 1 bits. Scales travel as bfloat16, which has the range of float32.

Wire format of a part [L, B, P, C] (L tokens, B batch, P pieces that travel together, C channels): its n full blocks,
then the rest as one shorter block; of each of the two v [n, B, P, C] and u [n, L, B, P], both bfloat16, and the codes,
8 / bits to a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from distrifusion.errors import ConfigError

_BLOCK = 128  # tokens that share channel scales
_CACHED = 1 << 19  # values that a CPU computes on at a time, so that they stay in its cache
_STEP_BY_RMS = {2: 1.0, 1: 1.9}  # steps per root mean square: least error over 50 steps of the demo model
_MARGIN = 1 + 2**-8  # a peak rounded down to bfloat16 must not push the largest code out of range
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Codec:
    """Codes differences with a number of bits per value.

    A value that is not finite arrives so, and takes with it others of its block of tokens, batch row and piece (NaN all
    of them); the base stays so, on both sides, until it is set anew. In float16, so does a value within a step of the
    largest one.
    """

    bits: int

    @classmethod
    def of(cls, bits: int) -> Codec:
        """The codec of 8, 4, 2 or 1 bits.

        Raises:
            ConfigError: another number of bits.
        """
        if type(bits) is not int or bits not in (8, 4, 2, 1):
            raise ConfigError(
                f"a difference is coded with 8, 4, 2 or 1 bits, not {bits!r}; full precision needs no codec"
            )
        return cls(bits)

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a coded part of shape [L, B, P, C]."""
        return sum(sum(self._sizes(run, shape)) for run in _runs(shape[0]))

    def encode_(self, pieces: Sequence[torch.Tensor], base: torch.Tensor, out: torch.Tensor) -> None:
        """Code pieces - base into `out`, and add the decoded difference to `base`, as every receiver does.

        Args:
            pieces: P fresh tensors [B, L, C].
            base: [L, B, P, C] in float32, float16 or bfloat16; what the other side holds too.
            out: uint8 [num_bytes(base.shape)], contiguous, at an even address.
        """
        half = 2 ** (self.bits - 1)
        chunks = self._chunks(out, base, [piece.transpose(0, 1) for piece in pieces])
        for chunk, (difference, magnitude) in _with_room(chunks, 2):
            for i, piece in enumerate(chunk.fresh):
                difference[..., i, :].copy_(piece)
            difference.sub_(chunk.base)
            channel = _put(_channel_scale(difference, magnitude), chunk.channel)
            difference.mul_(_reciprocal(channel))
            token = _put(self._token_scale(difference, magnitude), chunk.token)
            difference.mul_(_reciprocal(token)).floor_().clamp_(-half, half - 1)
            self._pack(difference.flatten(1), chunk.codes)
            _add_scaled_(chunk.base, difference.add_(0.5), token, channel)

    def decode_(self, packed: torch.Tensor, base: torch.Tensor) -> None:
        """Add the difference that `encode_` wrote to the receiver's `base`, to the bits that the sender now holds."""
        for chunk, (levels,) in _with_room(self._chunks(packed, base), 1):
            levels.copy_(self._unpack(chunk.codes, levels[0].numel()).view(levels.shape))
            levels.add_(0.5 - 2 ** (self.bits - 1))
            _add_scaled_(chunk.base, levels, chunk.token.to(torch.float32), chunk.channel.to(torch.float32))

    def _sizes(self, run: _Run, shape: Sequence[int]) -> tuple[int, int, int]:
        """Bytes of a run's v, u and codes."""
        scales, shares = prod(shape[1:]), run.length * prod(shape[1:-1])
        codes = -(-run.length * scales * self.bits // 8)
        return 2 * run.num_blocks * scales, 2 * run.num_blocks * shares, run.num_blocks * codes

    def _chunks(self, wire: torch.Tensor, base: torch.Tensor, fresh: Sequence[torch.Tensor] = ()) -> list[_Chunk]:
        """A part, and its fresh values [L, B, C], as what is computed at a time."""
        runs, shape = _runs(len(base)), base.shape[1:]
        fields = iter(wire.split([size for run in runs for size in self._sizes(run, base.shape)]))
        tokens = zip(*(t.split([run.num_blocks * run.length for run in runs]) for t in (base, *fresh)), strict=True)
        chunks = []
        for (num_blocks, length), values, channel, token, codes in zip(
            runs, tokens, fields, fields, fields, strict=True
        ):
            by_block = (
                channel.view(torch.bfloat16).view(num_blocks, 1, *shape),
                token.view(torch.bfloat16).view(num_blocks, length, *shape[:-1], 1),
                codes.view(num_blocks, -1),
                *(value.view(num_blocks, length, *value.shape[1:]) for value in values),
            )
            split = (t.split(_blocks_at_once(base)) for t in by_block)
            chunks += [_Chunk(c, t, k, b, f) for c, t, k, b, *f in zip(*split, strict=True)]
        return chunks

    def _token_scale(self, ratio: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """u [n, L, B, P, 1] of d / v [n, L, B, P, C]."""
        if self.bits in _STEP_BY_RMS:
            norm = torch.linalg.vector_norm(ratio, dim=-1, keepdim=True)
            return norm.mul_(_STEP_BY_RMS[self.bits] * ratio.shape[-1] ** -0.5)
        return torch.abs(ratio, out=room).amax(-1, keepdim=True).mul_(_MARGIN * 2 ** (1 - self.bits))

    def _pack(self, floors: torch.Tensor, out: torch.Tensor) -> None:
        """Codes of [n, values] whole numbers from -2^(bits-1) on, as [n, bytes]; halves of a row share bytes."""
        codes = out if self.bits == 8 else out.new_empty(len(out), out.shape[1] * 8 // self.bits)
        codes.view(torch.int8)[:, : floors.shape[1]].copy_(floors)
        codes[:, floors.shape[1] :].zero_()
        codes.add_(2 ** (self.bits - 1))  # uint8 wraps: -1 is 255, and 255 + half is half - 1
        bits = self.bits
        while bits < 8:
            low, high = codes.chunk(2, 1)
            codes = torch.add(low, high, alpha=2**bits, out=out if bits == 4 else None)
            bits *= 2

    def _unpack(self, packed: torch.Tensor, num_values: int) -> torch.Tensor:
        """The codes [n, values] of bytes [n, bytes], from 0 to 2^bits - 1."""
        bits = 8
        while bits > self.bits:
            bits //= 2
            wide = packed.new_empty(len(packed), 2 * packed.shape[1])
            low, high = wide.chunk(2, 1)
            torch.bitwise_and(packed, 2**bits - 1, out=low)
            torch.bitwise_right_shift(packed, bits, out=high)
            packed = wide
        return packed[:, :num_values]


class _Run(NamedTuple):
    """Blocks of equal length, in tokens."""

    num_blocks: int
    length: int


class _Chunk(NamedTuple):
    """n blocks of L tokens that are computed together.

    Attributes:
        channel: v on the wire, [n, 1, B, P, C].
        token: u on the wire, [n, L, B, P, 1].
        codes: on the wire, [n, bytes].
        base: [n, L, B, P, C].
        fresh: P pieces [n, L, B, C] where the part is sent.
    """

    channel: torch.Tensor
    token: torch.Tensor
    codes: torch.Tensor
    base: torch.Tensor
    fresh: list[torch.Tensor]


def _runs(num_tokens: int) -> list[_Run]:
    """The full blocks of a part, and the rest."""
    runs = _Run(num_tokens // _BLOCK, _BLOCK), _Run(1, num_tokens % _BLOCK)
    return [run for run in runs if run.num_blocks and run.length]


def _blocks_at_once(base: torch.Tensor) -> int:
    """Blocks in a chunk: on a CPU few, so that what is computed stays in its cache, else all: kernels are few."""
    return max(1, _CACHED // (_BLOCK * base[0].numel())) if base.device.type == "cpu" else len(base)


def _with_room(chunks: list[_Chunk], num_tensors: int) -> Iterator[tuple[_Chunk, list[torch.Tensor]]]:
    """Chunks, each with float32 tensors of its shape; all chunks use the same memory, whose pages are then there."""
    if chunks:
        base = chunks[0].base  # no later chunk is larger
        room = torch.empty(num_tensors, base.numel(), dtype=torch.float32, device=base.device)
        for chunk in chunks:
            yield chunk, [flat[: chunk.base.numel()].view(chunk.base.shape) for flat in room]


def _channel_scale(difference: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """v [n, 1, B, P, C] of d [n, L, B, P, C]."""
    return torch.abs(difference, out=room).mean(1, keepdim=True)


def _put(scale: torch.Tensor, wire: torch.Tensor) -> torch.Tensor:
    """The scale as a receiver reads it from the wire."""
    return wire.copy_(scale).to(torch.float32)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, finite also where the scale is zero; there, what it multiplies is zero too."""
    return scale.clamp_min(_TINY).reciprocal_()


def _add_scaled_(base: torch.Tensor, levels: torch.Tensor, token: torch.Tensor, channel: torch.Tensor) -> None:
    # Products and sum apart: one fused operation rounds otherwise, and not everywhere alike.
    base.add_(levels.mul_(token).mul_(channel))
