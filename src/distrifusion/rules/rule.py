"""A way to divide a denoiser's calls within a team: what it is given, what it is asked, and what most ways share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from distrifusion.anatomy.base import Anatomy, Site
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.mesh import CallLayout
from distrifusion.memory.check import Question
from distrifusion.nested import map_tensors
from distrifusion.plan import Plan
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.weights import Aside, num_bytes

Facts = TypeVar("Facts", bound=Anatomy | TokenAnatomy)


@dataclass(frozen=True)
class Subject(Generic[Facts]):
    """A denoiser that is to be divided.

    Attributes:
        model: the denoiser.
        anatomy: its family's.
        plan: how to divide.
        exchange: this rank's.
        prefix: begins the names of the model's layers.
    """

    model: nn.Module
    anatomy: Facts
    plan: Plan
    exchange: Exchange
    prefix: str


class Rule(ABC, Generic[Facts]):
    """How the calls of one kind of denoiser are divided within a team; all methods are called on every rank.

    Attributes:
        aside: parts of the model that this rank does not run.
    """

    def __init__(self, subject: Subject[Facts]) -> None:
        self._model = subject.model
        self._anatomy = subject.anatomy
        self._plan = subject.plan
        self._exchange = subject.exchange
        self._prefix = subject.prefix
        self.aside = Aside(subject.model)

    def weight_bytes(self) -> int:
        """Bytes of the model's weights that this rank works with: of all parts that are not aside."""
        return num_bytes(self.aside.modules, self._model)

    @abstractmethod
    def sites(self) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""

    @abstractmethod
    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of the sites."""

    def bind(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Sort the arguments into a DenoiserCall; raises ConfigError on one that cannot be cut."""
        return self._anatomy.bind(forward, args, kwargs)

    @abstractmethod
    def question(self, call: Any) -> Question | None:
        """The call as one whose values are to be kept; None where what is kept cannot be said before."""

    @abstractmethod
    def compute(
        self, forward: Callable[..., Any], call: Any, layout: CallLayout, num_before: int, past_warmup: bool
    ) -> Any:
        """Run the model's own forward on this rank's part; `num_before` calls of the request went before."""

    @abstractmethod
    def join(self, result: Any, call: Any, layout: CallLayout) -> Any:
        """The model's own output, whole."""

    def _with_all_rows(self, result: Any, layout: CallLayout) -> Any:
        """A result whose tensors [B, ...] have this rank's rows, with those that others have, in the batch's order."""
        others = layout.others_with_my_band
        return map_tensors(result, partial(self._all_rows, layout, others)) if others else result

    def _all_rows(self, layout: CallLayout, others: tuple[int, ...], own: torch.Tensor) -> torch.Tensor:
        shapes = {rank: torch.Size((len(layout.batch[rank]), *own.shape[1:])) for rank in others}
        parts = self._exchange.collect(f"{self._prefix}exit", own.contiguous(), shapes).wait()
        parts[self._exchange.transport.rank] = own
        return torch.cat([parts[rank] for rank in sorted(parts)])
