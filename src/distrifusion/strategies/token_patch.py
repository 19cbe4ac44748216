"""Patch parallelism on transformers (DistriFusion, arXiv 2402.19481): own queries, everybody's keys and values.

Whether those of the others are this call's, the last call's, forecast or sent as codes is the exchange's policy.
"""

from __future__ import annotations

import torch

from distrifusion.exchange.verbs import Exchange
from distrifusion.plan import SiteKind
from distrifusion.strategies.attention import AttentionCall, TokenStep, attend


class GatheredAttention:
    """Gathers keys and values in one buffer, which attention reads in place."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __call__(self, step: TokenStep, call: AttentionCall) -> torch.Tensor:
        """The result for the own queries."""
        num_heads = call.key.shape[1]
        pieces = [x.transpose(1, 2).flatten(2) for x in (call.key, call.value)]
        gathered = self._exchange.gather(call.name, SiteKind.KV, pieces, call.keys).wait()
        key, value = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in gathered)
        return attend(call.query, key, value, call.bias, call.scale)
