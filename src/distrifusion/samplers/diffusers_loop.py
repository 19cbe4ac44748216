"""The steps of any diffusers scheduler, one after the other."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from distrifusion.samplers.evaluations import Evaluations, Sample, Sampler
from distrifusion.samplers.noise import StepNoise


def diffusers_loop(x: torch.Tensor, scheduler: Any, noise: StepNoise, **step_options: Any) -> Sampler:
    """Sample as the loop of a diffusers pipeline does, with its own scheduler.

    Args:
        x: noise [B, ...], scaled by the scheduler's `init_noise_sigma`.
        scheduler: any diffusers scheduler whose timesteps are set; a copy of it is used, since it counts its steps.
        noise: of the steps that draw some.
        step_options: what the scheduler's `step` takes besides, such as eta.
    """
    scheduler = copy.deepcopy(scheduler)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    estimate = x
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        answer = yield Evaluations(model_input[None], t[None], estimate)
        options = {**step_options, "generator": noise.at(i)} if takes_generator else step_options
        x = estimate = scheduler.step(answer[0], t, x, **options, return_dict=False)[0]
    return Sample(x, None, len(scheduler.timesteps), len(scheduler.timesteps))
