"""A denoiser's calls divided by weights: every rank of a team has the whole input, and a share of every layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distrifusion.anatomy.base import Anatomy, BoundCall, Site
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.anatomy.unit_sites import unit_sites
from distrifusion.errors import UnsupportedModel
from distrifusion.layout.mesh import CallLayout
from distrifusion.memory.weights import weights_of
from distrifusion.nested import map_tensors, take_rows
from distrifusion.rules.rule import Rule, Subject
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.tensor import Share, TensorStrategy


class ShareRule(Rule[Anatomy | TokenAnatomy]):
    """How a denoiser of any kind is divided within a team that divides the weights of every layer."""

    def __init__(self, subject: Subject[Anatomy | TokenAnatomy]) -> None:
        super().__init__(subject)
        # Teams keep their size, so a rank's place is the same in every call.
        place = self._exchange.transport.rank % self._plan.tp
        self._tensor = TensorStrategy(self._exchange, Share(place, self._plan.tp))

    def sites(self) -> list[Site]:
        """The modules that have units inside; all others run whole on every rank. UnsupportedModel if there is none."""
        sites = unit_sites(self._model)
        if not sites:
            raise UnsupportedModel(
                f"{type(self._model).__name__} has no layer whose weights could be divided; take patch{self._plan.tp} "
                f"in place of tp{self._plan.tp}"
            )
        return sites

    def weight_bytes(self) -> int:
        """Bytes of the model's weights: of every layer that is divided this rank's share, and all of the others."""
        return weights_of(self._model, self._tensor.share).own

    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of their layers."""
        self._tensor.attach(sites, layers)

    def question(self, call: Any) -> None:
        """Nothing is kept."""

    def compute(
        self,
        forward: Callable[..., Any],
        call: Any,
        layout: CallLayout,
        num_before: int,
        past_warmup: bool,
    ) -> Any:
        """Run the model's own forward on this rank's batch rows."""
        # Residuals of a ControlNet that was divided alike have these rows alone already.
        take = partial(take_rows, layout.rows, call.sample.shape[0])
        if isinstance(call, BoundCall):
            batched = {name: map_tensors(value, take) for name, value in (call.batched | call.spatial).items()}
            return forward(take(call.sample), **batched, **call.rest)
        given = {
            name: value if name in call.tokens else map_tensors(value, take)
            for name, value in call.bound.arguments.items()
        }
        bound = inspect.BoundArguments(call.bound.signature, given)  # type: ignore[arg-type]
        return forward(*bound.args, **bound.kwargs)

    def join(self, result: Any, call: Any, layout: CallLayout) -> Any:
        """The model's own output, with all rows of the batch."""
        if not isinstance(self._anatomy, TokenAnatomy) and self._anatomy.stays_cut(call):
            return result
        return self._with_all_rows(result, layout)
