"""Bytes that stages keep of a transformer: keys and values of their own blocks, of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy.tokens import TokenCall
from distrifusion.memory.tokens import Asked, TokenShapes
from distrifusion.mesh import RankGrid, StagePlace
from distrifusion.partition import split_evenly
from distrifusion.plan import Plan

# The names of the blocks of every stage of a plan.
Stages = Callable[[Plan], Sequence[Sequence[str]]]


class StageQuestion:
    """What a call keeps whose pieces flow through stages."""

    def __init__(self, shapes: TokenShapes, stages: Stages, call: TokenCall) -> None:
        self._shapes = shapes
        self._stages = stages
        self._call = call.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        self._found: dict[int, tuple[list[Asked], int]] = {}

    def by_rank(self, plan: Plan) -> list[int]:
        """Bytes that every rank of a plan would keep.

        Raises:
            UnsupportedModel: if shapes do not tell.
        """
        return [self._kept_by(plan, rank) if plan.late else 0 for rank in range(plan.num_ranks)]

    def smaller(self, part: float) -> None:
        """Which arguments would be smaller for a smaller picture only the pipeline knows."""

    def _kept_by(self, plan: Plan, rank: int) -> int:
        layout = RankGrid(plan, rank).layout(self._call.sample.shape[0])
        place = StagePlace.of(plan, layout)
        num_rows = len(layout.rows)
        if num_rows not in self._found:
            self._found[num_rows] = self._shapes.whole(self._call.take_rows(layout.rows))
        asked, fewest = self._found[num_rows]
        own = tuple(f"{name}." for name in self._stages(plan)[place.stage])
        # Where a stream is too short for its group, every rank of the group has all heads.
        size, index = (len(place.group), place.index) if fewest >= len(place.group) else (1, 0)
        return sum(_kept_of(one, plan, size, index) for one in asked if one.name.startswith(own))


def _kept_of(asked: Asked, plan: Plan, size: int, index: int) -> int:
    """Bytes of one attention, of which a group divides the heads: keys and values, of two calls for a forecast."""
    num_tokens, batch, num_pieces, channels = asked.shape
    heads = len(split_evenly(asked.num_heads, size)[index])
    pair = num_tokens * batch * num_pieces * (channels // asked.num_heads) * heads
    bias = asked.bias[0] * (heads if asked.bias[1] > 1 else 1) * num_tokens if asked.bias and heads else 0
    return asked.itemsize * (pair * (2 if plan.forecast else 1) + bias)


