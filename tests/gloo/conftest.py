"""The ranks that all tests of this folder use, and the plain pipelines they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_pipelines import PIPELINES, Call
from world import GlooWorld

from distrifusion import Plan
from models import band_by_band, share_weights


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooWorld]:
    """Four gloo ranks; a test takes as many of them as its plan needs."""
    world = GlooWorld(4, timeout=60.0)
    yield world
    world.stop()


@pytest.fixture(scope="session")
def alone() -> Callable[[str, str, Call], torch.Tensor]:
    """The latents of the plain pipeline on one device: `alone(family, scheduler, call)`."""
    return lambda family, scheduler, call: call(PIPELINES[family](scheduler))


@pytest.fixture(scope="session")
def without_exchange() -> Callable[[str, str, Plan, Call], torch.Tensor]:
    """The latents when every band is denoised as a small picture of its own."""

    def run(family: str, scheduler: str, plan: Plan, call: Call) -> torch.Tensor:
        pipe = PIPELINES[family](scheduler)
        plain = share_weights(pipe.unet)

        def forward(sample: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
            del kwargs["return_dict"]
            return (band_by_band(plain, {"sample": sample, "timestep": timestep, **kwargs}, plan),)

        pipe.unet.forward = forward
        return call(pipe)

    return run
