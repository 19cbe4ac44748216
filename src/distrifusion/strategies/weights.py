"""Weights that a rank does not work with: set aside while a plan is on, and brought back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain

import torch
from torch import nn

from distrifusion.strategies.attach import Attachment


def weights_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers of some modules, each once."""
    tensors = chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return list({id(tensor): tensor for tensor in tensors}.values())


def num_bytes(idle: Iterable[nn.Module], model: nn.Module) -> int:
    """Bytes of a model's weights without those of parts that are idle."""
    left = {id(tensor) for tensor in weights_of(idle)}
    return sum(tensor.nbytes for tensor in weights_of([model]) if id(tensor) not in left)


def set_aside(modules: Iterable[nn.Module], layers: Attachment) -> None:
    """Move the weights of modules that no rank calls here from an accelerator to the host, until the layers detach.

    On a CPU they stay where they are: ranks of one machine have them as shared pages, which cost nothing more. Those
    without values (a rehearsal's) have nothing to move.
    """
    for tensor in weights_of(modules):
        if tensor.device.type not in ("cpu", "meta"):
            layers.undo(partial(_bring_back, tensor, tensor.device))
            tensor.data = tensor.data.cpu()


def _bring_back(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)
