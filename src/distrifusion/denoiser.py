"""One denoiser on all ranks: divides a call over the ranks, runs the model's own code, and joins the prediction."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.base import Site
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.division import Division
from distrifusion.errors import ConfigError
from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.pool import CallState, Pool
from distrifusion.exchange.transport import Transport
from distrifusion.exchange.verbs import Exchange
from distrifusion.graphs import Backend, Graphs
from distrifusion.layout.mesh import CallLayout, RankGrid
from distrifusion.memory.check import check_fits
from distrifusion.nested import take_rows
from distrifusion.pacing import Pacing
from distrifusion.plan import Plan
from distrifusion.rules.bands import BandRule
from distrifusion.rules.components import ComponentRule
from distrifusion.rules.rule import Rule, Subject
from distrifusion.rules.shares import ShareRule
from distrifusion.rules.stages import StageRule
from distrifusion.rules.tokens import TokenRule
from distrifusion.strategies.attach import Attachment


class DenoiserCall(Protocol):
    """The arguments of one call, sorted by how they are cut."""

    @property
    def sample(self) -> torch.Tensor:
        """The latents, with the batch as first dimension."""

    @property
    def timestep(self) -> Any:
        """The timestep: a number or a tensor [] or [B]."""

    @property
    def key(self) -> Hashable:
        """What must be alike in two calls that use the same kept values."""

    def map(self, change: Callable[[torch.Tensor], Any]) -> DenoiserCall:
        """The call with every tensor changed."""


@dataclass(frozen=True)
class OpenRequest:
    """A request that is under way, and the denoiser call within its scheduler step that comes next."""

    request: Hashable | None
    slot: Hashable


class ParallelDenoiser(Division):
    """A diffusers denoiser whose calls are divided over the ranks of a plan.

    Called like the model itself, on every rank with the same arguments; every rank gets the whole prediction. A
    ControlNet is divided alike; each rank keeps its own part of the residuals, which a U-Net takes as they are. Outside
    a request (see `open`), nothing is kept and every call is synchronous.

    Args:
        model: the denoiser, unmodified; `detach` restores it bit for bit.
        plan: how to divide.
        transport: the ranks; exactly `plan.num_ranks` of them.
        prefix: begins the names of this model's layers in messages and errors; models that share ranks differ in it.

    Attributes:
        needs_request: a call outside a request is refused, because nobody has made the ranks agree.
        graphs: calls of a request that are captured and replayed; None: every call runs the model's code.

    Raises:
        UnsupportedModel: if a layer mixes positions and has no rule.
        PlanError: if the plan has a word that says nothing to such a model.
    """

    def __init__(self, model: nn.Module, plan: Plan, transport: Transport, prefix: str = "") -> None:
        super().__init__(model, transport, prefix)
        self.plan = plan
        self.pool = Pool()
        self.request: Hashable | None = None
        self.slot: Hashable = 0
        self._grid = RankGrid(plan, transport.rank)
        self._pacing = Pacing(plan, self.exchange)
        self._rule = _rule_of(model, plan, self.exchange, prefix)
        self.needs_request = False
        self.graphs: Graphs | None = None
        self._audited = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights that this rank works with."""
        return self._rule.weight_bytes()

    @property
    def aside(self) -> list[nn.Module]:
        """Parts of the model that this rank does not run, as far as that is known: their weights may be elsewhere."""
        return self._rule.aside.modules

    def detach(self) -> None:
        """Restore the model as it was, with all weights where its first parameter is."""
        super().detach()
        self._rule.aside.hold(())

    def _find_sites(self) -> list[Site]:
        return self._rule.sites()

    def _put_on(self, sites: Sequence[Site], layers: Attachment) -> None:
        self._rule.attach(sites, layers)

    def capture_by(self, backend: Backend) -> None:
        """Capture calls that repeat, and replay them; raises ConfigError if the plan does not let them be alike."""
        self.graphs = Graphs(self.plan, self.exchange, backend)

    def open(self, request: Hashable) -> OpenRequest:
        """Start a request: one picture (or batch) from its first step to its last. Every rank calls it.

        Returns what was open before, which `close` takes to go on with it.
        """
        before = OpenRequest(self.request, self.slot)
        self.request, self.slot = request, 0
        self._audited = False
        self._forget_graphs()
        return before

    def close(self, before: OpenRequest | None = None) -> None:
        """End the request and forget what it kept. Every rank calls it."""
        request = self.request
        self.request, self.slot = (before.request, before.slot) if before else (None, 0)
        self.exchange.underway.finish()
        self._forget_graphs()
        self.pool.close(request)

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.forget()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One denoiser call; `forward` is the model's own."""
        if self.needs_request and self.request is None:
            raise ConfigError(
                f"{type(self.model).__name__} is divided by plan '{self.plan}' and was called outside a run of a "
                "parallelized pipeline; call parallelize(pipe, plan) on the pipeline that calls it, also on one that "
                "from_pipe made"
            )
        if not self._audited:
            # Some pipelines put attention processors of their own on the model at the start of a run.
            self._sites()
            self._audited = True
        call: DenoiserCall = self._rule.bind(forward, args, kwargs)
        num_rows = call.sample.shape[0]
        layout = self._grid.layout(num_rows)
        state = self._state(call.key)
        timestep = call.timestep
        if isinstance(timestep, torch.Tensor):
            timestep = take_rows(layout.rows, num_rows, timestep)
        policy = self._pacing.policy(layout.team, layout.index, state, timestep, call.sample.device)
        work = partial(self._work, forward, layout)
        return self.graphs.run(call, policy, self._steady(state), work) if self.graphs else work(call, policy)

    def _work(self, forward: Callable[..., Any], layout: CallLayout, call: Any, policy: CallPolicy) -> Any:
        """The call itself."""
        state = policy.state
        self.exchange.begin(policy)
        first = state is not None and state.calls == 0 and not call.sample.is_meta
        if first and (self.plan.kept or self.plan.late) and (question := self._rule.question(call)):
            check_fits(question, self.plan, self.exchange, call.sample.device)
        num_before = state.calls if state else 0
        result = self._rule.compute(forward, call, layout, num_before, self._pacing.past_warmup(state))
        decide = self._pacing.announce(state, self.prefix, call.sample)
        output = self._rule.join(result, call, layout)
        decide()
        self.exchange.end()
        return output

    def _steady(self, state: CallState | None) -> Hashable | None:
        """What the plan does in this call and in later ones alike; None outside a request and in its warm-up."""
        if self.request is None or (state is not None and not self._pacing.past_warmup(state)):
            return None
        return self.plan.split_of(state.calls if state else 0)

    def _state(self, key: Hashable) -> CallState | None:
        """What the request at hand keeps for this call of its scheduler step; None where nothing is kept."""
        if self.request is None or self.plan.exact:
            return None
        slot = (self.slot, key)
        self.slot = self.slot + 1 if isinstance(self.slot, int) else self.slot
        return self.pool.state(self.request, slot)


def _rule_of(model: nn.Module, plan: Plan, exchange: Exchange, prefix: str) -> Rule[Any]:
    """The rule for the plan's method and the kind of anatomy that a model has."""
    anatomy = anatomy_of(model)
    if plan.components > 1:
        return ComponentRule(Subject(model, anatomy, plan, exchange, prefix))
    if plan.tp > 1:
        return ShareRule(Subject(model, anatomy, plan, exchange, prefix))
    if not isinstance(anatomy, TokenAnatomy):
        return BandRule(Subject(model, anatomy, plan, exchange, prefix))
    tokens = Subject(model, anatomy, plan, exchange, prefix)
    return StageRule(tokens) if plan.stages > 1 else TokenRule(tokens)
