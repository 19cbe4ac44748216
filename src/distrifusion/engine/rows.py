"""A denoiser call as a pipeline makes it, with the rows of a window in place of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from distrifusion.engine.pipelines import LoopFacts
from distrifusion.errors import ConfigError
from distrifusion.nested import map_tensors
from distrifusion.samplers.evaluations import Evaluations


def with_rows(
    facts: LoopFacts,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: Evaluations,
) -> inspect.BoundArguments:
    """The arguments of a denoiser call in which each guidance branch has all rows that are wanted.

    A branch holds the pictures of every step after each other, so that a pipeline that takes the output apart into
    branches gets all steps of each.

    Args:
        facts: of the pipeline that calls.
        forward: the denoiser's.
        args, kwargs: as the pipeline calls it, with a row for each branch and picture.
        wanted: W steps of B pictures.

    Raises:
        ConfigError: if the call has not a row for each picture.
    """
    bound = inspect.signature(forward).bind(*args, **kwargs)
    given = bound.arguments
    pictures, steps = wanted.x.shape[1], len(wanted.timesteps)
    num_rows = given[facts.sample].shape[0]
    if num_rows % pictures:
        raise ConfigError(
            f"the denoiser was called with {num_rows} rows for {pictures} pictures; sampler= cannot serve such a loop"
        )
    branches = num_rows // pictures
    widen = partial(_widen, branches, pictures, steps)
    for name, value in given.items():
        if name not in facts.shared:
            given[name] = map_tensors(value, widen)
    x = wanted.x.flatten(0, 1)
    rows = x.to(given[facts.sample].dtype).repeat(branches, *(1,) * (x.dim() - 1))
    given[facts.sample] = _with_what_is_beside(rows, given[facts.sample])
    given["timestep"] = _timesteps(facts, given["timestep"], wanted.timesteps, pictures, branches)
    return bound


def _with_what_is_beside(rows: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The sampler's rows with what the pipeline puts beside its latents, such as a mask and a masked picture.

    Args:
        rows: [R, ...].
        given: the pipeline's, as many; one dimension is longer where something is beside.
    """
    for dim, length in enumerate(rows.shape):
        if given.shape[dim] > length:
            return torch.cat([rows, given.narrow(dim, length, given.shape[dim] - length)], dim)
    return rows


def _widen(branches: int, pictures: int, steps: int, value: torch.Tensor) -> torch.Tensor:
    """A tensor [branches B, ...] with every branch's rows repeated for each step; others are the same for all."""
    if not value.dim() or value.shape[0] != branches * pictures:
        return value
    rows = value.reshape(branches, 1, pictures, *value.shape[1:])
    return rows.expand(-1, steps, *rows.shape[2:]).reshape(-1, *value.shape[1:])


def _timesteps(facts: LoopFacts, given: Any, wanted: torch.Tensor, pictures: int, branches: int) -> torch.Tensor:
    """The steps' timesteps, rounded as the pipeline rounds its one: [branches W B]."""
    rows = wanted.repeat_interleave(pictures).repeat(branches)
    if isinstance(given, torch.Tensor):
        rows = rows.to(given.device, given.dtype)
    return rows if facts.timestep_divisor == 1 else rows / facts.timestep_divisor
