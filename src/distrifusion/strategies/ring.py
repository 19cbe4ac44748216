"""Ring attention (arXiv 2310.01889): keys and values go round, each rank attends to the block that it has meanwhile.

Exact: what each block gives is merged with what the others gave by the logarithms of the softmax's denominators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distrifusion.exchange.verbs import Exchange
from distrifusion.strategies.attention import AttentionCall, TokenStep, attend_with_sum, merge_, starts_of


class RingAttention:
    """Attention to one block of keys at a time, while the next block is on its way from the rank before."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __call__(self, step: TokenStep, call: AttentionCall) -> torch.Tensor:
        """The result for the queries of the call, whose keys are those of this rank's place in the ring."""
        ring, me = step.axes.ring, step.axes.index[1]
        size = len(ring)
        after, before = (step.team[ring[(me + by) % size]] for by in (1, -1))
        lengths = block_lengths(step, call.keys)
        starts = starts_of(lengths)
        batch, num_heads, _, channels = call.key.shape
        block = torch.stack([x.permute(2, 0, 1, 3) for x in (call.key, call.value)], 2)  # [L, B, 2, N, D]
        out, lse = self._nothing_yet(call.query)
        for turn in range(size):
            owner = (me - turn) % size
            coming = None
            if turn + 1 < size:
                room = block.new_empty(lengths[(owner - 1) % size], batch, 2, num_heads, channels)
                coming = self._exchange.swap(f"{call.name}.block", {after: block}, {before: room})
            bias = None if call.bias is None else call.bias[..., starts[owner] : starts[owner + 1]]
            key, value = (x.permute(1, 2, 0, 3) for x in block.unbind(2))
            merge_(out, lse, *attend_with_sum(call.query, key, value, bias, call.scale))
            if coming is not None:
                coming.wait()
                block = room
        return out.to(call.query.dtype)

    @staticmethod
    def _nothing_yet(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to no key at all, to which any block can be added."""
        out = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
        return out, out.new_full(query.shape[:3], -torch.inf)


def block_lengths(step: TokenStep, keys: Sequence[int]) -> list[int]:
    """Numbers of keys that each place of the ring holds: those of its Ulysses group."""
    degree = len(step.axes.ulysses)
    return [sum(keys[block * degree : (block + 1) * degree]) for block in range(len(step.axes.ring))]
