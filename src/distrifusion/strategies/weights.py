"""Weights that a rank does not work with: on the host of an accelerator while a plan is on, and brought back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from distrifusion.strategies.attach import Attachment

HOST = torch.device("cpu")


def weight_tensors(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers of some modules, each once."""
    tensors = chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return list({id(tensor): tensor for tensor in tensors}.values())


def num_bytes(idle: Iterable[nn.Module], model: nn.Module) -> int:
    """Bytes of a model's weights without those of parts that are idle."""
    left = {id(tensor) for tensor in weight_tensors(idle)}
    return sum(tensor.nbytes for tensor in weight_tensors([model]) if id(tensor) not in left)


class Aside:
    """Parts of a model whose weights stay on the host of an accelerator, because no call of the rank runs them.

    On a CPU they stay where they are: ranks of one machine have them as shared pages, which cost nothing more.

    Args:
        model: whose; it is where its first parameter is, by which diffusers too says where a model is.

    Attributes:
        modules: those that are aside now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.modules: list[nn.Module] = []

    @property
    def _home(self) -> torch.device:
        return next(self._model.parameters()).device

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Set these modules aside, but for the one with the model's first parameter, and bring back all others."""
        first = next(self._model.parameters())
        wanted = [module for module in modules if all(parameter is not first for parameter in module.parameters())]
        stay = {id(module) for module in wanted}
        for module in self.modules:
            if id(module) not in stay:
                _move(module, self._home)
        self.modules = wanted
        for module in wanted:
            _move(module, HOST)

    @contextmanager
    def lent(self, module: nn.Module) -> Iterator[None]:
        """Have the weights of a module where it can run, and set them aside again afterwards if they were."""
        if all(module is not other for other in self.modules):
            yield
            return
        _move(module, self._home)
        try:
            yield
        finally:
            _move(module, HOST)


@contextmanager
def staying(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules stay where they are while what they are parts of is moved."""
    layers = Attachment()
    for module in modules:
        # What `to` asks of every part of a module in turn.
        layers.replace(module, "_apply", lambda _, module=module: partial(_unmoved, module))  # type: ignore[misc]
    try:
        yield
    finally:
        layers.detach()


def _unmoved(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return module


def _move(module: nn.Module, device: torch.device) -> None:
    """Move all weights, those too that an adapter has brought meanwhile; the parameters stay the same objects."""
    for tensor in weight_tensors([module]):
        if tensor.device != device and not tensor.is_meta:
            tensor.data = tensor.data.to(device)
