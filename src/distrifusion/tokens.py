"""A transformer's calls cut by tokens: batch rows before the model's own forward, tokens inside, joined after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.tokens import TokenAnatomy, TokenCall
from distrifusion.exchange.verbs import Exchange
from distrifusion.memory.tokens import TokenQuestion, TokenShapes
from distrifusion.mesh import AttentionAxes, CallLayout
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.attention import Attend, TokenStep
from distrifusion.strategies.ring import RingAttention
from distrifusion.strategies.token_patch import GatheredAttention
from distrifusion.strategies.tokens import TokenStrategy, TooFewTokens
from distrifusion.strategies.ulysses import UlyssesAttention
from distrifusion.strategies.weights import num_bytes


class TokenRule:
    """How a denoiser with a `TokenAnatomy` is divided within a team.

    The forward of the model gets this rank's rows of the batch and all latents: what embeds patches and positions sees
    the whole picture. After that each rank has its own part of every stream of tokens, until they are joined.

    Args:
        model: the denoiser.
        anatomy: its family's.
        plan: how to divide.
        exchange: this rank's.
        prefix: begins the names of the model's layers.

    Raises:
        PlanError: if the plan has a word that says nothing to a transformer.
    """

    def __init__(self, model: nn.Module, anatomy: TokenAnatomy, plan: Plan, exchange: Exchange, prefix: str) -> None:
        plan.check_tokens(type(model).__name__)
        self._model = model
        self._anatomy = anatomy
        self._plan = plan
        self._exchange = exchange
        self._prefix = prefix
        self._tokens = TokenStrategy(exchange, _method_of(plan, exchange))
        self._shapes = TokenShapes(model, anatomy)

    def sites(self) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""
        return self._anatomy.sites(self._model)

    def weight_bytes(self) -> int:
        """Bytes of the model's weights: every rank works with all."""
        return num_bytes((), self._model)

    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of the sites."""
        self._tokens.attach(sites, layers)

    def bind(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> TokenCall:
        """Sort the arguments of a call; raises ConfigError on one that has no rule."""
        return self._anatomy.bind(forward, args, kwargs)

    def question(self, call: TokenCall) -> TokenQuestion | None:
        """The call as one whose values are to be kept; None, with a warning, where shapes do not tell."""
        return self._shapes.question(call, self._plan)

    def compute(
        self, forward: Callable[..., Any], call: TokenCall, layout: CallLayout, num_before: int, past_warmup: bool
    ) -> Any:
        """Run the model's own forward on this rank's batch rows; it meets the cuts inside."""
        own, cuts = call.take_rows(layout.rows), self._anatomy.own_cuts
        axes = AttentionAxes.of(self._plan, len(layout.team), layout.index)
        step = TokenStep(layout.team, layout.index, axes, alone=past_warmup and self._plan.naive)
        try:
            return self._tokens.run(step, forward, own, cuts)
        except TooFewTokens:
            # Models need not bear empty parts, so a stream that short leaves the call whole on every rank.
            return self._tokens.run(TokenStep(layout.team[layout.index :][:1], 0, axes), forward, own, cuts)

    def join(self, result: Any, call: TokenCall, layout: CallLayout) -> Any:
        """The output with all rows of the batch: the tokens have been joined inside."""
        others = layout.others_with_my_band
        if not others:
            return result
        return map_tensors(result, partial(self._all_rows, layout, others))

    def _all_rows(self, layout: CallLayout, others: tuple[int, ...], own: torch.Tensor) -> torch.Tensor:
        """The output [B, ...] from the own rows and those that other ranks have, in the order of the batch."""
        shapes = {rank: torch.Size((len(layout.batch[rank]), *own.shape[1:])) for rank in others}
        parts = self._exchange.collect(f"{self._prefix}exit", own, shapes).wait()
        parts[self._exchange.transport.rank] = own
        return torch.cat([parts[rank] for rank in sorted(parts)])


def _method_of(plan: Plan, exchange: Exchange) -> Attend:
    """What attends for all ranks."""
    if not plan.divides_heads:
        return GatheredAttention(exchange)
    ring = RingAttention(exchange)
    if plan.ulysses == 1:
        return ring
    return UlyssesAttention(exchange, ring if plan.ring > 1 else None)
