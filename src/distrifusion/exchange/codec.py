"""The compressed difference to the last value that sender and receiver both hold, with error feedback.

Residual compression of CompactFusion (arXiv 2507.17511): with base b, which both sides hold, the sender codes
d = x - b, and both sides add the decoded d^ to b. What one call loses is part of the next call's difference, so that
errors do not add up. Nothing here communicates; a codec keeps nothing between calls.

Quantiser: uniform with 2^bits levels at the odd multiples of half a step, where the step of token l and channel c is
u[l] v[c], a rank-1 table for each batch row, piece and block of 128 tokens. v is the channel's mean |d| in the block;
u makes the outermost level the token's largest |d / v| at 8 and 4 bits, so that nothing is clipped, and is a multiple
of its root mean square at 2 and 1 bits. Scales travel as bfloat16, which has the range of float32.

Wire format of a part [L, B, P, C] (L tokens, B batch, P pieces that travel together, C channels), n blocks:
v [n, B, P, C], u [L, B, P, 1], both bfloat16, then the codes of each block, 8 / bits to a byte.
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
    of them); the base stays so, on both sides, until it is set anew.
    """

    bits: int

    @classmethod
    def of(cls, bits: int) -> Codec:
        """The codec of 8, 4, 2 or 1 bits.

        Raises:
            ConfigError: another number of bits.
        """
        if isinstance(bits, bool) or bits not in (8, 4, 2, 1):
            raise ConfigError(
                f"a difference is coded with 8, 4, 2 or 1 bits, not {bits!r}; full precision needs no codec"
            )
        return cls(bits)

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a coded part of shape [L, B, P, C]."""
        num_tokens, width = shape[0], prod(shape[1:])
        num_full, rest = divmod(num_tokens, _BLOCK)
        num_scales = -(-num_tokens // _BLOCK) * width + num_tokens * prod(shape[1:-1])
        return 2 * num_scales + num_full * self._code_bytes(_BLOCK * width) + self._code_bytes(rest * width)

    def encode_(self, pieces: Sequence[torch.Tensor], base: torch.Tensor, out: torch.Tensor) -> None:
        """Code pieces - base into `out`, and add the decoded difference to `base`, as every receiver does.

        Args:
            pieces: P fresh tensors [B, L, C], with any strides.
            base: [L, B, P, C] in float32, float16 or bfloat16, contiguous; what the other side holds too.
            out: uint8 [num_bytes(base.shape)], contiguous, at an even address.
        """
        room = _Room(base, 2)
        for chunk, fresh in self._chunks(out, base, [piece.transpose(0, 1) for piece in pieces]):
            difference, magnitude = room.like(chunk.base)
            for i, piece in enumerate(fresh):
                difference[..., i, :].copy_(piece)
            difference.sub_(chunk.base)
            channel, token = self._scale_(difference, magnitude, chunk)
            half = 2 ** (self.bits - 1)
            difference.floor_().clamp_(-half, half - 1)
            self._pack(difference.flatten(1), chunk.codes)
            _add_scaled_(chunk.base, difference.add_(0.5), token, channel)

    def decode_(self, packed: torch.Tensor, base: torch.Tensor) -> None:
        """Add the difference that `encode_` wrote to the receiver's `base`, to the bits that the sender now holds."""
        room = _Room(base, 1)
        for chunk, _ in self._chunks(packed, base, []):
            (levels,) = room.like(chunk.base)
            levels.copy_(self._unpack(chunk.codes, chunk.base[0].numel()).view(chunk.base.shape))
            levels.add_(0.5 - 2 ** (self.bits - 1))
            _add_scaled_(chunk.base, levels, chunk.token.to(torch.float32), chunk.channel.to(torch.float32))

    def _code_bytes(self, num_values: int) -> int:
        return -(-num_values * self.bits // 8)

    def _chunks(
        self, wire: torch.Tensor, base: torch.Tensor, fresh: Sequence[torch.Tensor]
    ) -> Iterator[tuple[_Chunk, list[torch.Tensor]]]:
        """Some blocks at a time of a part, with what of the wire belongs to them, and of `fresh` [L, B, C]."""
        assert wire.shape == (self.num_bytes(base.shape),), (wire.shape, base.shape)
        num_tokens, width, channels = len(base), prod(base.shape[1:]), base.shape[-1]
        if not base.numel():
            return
        num_full = num_tokens // _BLOCK
        num_blocks = -(-num_tokens // _BLOCK)
        sizes = [
            2 * num_blocks * width,
            2 * num_tokens * (width // channels),
            num_full * self._code_bytes(_BLOCK * width),
        ]
        scales, shares, codes, rest = wire.split([*sizes, len(wire) - sum(sizes)])
        channel = scales.view(torch.bfloat16).view(-1, 1, *base.shape[1:])
        token = shares.view(torch.bfloat16).view(*base.shape[:-1], 1)
        middle = num_full * _BLOCK
        for blocks, tokens, coded, length in (
            (slice(num_full), slice(middle), codes, _BLOCK),
            (slice(num_full, None), slice(middle, None), rest, num_tokens - middle),
        ):
            if not coded.numel():
                continue
            by_token = [t[tokens].unflatten(0, (-1, length)) for t in (base, token, *fresh)]
            num = len(by_token[0])
            at_once = num if _takes_all_at_once(base.device) else _blocks_at_once(width)
            by_block = (*by_token, channel[blocks], coded.view(num, -1))
            for b, t, *pieces, c, k in zip(*(x.split(at_once) for x in by_block), strict=True):
                yield _Chunk(b, c, t, k), pieces

    def _scale_(
        self, difference: torch.Tensor, magnitude: torch.Tensor, chunk: _Chunk
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Divide a difference [n, L, B, P, C] by its steps; puts channel and token scales on the wire, returns them."""
        torch.abs(difference, out=magnitude)
        chunk.channel.copy_(magnitude.mean(1, keepdim=True))
        channel = chunk.channel.to(torch.float32)
        difference.mul_(_reciprocal(channel))
        if self.bits in _STEP_BY_RMS:
            norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
            chunk.token.copy_(norm.mul_(_STEP_BY_RMS[self.bits] * difference.shape[-1] ** -0.5))
        else:
            peak = torch.abs(difference, out=magnitude).amax(-1, keepdim=True)
            chunk.token.copy_(peak.mul_(_MARGIN * 2 ** (1 - self.bits)))
        token = chunk.token.to(torch.float32)
        difference.mul_(_reciprocal(token))
        return channel, token

    def _pack(self, floors: torch.Tensor, out: torch.Tensor) -> None:
        """Codes of [n, values] whole numbers from -2^(bits-1) on, as [n, bytes]; halves of a row share bytes."""
        codes = out if self.bits == 8 else out.new_zeros(len(out), out.shape[1] * 8 // self.bits)
        codes.view(torch.int8)[:, : floors.shape[1]].copy_(floors)
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


class _Chunk(NamedTuple):
    """n blocks of L tokens: what both sides hold, and what of the wire belongs to it.

    Attributes:
        base: [n, L, B, P, C].
        channel: v, [n, 1, B, P, C].
        token: u, [n, L, B, P, 1].
        codes: [n, bytes].
    """

    base: torch.Tensor
    channel: torch.Tensor
    token: torch.Tensor
    codes: torch.Tensor


class _Room:
    """Room for values in float32 that every chunk of a part uses again."""

    def __init__(self, base: torch.Tensor, num_tensors: int) -> None:
        num_blocks = -(-len(base) // _BLOCK)
        width = prod(base.shape[1:])
        if not _takes_all_at_once(base.device):
            num_blocks = min(num_blocks, _blocks_at_once(width))
        values = min(num_blocks * _BLOCK, len(base)) * width
        self._room = torch.empty(num_tensors, values, dtype=torch.float32, device=base.device)

    def like(self, chunk: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of a chunk's shape."""
        return [room[: chunk.numel()].view(chunk.shape) for room in self._room]


def _takes_all_at_once(device: torch.device) -> bool:
    """Whether all full blocks are computed together: few kernels, but on a CPU what is in between leaves its cache."""
    return device.type != "cpu"


def _blocks_at_once(width: int) -> int:
    return max(1, _CACHED // (_BLOCK * width)) if width else 1


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in float32, finite also where the scale is zero; there, what it multiplies is zero too."""
    return scale.clamp_min(_TINY).reciprocal_()


def _add_scaled_(base: torch.Tensor, levels: torch.Tensor, token: torch.Tensor, channel: torch.Tensor) -> None:
    # Products and sum apart: one fused operation rounds otherwise, and not everywhere alike.
    base.add_(levels.mul_(token).mul_(channel))
