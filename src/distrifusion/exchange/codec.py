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

import torch

from distrifusion.errors import ConfigError

_BLOCK = 128  # tokens that share channel scales; a block of a small model's site stays in the second-level cache
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
            base: [L, B, P, C] in float32, float16 or bfloat16; what the other side holds too.
            out: uint8 [num_bytes(base.shape)], contiguous, at an even address.
        """
        for block in self._blocks(base, out):
            difference = torch.empty(block.base.shape, dtype=torch.float32, device=base.device)
            for i, piece in enumerate(pieces):
                fresh = piece.transpose(0, 1)[block.start : block.stop]
                difference[..., i, :].copy_(fresh.unflatten(0, block.base.shape[:2]))
            self._quantise_(difference.sub_(block.base), block)
            _add_scaled_(difference, block)

    def decode_(self, packed: torch.Tensor, base: torch.Tensor) -> None:
        """Add the difference that `encode_` wrote to the receiver's `base`, to the bits that the sender now holds."""
        for block in self._blocks(base, packed):
            codes = self._unpack(block.codes, block.base[0].numel())
            levels = codes.view(block.base.shape).to(torch.float32)
            _add_scaled_(levels.add_(0.5 - 2 ** (self.bits - 1)), block)

    def _code_bytes(self, num_values: int) -> int:
        return -(-num_values * self.bits // 8)

    def _blocks(self, base: torch.Tensor, wire: torch.Tensor) -> Iterator[_Blocks]:
        """Blocks of a part, with what of the wire belongs to them."""
        if not base.numel():
            return
        assert wire.shape == (self.num_bytes(base.shape),), (wire.shape, base.shape)
        num_tokens, shape, width = len(base), base.shape[1:], base[0].numel()
        counts = [-(-num_tokens // _BLOCK) * width, num_tokens * (width // shape[-1])]
        channel, token, codes = wire.split([2 * counts[0], 2 * counts[1], len(wire) - 2 * sum(counts)])
        channel = channel.view(torch.bfloat16).view(-1, 1, *shape)
        token = token.view(torch.bfloat16).view(num_tokens, *shape[:-1], 1)
        full = num_tokens // _BLOCK * _BLOCK
        at_once = max(full, _BLOCK) if _takes_all_at_once(base.device) else _BLOCK
        starts = [*range(0, full, at_once), *([full] if full < num_tokens else [])]
        for start, stop in zip(starts, [*starts[1:], num_tokens], strict=True):
            length = min(_BLOCK, stop - start)
            first, count = start // _BLOCK, (stop - start) // length
            per_block = self._code_bytes(length * width)
            offset = first * self._code_bytes(_BLOCK * width)
            yield _Blocks(
                start=start,
                stop=stop,
                base=base[start:stop].unflatten(0, (count, length)),
                channel=channel[first : first + count],
                token=token[start:stop].unflatten(0, (count, length)),
                codes=codes[offset : offset + count * per_block].view(count, per_block),
            )

    def _quantise_(self, difference: torch.Tensor, block: _Blocks) -> None:
        """Write scales and codes to the wire, and turn the difference [n, L, B, P, C] into levels, in steps."""
        half = 2 ** (self.bits - 1)
        magnitude = difference.abs()
        block.channel.copy_(magnitude.mean(1, keepdim=True))
        difference.mul_(_reciprocal(block.channel))
        if self.bits in _STEP_BY_RMS:
            norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
            block.token.copy_(norm.mul_(_STEP_BY_RMS[self.bits] * difference.shape[-1] ** -0.5))
        else:
            peak = torch.abs(difference, out=magnitude).amax(-1, keepdim=True)
            block.token.copy_(peak.mul_(_MARGIN / half))
        difference.mul_(_reciprocal(block.token)).floor_().clamp_(-half, half - 1)
        self._pack(difference.flatten(1), block.codes)
        difference.add_(0.5)

    def _pack(self, floors: torch.Tensor, out: torch.Tensor) -> None:
        """Codes of [n, values] whole numbers from -2^(bits-1) on, as [n, bytes]; halves of a row share bytes."""
        num_values, num_codes = floors.shape[1], out.shape[1] * 8 // self.bits
        signed = torch.empty(len(floors), num_codes, dtype=torch.int8, device=out.device)
        signed[:, :num_values].copy_(floors)
        signed[:, num_values:].fill_(0)
        # uint8 wraps: -1 is 255, and 255 + half is half - 1.
        codes = signed.view(torch.uint8).add_(2 ** (self.bits - 1))
        for bits in (1, 2, 4):
            if bits >= self.bits:
                low, high = codes.chunk(2, 1)
                codes = torch.add(low, high, alpha=2**bits)
        out.copy_(codes)

    def _unpack(self, packed: torch.Tensor, num_values: int) -> torch.Tensor:
        """The codes [n, values] of bytes [n, bytes], from 0 to 2^bits - 1."""
        for bits in (4, 2, 1):
            if bits >= self.bits:
                wide = packed.new_empty(len(packed), 2 * packed.shape[1])
                low, high = wide.chunk(2, 1)
                torch.bitwise_and(packed, 2**bits - 1, out=low)
                torch.bitwise_right_shift(packed, bits, out=high)
                packed = wide
        return packed[:, :num_values]


@dataclass(frozen=True)
class _Blocks:
    """Blocks of equal length: n of them, with L tokens each.

    Attributes:
        start: the first token in the part.
        stop: the token after the last.
        base: [n, L, B, P, C].
        channel: v on the wire, [n, 1, B, P, C].
        token: u on the wire, [n, L, B, P, 1].
        codes: on the wire, [n, bytes].
    """

    start: int
    stop: int
    base: torch.Tensor
    channel: torch.Tensor
    token: torch.Tensor
    codes: torch.Tensor


def _takes_all_at_once(device: torch.device) -> bool:
    """Whether all full blocks are computed together: few kernels, but on a CPU what is in between leaves its cache."""
    return device.type != "cpu"


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in float32, finite also where the scale is zero; there, what it multiplies is zero too."""
    return scale.to(torch.float32).clamp_min_(_TINY).reciprocal_()


def _add_scaled_(levels: torch.Tensor, block: _Blocks) -> None:
    # Products and sum apart: one fused operation rounds otherwise, and not everywhere alike.
    block.base.add_(levels.mul_(block.token.to(torch.float32)).mul_(block.channel.to(torch.float32)))
