"""A pipeline on virtual ranks, each with a copy of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from distrifusion import Plan, parallelize
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from models import copy_modules, relative_error

EXACT = 1e-5  # the project's bound for the synchronous mode in fp32; 1e-6 is typical
Call = Callable[[Any], torch.Tensor]


class Ranks:
    """One parallelized copy of a pipeline for each rank of a plan."""

    def __init__(self, pipe: DiffusionPipeline, plan: str) -> None:
        self.plan = Plan.parse(plan)
        self.world = VirtualWorld(self.plan.num_ranks)
        self.transports = [VirtualTransport(self.world, rank) for rank in range(self.plan.num_ranks)]
        self.pipes = [parallelize(own_copy(pipe), self.plan, transport) for transport in self.transports]

    def each(self, change: Callable[[Any], Any]) -> list[Any]:
        """Change every rank's pipeline, one after the other."""
        return [change(pipe) for pipe in self.pipes]

    def derive(self, make: Callable[[Any], DiffusionPipeline]) -> list[Any]:
        """Pipelines made of every rank's own, such as by `from_pipe`, parallelized by the same plan."""
        made = self.each(make)
        return [parallelize(pipe, self.plan, transport) for pipe, transport in zip(made, self.transports, strict=True)]

    def draw(self, call: Call, pipes: list[Any] | None = None) -> list[torch.Tensor]:
        """What a call gives on every rank, all at the same time; `pipes` are others than the ranks' own."""
        return self.world.run(lambda transport: call((pipes or self.pipes)[transport.rank]))

    def error(self, call: Call, reference: torch.Tensor, pipes: list[Any] | None = None) -> float:
        """The relative error of a call against a reference, the worst rank's."""
        return max(relative_error(drawn, reference) for drawn in self.draw(call, pipes))


def own_copy(pipe: DiffusionPipeline) -> Any:
    """A pipeline with components of its own: tokenizers are not for threads, and adapters may change weights."""
    config = {name: value for name, value in pipe.config.items() if name in pipe._get_signature_keys(pipe)[1]}
    copied = type(pipe)(**{name: _own(part) for name, part in pipe.components.items()}, **config)
    copied.set_progress_bar_config(disable=True)
    return copied


def _own(part: Any) -> Any:
    return copy_modules(part, _own_tensor) if isinstance(part, torch.nn.Module) else copy.deepcopy(part)


def _own_tensor(tensor: torch.Tensor) -> torch.Tensor:
    own = tensor.detach().clone()
    return torch.nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else own


def errors(pipe: DiffusionPipeline, plan: str, call: Call) -> float:
    """The relative error of a call on the ranks of a plan against the plain pipeline."""
    return Ranks(pipe, plan).error(call, call(own_copy(pipe)))
