"""Weights that a rank does not work with: set aside while a plan is on, and brought back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

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
    """Modules whose weights are on the host of an accelerator, because no call of the rank runs them.

    On a CPU they stay where they are: ranks of one machine have them as shared pages, which cost nothing more.

    Args:
        layers: what brings all of them back when it detaches.
    """

    def __init__(self, layers: Attachment) -> None:
        self._homes: dict[nn.Module, torch.device] = {}
        layers.undo(lambda: self.hold(()))

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Set these modules aside, and bring back the others that were."""
        wanted = list(modules)
        for module in self._homes.keys() - set(wanted):
            _move(module, self._homes.pop(module))
        for module in wanted:
            tensors = weight_tensors([module])
            home = next((tensor.device for tensor in tensors if tensor.device != HOST and not tensor.is_meta), None)
            if module not in self._homes and home is not None:
                self._homes[module] = home
                _move(module, HOST)

    @contextmanager
    def lent(self, module: nn.Module) -> Iterator[None]:
        """Have the weights of a module where it can run, and set them aside again afterwards if they were."""
        home = self._homes.get(module)
        if home is None:
            yield
            return
        _move(module, home)
        try:
            yield
        finally:
            _move(module, HOST)


def set_aside(modules: Iterable[nn.Module], layers: Attachment) -> None:
    """Move the weights of modules that no rank calls here from an accelerator to the host, until the layers detach."""
    Aside(layers).hold(modules)


def _move(module: nn.Module, device: torch.device) -> None:
    """Move all weights, those too that an adapter has brought meanwhile; the parameters stay the same objects."""
    for tensor in weight_tensors([module]):
        tensor.data = tensor.data.to(device)
