"""One denoiser on virtual ranks, to be compared with the same denoiser on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.virtual import VirtualWorld
from models import relative_error, run_request, share_weights

T = TypeVar("T")
Inputs = dict[str, Any]

EXACT = 1e-5  # the project's bound for the synchronous mode in fp32; 1e-6 is typical


def on_ranks(
    unet: UNet2DConditionModel, plan: str, work: Callable[[UNet2DConditionModel, ParallelDenoiser], T]
) -> list[T]:
    """Run `work(model, denoiser)` on every rank of a plan; modules are each rank's own, weights are shared."""

    def body(transport: Any) -> T:
        model = share_weights(unet)
        denoiser = ParallelDenoiser(model, Plan.parse(plan), transport)
        denoiser.attach()
        with torch.no_grad():
            return work(model, denoiser)

    return VirtualWorld(Plan.parse(plan).num_ranks).run(body)


def predictions(unet: UNet2DConditionModel, plan: str, steps: Sequence[Inputs]) -> list[list[torch.Tensor]]:
    """The predictions of one request, by rank and step."""
    return on_ranks(unet, plan, lambda model, denoiser: run_request(model, denoiser, steps))


def errors(unet: UNet2DConditionModel, plan: str, steps: Sequence[Inputs]) -> list[float]:
    """The relative error of each step's prediction against one device, the worst rank's."""
    with torch.no_grad():
        references = [unet(**inputs).sample for inputs in steps]
    by_rank = predictions(unet, plan, steps)
    return [max(relative_error(rank[i], reference) for rank in by_rank) for i, reference in enumerate(references)]
