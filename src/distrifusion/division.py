"""A model whose calls are divided over ranks: forwards put on from outside, audited, and taken off again."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

from torch import nn

from distrifusion.anatomy.base import Site
from distrifusion.errors import ConfigError, UnsupportedModel
from distrifusion.exchange.transport import Transport
from distrifusion.exchange.verbs import Exchange
from distrifusion.strategies.attach import Attachment


class Division(ABC):
    """One model on all ranks.

    Args:
        model: the model, unmodified; `detach` restores it bit for bit.
        transport: the ranks.
        prefix: begins the names of this model's layers in messages and errors; models that share ranks differ in it.

    Attributes:
        holders: objects for whose sake the model is divided.
    """

    def __init__(self, model: nn.Module, transport: Transport, prefix: str) -> None:
        self.model = model
        self.prefix = prefix
        self.exchange = Exchange(transport)
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._root = Attachment()
        self._layers = Attachment()
        self._modules: tuple[nn.Module, ...] = ()

    @classmethod
    def dividing(cls, model: nn.Module) -> Self | None:
        """The division that is put on a model, None if there is none; other tools' hooks may lie around it."""
        forward: Any = vars(model).get("forward")
        while forward is not None:
            owner = getattr(getattr(forward, "func", None), "__self__", None)
            if isinstance(owner, cls) and owner.model is model:
                return owner
            forward = getattr(forward, "__wrapped__", None)
        return None

    @abstractmethod
    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One call of the model on all ranks; `forward` is its own."""

    @abstractmethod
    def _find_sites(self) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""

    @abstractmethod
    def _put_on(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of the layers that have to do with other ranks."""

    def attach(self) -> None:
        """Put the strategies on the model's layers; raises UnsupportedModel naming a layer that has no rule."""
        self._attach_layers()
        self._root.replace(self.model, "forward", partial(partial, self.run))

    def detach(self) -> None:
        """Restore the model as it was."""
        self._root.detach()
        self._layers.detach()
        self._modules = ()

    def check_outermost(self) -> None:
        """Raise ConfigError if another tool has replaced the model's forward since `attach`: it must go first."""
        owner = getattr(getattr(vars(self.model).get("forward"), "func", None), "__self__", None)
        if owner is not self:
            raise ConfigError(
                f"another tool replaced the forward of {type(self.model).__name__} after it was divided (CPU offload "
                "does); call pipe.remove_all_hooks() first"
            )

    def refresh(self) -> None:
        """Look at the layers again: what has no rule is refused, what was added (an adapter) is attached."""
        if self.dividing(self.model) is not self:
            raise ConfigError(
                f"the forward of {type(self.model).__name__} is no longer the divided one: another tool has put its "
                "own there; undo that, or call unparallelize and parallelize again"
            )
        if tuple(self.model.modules()) == self._modules:
            self._sites()
        else:
            self._attach_layers()

    def _attach_layers(self) -> None:
        sites = self._sites()
        self._layers.detach()
        self._modules = tuple(self.model.modules())
        self._put_on(sites, self._layers)

    def _sites(self) -> list[Site]:
        """What the strategies are put on; raises UnsupportedModel naming a layer that has no rule."""
        try:
            return [site.under(self.prefix) for site in self._find_sites()]
        except UnsupportedModel as error:
            if not self.prefix:
                raise
            raise UnsupportedModel(f"{self.prefix.rstrip('.')}: {error}") from error
