"""A transformer's calls cut by tokens: batch rows before the model's own forward, tokens inside, joined after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.tokens import TokenAnatomy, TokenCall
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.mesh import AttentionAxes, CallLayout
from distrifusion.memory.tokens import TokenQuestion, TokenShapes
from distrifusion.plan import Plan
from distrifusion.rules.rule import Rule, Subject
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.attention import Attend, TokenStep
from distrifusion.strategies.ring import RingAttention
from distrifusion.strategies.token_patch import GatheredAttention
from distrifusion.strategies.tokens import TokenStrategy, TooFewTokens
from distrifusion.strategies.ulysses import UlyssesAttention


class TokenRule(Rule[TokenAnatomy]):
    """How a denoiser with a `TokenAnatomy` is divided within a team.

    The forward of the model gets this rank's rows of the batch and all latents: what embeds patches and positions sees
    the whole picture. After that each rank has its own part of every stream of tokens, until they are joined.

    Raises:
        PlanError: if the plan has a word that says nothing to a transformer.
    """

    def __init__(self, subject: Subject[TokenAnatomy]) -> None:
        subject.plan.check_tokens(type(subject.model).__name__)
        super().__init__(subject)
        self._tokens = TokenStrategy(self._exchange, _method_of(self._plan, self._exchange))
        self._shapes = TokenShapes(self._model, self._anatomy)

    def sites(self) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""
        return self._anatomy.sites(self._model)

    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of the sites."""
        self._tokens.attach(sites, layers)

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
        return self._with_all_rows(result, layout)


def _method_of(plan: Plan, exchange: Exchange) -> Attend:
    """What attends for all ranks."""
    if not plan.divides_heads:
        return GatheredAttention(exchange)
    ring = RingAttention(exchange)
    if plan.ulysses == 1:
        return ring
    return UlyssesAttention(exchange, ring if plan.ring > 1 else None)
