"""The steps of any diffusers scheduler, one after the other."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from distrifusion.samplers.evaluations import Evaluations, Sample, Sampler
from distrifusion.samplers.known import Known
from distrifusion.samplers.noise import StepNoise


def diffusers_loop(
    x: torch.Tensor,
    scheduler: Any,
    noise: StepNoise,
    first: int = 0,
    known: Known | None = None,
    **step_options: Any,
) -> Sampler:
    """Sample as the loop of a diffusers pipeline does, with its own scheduler.

    Args:
        x: the state to begin with [B, ...]: noise scaled by the scheduler's `init_noise_sigma`, or a noised picture.
        scheduler: any diffusers scheduler whose timesteps are set; a copy of it is used, since it counts its steps.
        noise: of the steps that draw some, counted from the first that is taken.
        first: the scheduler's step to begin at.
        known: what every state has of a known picture.
        step_options: what the scheduler's `step` takes besides, such as eta.
    """
    scheduler = copy.deepcopy(scheduler)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    estimate = x
    timesteps = scheduler.timesteps[first:]
    for i, t in enumerate(timesteps):
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        answer = yield Evaluations(model_input[None], t[None], estimate)
        options = {**step_options, "generator": noise.at(i)} if takes_generator else step_options
        x = scheduler.step(answer[0], t, x, **options, return_dict=False)[0]
        x = estimate = x if known is None else known.stepped(scheduler, timesteps[i + 1 : i + 2], x)
    return Sample(x, None, len(timesteps), len(timesteps))
