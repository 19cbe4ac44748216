"""Ulysses (DeepSpeed Ulysses, arXiv 2309.14509): ranks trade tokens for heads, attend, and trade back. Exact.

Numbers of heads and of tokens need not divide: parts differ by one, and a rank may have no head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.partition import Interval, split_evenly
from distrifusion.strategies.attention import Attend, AttentionCall, TokenStep, attend, starts_of


class UlyssesAttention:
    """Attention of some heads over all tokens of a group, between two trades with the group.

    Args:
        exchange: this rank's.
        inner: attends with some heads to keys that the group does not have, such as those of other groups; None if the
            group has all keys.
    """

    def __init__(self, exchange: Exchange, inner: Attend | None = None) -> None:
        self._exchange = exchange
        self._inner = inner

    def __call__(self, step: TokenStep, call: AttentionCall) -> torch.Tensor:
        """The result for the own queries."""
        group = step.axes.ulysses
        heads = split_evenly(call.query.shape[1], len(group))
        own = heads[step.axes.index[0]]
        queries, keys = ([lengths[place] for place in group] for lengths in (call.queries, call.keys))
        # Both trades are under way before the first is waited for.
        query_comes = self._heads_for_tokens(step, f"{call.name}.query", (call.query,), queries, heads)
        pair_comes = self._heads_for_tokens(step, f"{call.name}.key", (call.key, call.value), keys, heads)
        (query,), (key, value) = query_comes(), pair_comes()
        bias = call.bias
        if bias is not None and bias.shape[1] > 1:
            bias = bias[:, own.start : own.stop]
        if not len(own):
            result = torch.empty_like(query)
        elif self._inner is None:
            result = attend(query, key, value, bias, call.scale)
        else:
            result = self._inner(step, replace(call, query=query, key=key, value=value, bias=bias))
        return self._tokens_for_heads(step, call, result, queries, heads)

    def _heads_for_tokens(
        self,
        step: TokenStep,
        name: str,
        pieces: Sequence[torch.Tensor],
        lengths: Sequence[int],
        heads: Sequence[Interval],
    ) -> Callable[[], list[torch.Tensor]]:
        """Give each of the group its heads of the own tokens [B, N, L_own, D]; what comes is [B, N_own, L_group, D]."""
        me = step.axes.index[0]
        batch, _, _, channels = pieces[0].shape
        # Tokens first, so that what one rank sends is one block.
        room = pieces[0].new_empty(sum(lengths), batch, len(pieces), len(heads[me]), channels)
        places = room.split(list(lengths))
        given = {}
        for i, part in enumerate(heads):
            blocks = [piece[:, part.start : part.stop].permute(2, 0, 1, 3) for piece in pieces]
            if i == me:
                torch.stack(blocks, 2, out=places[me])
            else:
                given[self._rank(step, i)] = torch.stack(blocks, 2)
        taken = {self._rank(step, i): place for i, place in enumerate(places) if i != me}
        swap = self._exchange.swap(name, given, taken)

        def come() -> list[torch.Tensor]:
            swap.wait()
            return [piece.permute(1, 2, 0, 3) for piece in room.unbind(2)]

        return come

    def _tokens_for_heads(
        self,
        step: TokenStep,
        call: AttentionCall,
        result: torch.Tensor,
        lengths: Sequence[int],
        heads: Sequence[Interval],
    ) -> torch.Tensor:
        """Give each its tokens of the own heads [B, N_own, L_group, D]; what comes is [B, N, L_own, D]."""
        me = step.axes.index[0]
        batch, num_heads, own_length, channels = call.query.shape
        starts = starts_of(lengths)
        blocks = [result[:, :, a:b].permute(2, 0, 1, 3) for a, b in pairwise(starts)]
        given = {self._rank(step, i): block.contiguous() for i, block in enumerate(blocks) if i != me}
        taken = {
            self._rank(step, i): result.new_empty(own_length, batch, len(part), channels)
            for i, part in enumerate(heads)
            if i != me
        }
        received = self._exchange.swap(f"{call.name}.out", given, taken).wait()
        # The model reshapes the result to [B, L, N D] at once.
        whole = result.new_empty(batch, own_length, num_heads, channels)
        for i, part in enumerate(heads):
            block = blocks[me] if i == me else received[self._rank(step, i)]
            whole[:, :, part.start : part.stop] = block.transpose(0, 1)
        return whole.transpose(1, 2)

    @staticmethod
    def _rank(step: TokenStep, member: int) -> int:
        return step.team[step.axes.ulysses[member]]
