"""The noise of a sampler's steps: a function of a seed and the step, whatever the order in which steps are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch

# What diffusers' schedulers take: one for all pictures, one for each, or torch's global stream.
Generators = torch.Generator | list[torch.Generator] | None


class StepNoise(Protocol):
    """Where the noise of a step comes from."""

    def at(self, step: int) -> Generators:
        """Generators that draw the noise of a step, counted from 0."""


class SeededNoise:
    """Noise that follows from a picture's seed and the step alone.

    Args:
        seeds: one per picture, so a picture's noise does not depend on those drawn with it.
        device: where the noise is drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._seeds = tuple(seeds)
        self._device = torch.device(device)

    def at(self, step: int) -> list[torch.Generator]:
        """Fresh generators, one per picture."""
        return [torch.Generator(self._device).manual_seed(_mixed(seed, step)) for seed in self._seeds]


class RunningNoise:
    """Noise as diffusers' pipelines draw it: one generator that runs on from step to step.

    Steps must be asked for in their order, each once; a sampler that wants them together draws all of them first.
    """

    def __init__(self, generators: Generators) -> None:
        self._generators = generators

    def at(self, step: int) -> Generators:
        """The generators as they stand."""
        return self._generators


def _mixed(seed: int, step: int) -> int:
    """A seed of 63 bits for one step: neighbours share nothing."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
